"""`posttrain reward_model` whole: against TRL's figures, in other layouts; and what it leaves: an
export that is read back, converted and trained on.

That a run is stopped and goes on: tests/jobs/test_sft_processes.py, the loop is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain import config
from posttrain.chat.tokenizer import Tokenizer
from posttrain.config import ConfigError
from posttrain.jobs import convert
from tests.jobs.runs import Finished, Runner, mesh_keys, relative

SHORT = "train.steps=10"


@pytest.fixture(scope="module")
def one_device(run_reward_model: Runner) -> Finished:
    """Ten steps on one device, unpacked, no accumulation."""
    return run_reward_model(SHORT, devices=1)


def series(run: Finished, key: str) -> np.ndarray:
    return np.array([line[key] for line in run.metrics])


def test_ten_steps_equal_trl(one_device: Finished, data_dir: Path) -> None:
    """Every figure of every step within 1e-4 relative; of rewards and margins, which are near 0 in
    places, of the largest reward of the step."""
    log = json.loads((data_dir / "golden" / "reward_b4.json").read_text())["log_history"]
    golden = [row for row in log if "loss" in row]
    want = {key: np.array([row[key] for row in golden]) for key in golden[0]}
    assert len(golden) == len(one_device.metrics) == 10
    for key in ("loss", "grad_norm"):
        print(f"{key} {relative(series(one_device, key), want[key]):.1e}", end=" ")
        assert relative(series(one_device, key), want[key]) < 1e-4, key
    scale = np.maximum(np.abs(want["min_reward"]), np.abs(want["max_reward"]))
    for key in ("min_reward", "mean_reward", "max_reward", "margin"):
        apart = (np.abs(series(one_device, key) - want[key]) / scale).max()
        print(f"{key} {apart:.1e}", end=" ")
        assert apart < 1e-4, key
    np.testing.assert_array_equal(series(one_device, "accuracy"), want["accuracy"])
    assert series(one_device, "num_tokens").tolist() == want["num_tokens"].tolist()


LAYOUTS = {
    "data 2, fsdp 2, tensor 2": mesh_keys(2, 2, 2),
    "packed, accumulation 4": [
        *("batch.packing=best_fit", "batch.accumulate=4"),
        *mesh_keys(1, 2, 1),
    ],
}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> list[str]:
    """Of a tiny model: eight devices on few cores are slow."""
    return [f"model.path={tiny_model}", "train.steps=4"]


@pytest.fixture(scope="module")
def plain(run_reward_model: Runner, tiny: list[str]) -> Finished:
    return run_reward_model(*tiny, devices=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(
    run_reward_model: Runner, tiny: list[str], plain: Finished, layout: str
) -> None:
    """Loss and gradient norm of 4 steps within 1e-5 relative, rewards within 1e-5."""
    keys = LAYOUTS[layout]
    devices = int(np.prod([int(k.split("=")[1]) for k in keys if k.startswith("mesh")]))
    run = run_reward_model(*tiny, *keys, devices=devices)
    for key in ("loss", "grad_norm"):
        apart = relative(series(run, key), series(plain, key))
        print(f"{layout}: {key} {apart:.1e}", end=" ")
        assert apart < 1e-5, key
    for key in ("min_reward", "max_reward", "margin", "accuracy"):
        np.testing.assert_allclose(series(run, key), series(plain, key), atol=1e-5)


def test_held_out_pairs_are_judged(run_reward_model: Runner, data_dir: Path) -> None:
    """At a rate of nearly 0: TRL's figures of the first step's four pairs."""
    sets = [
        f"eval.sets.held.path={data_dir / 'golden' / 'prefs.jsonl'}",
        *("eval.sets.held.limit=4", "batch.packing=best_fit", "optim.lr=1e-30"),
    ]
    run = run_reward_model("train.steps=1", *sets, devices=2)
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = (x for x in lines if "eval/held/loss" in x)
    log = json.loads((data_dir / "golden" / "reward_b4.json").read_text())["log_history"]
    for key in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert line[f"eval/held/{key}"] == pytest.approx(log[0][key], abs=2e-5), key
    assert 0 <= line["eval/held/ece"] <= 1
    assert line["eval/held/brier"] == pytest.approx(0.25, abs=0.05)
    assert abs(line["eval/held/length_correlation"]) <= 1
    assert 0 <= line["eval/held/prefers_longer"] <= 1
    assert not (run.folder / "samples").exists()


def test_a_margin_in_the_data_is_asked_for(
    run_reward_model: Runner, tiny_pairs: list[str], data_dir: Path, tmp_path: Path
) -> None:
    """A margin of 20, rewards within 1: the loss is 20, less what the rewards are apart."""
    rows = [json.loads(x) for x in (data_dir / "golden" / "prefs.jsonl").open()]
    file = tmp_path / "prefs.jsonl"
    file.write_text("".join(json.dumps({**row, "margin": 20.0}) + "\n" for row in rows))
    keys = [*tiny_pairs, f"data.sources.prefs.path={file}", "train.steps=1"]
    (line,) = run_reward_model(*keys, devices=1).metrics
    assert line["loss"] == pytest.approx(20 - line["margin"], abs=1e-4)


@pytest.fixture(scope="module")
def tiny_run(run_reward_model: Runner, tiny_pairs: list[str]) -> Finished:
    """Some steps from a language model that has no score head."""
    return run_reward_model(*tiny_pairs, "train.steps=10", devices=1)


def test_the_export_is_a_classifiers_folder_that_pads_apart(tiny_run: Finished) -> None:
    folder = tiny_run.folder / "export"
    weights = tiny_run.weights
    assert weights["score.weight"].shape == (1, 32)
    assert np.abs(weights["score.weight"]).max() > 0
    assert "lm_head.weight" not in weights
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert raw["id2label"] == {"0": "LABEL_0"}
    tokenizer = Tokenizer.load(folder)
    assert raw["pad_token_id"] == tokenizer.pad_id
    assert tokenizer.pad_id not in tokenizer.stop_ids
    assert not (folder / "generation_config.json").exists()
    assert "posttrain reward_model, bradley_terry" in (folder / "README.md").read_text()


def test_a_checkpoint_and_the_export_become_the_same_folder(
    tiny_run: Finished, tmp_path: Path
) -> None:
    for name, source in (("run", tiny_run.folder), ("folder", tiny_run.folder / "export")):
        keys = [f"source={source}", f"out={tmp_path / name}"]
        assert convert.run(config.load(convert.Config, [], keys)) == 0
        found = load_file(tmp_path / name / "model.safetensors")
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in tiny_run.weights.items()
        }
        written, own = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / name, tiny_run.folder / "export")
        )
        assert written == own, name
        tokenizer = Tokenizer.load(tmp_path / name)
        assert tokenizer.pad_id == own["pad_token_id"]


def test_an_export_goes_on_as_a_model_of_its_own(
    run_reward_model: Runner, tiny_pairs: list[str], tiny_run: Finished
) -> None:
    """Its head is kept, not made anew."""
    export = tiny_run.folder / "export"
    keys = [*tiny_pairs, f"model.path={export}", "model.random_init=false", "optim.lr=1e-30"]
    again = run_reward_model(*keys, "train.steps=2", devices=1)
    for name, want in tiny_run.weights.items():
        np.testing.assert_allclose(again.weights[name], want, atol=1e-7, err_msg=name)


def test_a_reward_model_does_not_pass_for_a_language_model(
    run_sft: Runner, tiny_run: Finished, tmp_path: Path
) -> None:
    export = tiny_run.folder / "export"
    with pytest.raises(ConfigError, match="score head and no vocabulary head"):
        run_sft(f"model.path={export}", "train.steps=1", devices=1)
    weights = load_file(export / "model.safetensors")
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights["score.weight"] = np.repeat(weights["score.weight"], 3, 0)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    keys = [f"source={tmp_path}", f"out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"score\.weight is \[3, 32\]"):
        convert.run(config.load(convert.Config, [], keys))
