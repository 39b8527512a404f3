"""Ids against transformers, for every tokenizer.json of the test data."""

from __future__ import annotations

import json
import random

import pytest

from posttrain.chat.control import SectionEncoder
from posttrain.chat.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

FOLDERS = (
    "data/tokenizers/gpt2",
    "data/tokenizers/minimind",
    "data/tokenizers/phi-3-mini",
    "data/models/stories260K",
    "golden/model",
)


def texts(data_dir, tokenizer):
    """Real text, odd text, and text with control tokens in it."""
    lines = (data_dir / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    out = [value for line in lines for value in json.loads(line).values()]
    inputs = (data_dir / "data/tokenizers/golden/ggml-vocab-gpt-2.gguf.inp").read_text("utf-8")
    out += inputs.split("\n__ggml_vocab_test__\n")
    words = [*tokenizer.added_tokens, " ", "\n", "  ", "a", "Hello", "7", "é", "𝄞", "<|", "|>"]
    dice = random.Random(0)
    out += ["".join(dice.choices(words, k=12)) for _ in range(200)]
    return out


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_text_equal_transformers(name, data_dir):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.load(data_dir / name)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(data_dir / name / "tokenizer.json"))
    for text in texts(data_dir, tokenizer):
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text, add_special_tokens=False), text
        want = reference.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == want


@pytest.mark.parametrize("name", FOLDERS)
def test_sections_equal_the_whole_when_all_is_trusted(name, data_dir):
    """The slow way, around typed control tokens, gives what the whole tokenizer gives."""
    tokenizer = Tokenizer.load(data_dir / name)
    description = json.loads((data_dir / name / "tokenizer.json").read_text("utf-8"))
    description["truncation"] = description["padding"] = None
    sections = SectionEncoder(description)
    for text in texts(data_dir, tokenizer):
        ids, _ = sections.encode(text, [(0, len(text))], (), frozenset())
        assert ids == tokenizer.encode(text).ids, text
