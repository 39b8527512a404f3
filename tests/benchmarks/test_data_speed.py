"""`make bench`: tokens a second of `prepare`, against the tokenizer alone; packing's fill and time.

Figures of a machine that does something else at the same time mean nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.config import DataConfig, SourceConfig
from posttrain.data.pack import pack
from posttrain.data.prepare import prepare

pytestmark = pytest.mark.bench
ROUNDS = 3


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> Path:
    return data_dir / "data/gsm8k/train.jsonl"


@pytest.fixture(scope="module")
def bare(data_dir: Path, rows: Path) -> tuple[int, float]:
    """(tokens, seconds) of one batch call of `tokenizers` on the same rendered texts, all cores."""
    tokenizer = tokenizers.Tokenizer.from_file(str(data_dir / "golden/model/tokenizer.json"))
    texts = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        texts.append(
            f"<|im_start|>user\n{row['question']}<|im_end|>\n"
            f"<|im_start|>assistant\n{row['answer']}<|im_end|>\n"
        )
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        found.append((sum(len(e.ids) for e in encodings), time.perf_counter() - begun))
    return min(found, key=lambda pair: pair[1])


def test_prepare_keeps_up_with_the_bare_tokenizer(data_dir, rows, bare, tmp_path):
    folder = data_dir / "golden/model"
    chat = ChatTemplate.load(folder, Tokenizer.load(folder), ChatConfig())
    source = SourceConfig(path=str(rows), fields={"user": "question", "assistant": "answer"})
    seconds, tokens = [], 0
    for k in range(ROUNDS):
        cfg = DataConfig(sources={"gsm8k": source}, seq_len=1024, cache_dir=str(tmp_path / str(k)))
        begun = time.perf_counter()
        cache = prepare(cfg, chat, quiet=True)
        seconds.append(time.perf_counter() - begun)
        tokens = int(np.sum(cache.lengths))
    assert abs(tokens - bare[0]) / bare[0] < 0.01, "both must have tokenised the same texts"
    ours, alone = tokens / min(seconds), bare[0] / bare[1]
    print(
        f"\nprepare: {ours:,.0f} tokens/s (best of {ROUNDS}: {min(seconds):.2f} s for {tokens:,}); "
        f"tokenizers alone {alone:,.0f} tokens/s; ratio {ours / alone:.0%}"
    )
    assert ours / alone >= 0.6


def test_packing_of_gsm8k_is_full_and_quick(data_dir):
    tokenizer = tokenizers.Tokenizer.from_file(
        str(data_dir / "data/tokenizers/minimind/tokenizer.json")
    )
    lines = (data_dir / "data/gsm8k/train.jsonl").read_text().splitlines()
    texts = [" ".join(json.loads(line).values()) for line in lines]
    lengths = np.array([len(e.ids) + 12 for e in tokenizer.encode_batch(texts)])
    window = np.resize(lengths, 65_536)
    for name, some in (("gsm8k", lengths), ("65,536 examples", window)):
        begun = time.perf_counter()
        rows = pack(some, 1024)
        seconds = time.perf_counter() - begun
        fill = some.sum() / (len(rows) * 1024)
        print(f"\npack {name} at 1,024: {fill:.2%} full, {seconds:.2f} s")
        assert fill >= 0.995
        assert seconds < 10
