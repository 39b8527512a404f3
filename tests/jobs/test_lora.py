"""Runs with adapters: what they keep, over what they go on, and what they leave for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain import checkpoint, config
from posttrain.config import ConfigError
from posttrain.jobs import convert
from posttrain.models.lora import is_adapter
from tests.jobs.runs import Finished, Runner, relative

ROUNDED = 1e-7
"""Products of adapters on 8 devices are summed up in another order than on one."""
LORA = ["lora.rank=4", "lora.alpha=8", "optim.lr=2e-2"]


def exported(*keys: str) -> dict[str, np.ndarray]:
    """The tensors that `posttrain convert` writes."""
    cfg = config.load(convert.Config, [], list(keys))
    assert convert.run(cfg) == 0
    return load_file(cfg.out / "model.safetensors")


def assert_equal(
    found: dict[str, np.ndarray], want: dict[str, np.ndarray], atol: float = 0
) -> None:
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def tuned(run_sft: Runner, tiny_sft: list[str]) -> Finished:
    keys = ["train.steps=4", "checkpoint.every=2", "lora.dropout=0.1"]
    return run_sft(*tiny_sft, *LORA, *keys, devices=1)


def test_the_base_stays_and_is_in_no_checkpoint(tuned: Finished, tiny_model: Path) -> None:
    saved = checkpoint.saved_params(str(tuned.folder))
    assert len(saved) == 14
    assert all(map(is_adapter, saved))
    base = load_file(tiny_model / "model.safetensors")
    assert tuned.weights.keys() == base.keys()
    for name, array in tuned.weights.items():
        assert np.array_equal(array, base[name]) == ("_proj" not in name), name
    assert tuned.losses[-1] < tuned.losses[0] - 0.05


def test_a_resumed_run_ends_in_the_same_bits(
    tuned: Finished, run_sft: Runner, tiny_sft: list[str], tmp_path: Path
) -> None:
    """Dropout's too: it is a function of seed and step."""
    copy = tmp_path / "run"
    shutil.copytree(tuned.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    keys = ["train.steps=4", "checkpoint.every=2", "lora.dropout=0.1"]
    again = run_sft(*tiny_sft, *LORA, *keys, devices=1, folder=copy)
    assert_equal(again.weights, tuned.weights)


def test_adapter_and_base_are_converted_to_what_the_run_exported(
    tuned: Finished, tiny_model: Path, tmp_path: Path
) -> None:
    of_run = exported(f"source={tuned.folder}", f"out={tmp_path / 'run'}")
    assert_equal(of_run, tuned.weights, ROUNDED)
    adapter = f"adapter={tuned.folder / 'adapter'}"
    both = exported(f"source={tiny_model}", adapter, f"out={tmp_path / 'both'}")
    assert_equal(both, tuned.weights, ROUNDED)


def test_nothing_is_merged_into_the_adapters_own_folder(tuned: Finished, tiny_model: Path) -> None:
    """transformers would put the adapter that it finds beside a model onto it once more."""
    adapter = tuned.folder / "adapter"
    with pytest.raises(ConfigError, match="the folder that is read: choose another"):
        exported(f"source={tiny_model}", f"adapter={adapter}", f"out={adapter}")
    assert not (adapter / "model.safetensors").exists()


def test_a_run_starts_from_an_adapter_folder_or_from_another_run(
    tuned: Finished, run_sft: Runner, tiny_sft: list[str]
) -> None:
    keys = [*tiny_sft, *LORA, "train.steps=1"]
    folder = run_sft(*keys, f"lora.path={tuned.folder / 'adapter'}", devices=1)
    run = run_sft(*keys, f"checkpoint.init_from={tuned.folder}", devices=1)
    merged = [f"model.path={tuned.folder / 'export'}", *keys[1:]]
    want = run_sft(*tiny_sft, *merged, devices=1)
    assert_equal(folder.weights, run.weights)
    np.testing.assert_array_equal(folder.losses, run.losses)
    assert relative(folder.losses, want.losses) < 1e-5


def test_an_adapter_folder_that_is_not_what_lora_says_is_refused_by_field(
    tuned: Finished, run_sft: Runner, tiny_sft: list[str], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned.folder / "adapter", adapter)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(raw | {"use_dora": True}))
    keys = [*tiny_sft, "train.steps=1", f"lora.path={adapter}"]
    with pytest.raises(ConfigError) as error:
        run_sft(*keys, "lora.rank=8", devices=1)
    assert "use_dora is true: only false is supported" in str(error.value)
    assert "lora.rank is 8, r in" in str(error.value)
    assert "lora.alpha is 32.0, lora_alpha in" in str(error.value)
    (adapter / "adapter_config.json").write_text(json.dumps(raw))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.x"] = tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors do not fit .*\n  missing: .*\n  unexpected: "):
        run_sft(*keys, *LORA, devices=1)


def test_new_tokens_are_trained_beside_an_adapter(
    run_sft: Runner, tiny_sft: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Their rows alone move, in the embedding and in the head, and are in the adapter's folder."""
    new = ["model.new_tokens=['<|think|>', '<|done|>']"]
    run = run_sft(*tiny_sft, *LORA, *new, "train.steps=2", devices=1)
    base = load_file(tiny_model / "model.safetensors")
    first = len(run.weights["lm_head.weight"]) - 2
    assert first == len(base["lm_head.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(run.weights[name][:first], base[name])
    mean = base["lm_head.weight"].mean(0, dtype=np.float64)
    assert np.abs(run.weights["lm_head.weight"][first:] - mean).max() > 1e-3  # pushed down
    source = [f"source={run.folder}", f"out={tmp_path / 'out'}"]
    assert_equal(exported(*source), run.weights, ROUNDED)
    config_json = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    ids = [first, first + 1]
    assert config_json["trainable_token_indices"] == {"embed_tokens": ids, "lm_head": ids}
    both = [f"source={tiny_model}", f"adapter={run.folder / 'adapter'}", new[0].partition(".")[2]]
    assert_equal(exported(*both, f"out={tmp_path / 'both'}"), run.weights, ROUNDED)


def test_pairs_have_the_base_as_their_reference_cached_or_live(
    run_preference: Runner, tiny_pairs: list[str]
) -> None:
    """trl #495, LLaMA-Factory #8459: and a run that starts from an adapter has that adapter."""
    keys = [*tiny_pairs, *LORA, "train.steps=3", "batch.examples=4"]
    cached = run_preference(*keys, devices=1)
    live = run_preference(*keys, "reference=live", devices=1)
    np.testing.assert_allclose(live.losses, cached.losses, rtol=1e-5)
    assert cached.losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(cached.metrics[-1]["rewards/margins"]) > 1e-3
    further = [*keys, f"lora.path={cached.folder / 'adapter'}"]
    run = run_preference(*further, "reference=live", "train.steps=1", devices=1)
    assert run.losses[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_trained_over_and_merged(
    kind: str, run_sft: Runner, tiny_sft: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """The export less its adapters is the base in few bits; on any mesh it is the same base."""
    keys = [*tiny_sft, *LORA, f"lora.quantize={kind}", "train.steps=1"]
    run = run_sft(*keys, devices=8)
    base = load_file(tiny_model / "model.safetensors")
    adapter = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    for name, array in run.weights.items():
        if "_proj" not in name:
            np.testing.assert_array_equal(array, base[name])
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{module}.lora_{side}.weight"] for side in "AB")
        assert b.any()
        frozen = array - 2 * b @ a
        assert 0 < np.abs(frozen - base[name]).max() < 0.2 * np.abs(base[name]).max()
        if kind == "nf4" and frozen.shape[1] == 32 and "o_proj" not in name:  # one scale a row
            assert max(len(np.unique(row.round(5))) for row in frozen) <= 16
    assert_equal(exported(f"source={run.folder}", f"out={tmp_path / 'out'}"), run.weights, ROUNDED)
    if kind == "nf4":
        again = run_sft(*keys, devices=1, folder=run.folder)
        assert_equal(again.weights, run.weights, ROUNDED)


def test_a_reward_model_has_its_head_beside_the_adapters(
    run_reward_model: Runner, tiny_pairs: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    keys = [*tiny_pairs, f"model.path={tiny_model}", "model.random_init=false", *LORA]
    run = run_reward_model(*keys, "train.steps=1", devices=1)
    saved = checkpoint.saved_params(str(run.folder))
    assert [path for path in saved if not is_adapter(path)] == ["score"]
    adapter = run.folder / "adapter"
    config_json = json.loads((adapter / "adapter_config.json").read_text())
    assert config_json["modules_to_save"] == ["score"]
    assert config_json["task_type"] == "SEQ_CLS"
    both = [f"source={tiny_model}", f"adapter={adapter}", f"out={tmp_path / 'both'}"]
    assert_equal(exported(*both), run.weights, ROUNDED)


def test_what_an_adapter_folder_is_not_is_said(
    tuned: Finished, run_sft: Runner, tiny_sft: list[str]
) -> None:
    adapter = tuned.folder / "adapter"
    with pytest.raises(ValueError, match=r"an adapter, not a model.* in lora\.path"):
        run_sft(*tiny_sft, f"model.path={adapter}", devices=1)
    with pytest.raises(ConfigError, match=r"the run trained adapters .*model\.path=.*/export"):
        run_sft(*tiny_sft, "train.steps=1", f"checkpoint.init_from={tuned.folder}", devices=1)
