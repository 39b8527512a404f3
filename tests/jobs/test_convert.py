"""`posttrain convert`: folders to folders, checkpoints to folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from posttrain import config
from posttrain.config import ConfigError
from posttrain.jobs import convert
from tests.jobs.runs import Runner


def convert_to(out: Path, *keys: str) -> dict[str, np.ndarray]:
    """Runs the job; the tensors it wrote."""
    assert convert.run(config.load(convert.Config, [], [f"out={out}", *keys])) == 0
    files = out.glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    return data_dir / "data" / "models" / "stories260K"


def test_a_folder_comes_out_as_it_was(stories: Path, tmp_path: Path) -> None:
    found = convert_to(tmp_path / "out", f"source={stories}", "max_file_gb=0.0005")
    want = load_file(stories / "model.safetensors")
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in want.items()}
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    raw = json.loads((stories / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: written[k] for k in raw} == raw
    one, other = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for folder in (stories, tmp_path / "out")
    )
    text = "Once upon a time, there was a little girl."
    assert one.encode(text).ids == other.encode(text).ids


def test_dtype_new_tokens_and_padding(data_dir: Path, tmp_path: Path) -> None:
    """6,400 tokens and 2 new ones, padded to 6,464: old rows rounded, the others their mean."""
    source = data_dir / "golden" / "model"
    found = convert_to(
        tmp_path / "out",
        f"source={source}",
        "dtype=bfloat16",
        "new_tokens=[<|one|>,<|two|>]",
        "vocab_multiple=64",
    )
    want = load_file(source / "model.safetensors")
    assert set(found) == set(want)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in found.values())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape == (6464, 128)
        rounded = want[name].astype(ml_dtypes.bfloat16)
        assert found[name][:6400].tobytes() == rounded.tobytes()
        mean = want[name].astype(np.float64).mean(0)
        np.testing.assert_allclose(
            found[name][6400:].astype(np.float32), np.tile(mean, (64, 1)), rtol=2**-7, atol=1e-6
        )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["vocab_size"], written["dtype"]) == (6464, "bfloat16")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("<|two|><|one|>", add_special_tokens=False).ids == [6401, 6400]
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == (source / "chat_template.jinja").read_text()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    assert generation["pad_token_id"] == 0


def test_any_checkpoint_of_a_run_becomes_a_folder(run_sft: Runner, tmp_path: Path) -> None:
    """The last one equals the export the run wrote itself; an earlier one does not."""
    trained = run_sft("train.steps=2", "checkpoint.every=1", devices=2)
    last = convert_to(tmp_path / "last", f"source={trained.folder}")
    assert {k: v.tobytes() for k, v in last.items()} == {
        k: v.tobytes() for k, v in trained.weights.items()
    }
    own, theirs = tmp_path / "last", trained.folder / "export"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (own / name).read_text() == (theirs / name).read_text(), name
    stops = [
        json.loads((f / "generation_config.json").read_text())["eos_token_id"]
        for f in (own, theirs)
    ]
    assert stops[0] == stops[1] == [2]
    first = convert_to(tmp_path / "first", f"source={trained.folder}@1")
    assert not np.array_equal(first["lm_head.weight"], last["lm_head.weight"])
    with pytest.raises(ValueError, match=r"no such checkpoint; the run has steps \[1, 2\]"):
        convert_to(tmp_path / "none", f"source={trained.folder}@7")
    with pytest.raises(ConfigError, match="is a run: export it first"):
        convert_to(tmp_path / "none", f"source={trained.folder}", "new_tokens=[<|a|>]")


def test_what_cannot_be_converted_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the folder that is read: choose another"):
        convert_to(stories, f"source={stories}")
    with pytest.raises(ValueError, match="no such folder"):
        convert_to(tmp_path / "out", f"source={tmp_path / 'nothing'}")
    half = tmp_path / "half"
    half.mkdir()
    raw = json.loads((stories / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    with pytest.raises(ConfigError, match="is in float16: set dtype"):
        convert_to(tmp_path / "out", f"source={half}")
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json to add them to"):
        convert_to(tmp_path / "out", f"source={half}", "dtype=float32", "new_tokens=[<|a|>]")
