"""Ids against published ones, and what the wrapper adds: no stray BOS, no padding, streaming."""

from __future__ import annotations

import json
import pickle

import pytest

from posttrain.chat.encoding import token_range
from posttrain.chat.tokenizer import StreamDecoder, Tokenizer

GOLDEN = {"gpt-2": "gpt2", "phi-3": "phi-3-mini"}


@pytest.fixture(scope="module")
def load(data_dir):
    return lambda name: Tokenizer.load(data_dir / "data/tokenizers" / name)


@pytest.mark.parametrize("golden", GOLDEN)
def test_ids_of_llama_cpp(golden, load, data_dir):
    folder = data_dir / "data/tokenizers/golden"
    stem = f"ggml-vocab-{golden}.gguf"
    texts = (folder / f"{stem}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{stem}.out").read_text("utf-8").split("\n")
    tokenizer = load(GOLDEN[golden])
    compared = 0
    for text, line in zip(texts, lines, strict=False):
        want = [int(i) for i in line.split()]
        assert tokenizer.encode(text).ids == want, text
        assert tokenizer.encode(text, trusted=[]).ids == want, text
        compared += 1
    assert compared > 40


def test_sizes_and_special_tokens(load, data_dir):
    assert load("gpt2").size == 50257
    phi = load("phi-3-mini")
    assert (phi.size, phi.bos_id, phi.eos_id, phi.pad_id) == (32011, 1, 32000, 32000)
    golden = Tokenizer.load(data_dir / "golden/model")
    assert (golden.bos_id, golden.eos_id, golden.stop_ids) == (None, 2, (2,))
    assert golden.special_ids == frozenset(range(21))


def test_padding_and_truncation_in_the_file_are_switched_off(load, data_dir, tmp_path):
    file = data_dir / "data/tokenizers/minimind/tokenizer.json"
    description = json.loads(file.read_text("utf-8"))
    description["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    description["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    text = "More than four tokens, fewer than sixty-four."
    assert Tokenizer.load(tmp_path).encode(text).ids == load("minimind").encode(text).ids


def test_offsets_are_not_trimmed(data_dir, tmp_path):
    """A post-processor may take the space off a token's place: the space would be nobody's."""
    file = data_dir / "data/tokenizers/gpt2/tokenizer.json"
    description = json.loads(file.read_text("utf-8"))
    description["post_processor"]["trim_offsets"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    assert list(Tokenizer.load(tmp_path).encode("a b").offsets) == [(0, 1), (1, 3)]


def test_stop_ids_come_from_every_config(data_dir, tmp_path):
    file = data_dir / "data/tokenizers/minimind/tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(tmp_path).stop_ids == (2, 0, 9)
    # without tokenizer_config.json, the end token is the model's
    (tmp_path / "tokenizer_config.json").unlink()
    bare = Tokenizer.load(tmp_path)
    assert (bare.eos_id, bare.eos_token) == (2, "<|im_end|>")


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; convert"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{\n"eos_token": }')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json, line 2: not JSON"):
        Tokenizer.load(tmp_path)


def test_new_tokens_survive_saving_and_pickling(load, tmp_path):
    wider = load("gpt2").with_added_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert wider.size == 50259  # the known one is not added again
    wider.save(tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>"
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(wider))):
        assert other.encode(text).ids == wider.encode(text).ids
        assert other.size == wider.size
    assert wider.fingerprint() != load("gpt2").fingerprint()
    assert pickle.loads(pickle.dumps(wider)).fingerprint() == wider.fingerprint()


def test_streamed_text_is_the_whole_text(load):
    text = "  naïve 𝄞 clefs — 中文 and 🧑‍🚀\n\nend"
    for name in ("gpt2", "minimind", "phi-3-mini"):
        tokenizer = load(name)
        ids = tokenizer.encode(text).ids
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_are_not_held_back_for_ever(load):
    decoder = StreamDecoder(load("gpt2"))
    half = load("gpt2").encode("𝄞").ids[:1]
    assert "".join(decoder.push(half[0]) for _ in range(20)) + decoder.flush()


def test_token_range_takes_whole_characters(load):
    tokenizer = load("gpt2")
    text = "ab𝄞cd"
    encoding = tokenizer.encode(text)
    low, high = token_range(encoding, 2, 3)
    assert high - low > 1  # the clef takes several tokens, all of them in the range
    assert tokenizer.decode(encoding.ids[low:high]) == "𝄞"
    assert token_range(encoding, 2, 2) == (0, 0)


def test_a_batch_is_its_texts_one_by_one(load):
    tokenizer = load("phi-3-mini")
    texts = ["<|user|>\nhi<|end|>", "typed <|end|> here", ""]
    trusted = [[(0, 8), (11, 18)], [], []]
    batch = tokenizer.encode_batch(texts, trusted, [()] * 3, frozenset())
    for text, allowed, got in zip(texts, trusted, batch, strict=True):
        one = tokenizer.encode(text, trusted=allowed)
        assert not isinstance(got, ValueError)
        assert got.ids == one.ids
        assert list(got.offsets) == list(one.offsets)
