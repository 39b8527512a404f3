"""What a run of `posttrain preference` does besides its numbers: the pass before training computes
what is missing and nothing else, held-out pairs, one compilation, checkpoints without a reference,
and the same reference after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain import config
from posttrain.checkpoint import Checkpoints
from posttrain.config import ConfigError
from posttrain.jobs import convert
from posttrain.losses.base import PreferenceLoss
from posttrain.metrics import Writer
from posttrain.train import reference
from posttrain.train.loop import PREEMPTED
from posttrain.train.reference_store import Store
from posttrain.types import Batch, Terms, TokenOutputs
from tests.jobs.runs import Finished, Runner

TRACED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of all examples that passes wrote down, in order, over all of a test's runs."""
    ids: list[int] = []
    add = Store.add

    def counting(self: Store, new: Any, logps: Any) -> None:
        ids.extend(new)
        add(self, new, logps)

    monkeypatch.setattr(Store, "add", counting)
    return ids


@pytest.fixture(scope="module")
def trained(run_preference: Runner, tiny_pairs: list[str]) -> Finished:
    """A run whose weights others start from."""
    return run_preference(*tiny_pairs, "train.steps=3", devices=1)


def copied(trained: Finished, folder: Path) -> Path:
    """Its exported folder, to be changed."""
    return shutil.copytree(trained.folder / "export", folder)


def evaluations(run: Finished) -> list[dict]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if any(key.startswith("eval/") for key in line)]


def test_a_pass_computes_what_the_run_uses_and_nobody_has(
    run_preference: Runner, tiny_pairs: list[str], tmp_path: Path, computed: list[int]
) -> None:
    keys = [*tiny_pairs, f"data.cache_dir={tmp_path}"]
    short = run_preference(*keys, "train.steps=3", devices=1)
    assert len(computed) == len(set(computed)) == 12, "3 steps of 2 pairs"
    assert {i ^ 1 for i in computed} == set(computed), "both sides"
    run_preference(*keys, "train.steps=3", "optim.lr=2e-4", devices=1)
    assert len(computed) == 12, "a sweep's other runs find them"
    run_preference(*keys, "train.steps=5", devices=1, folder=short.folder)
    assert len(computed) == len(set(computed)) == 20, "an extended run adds what it lacks"


def test_a_held_out_set_that_is_the_training_set_is_computed_once(
    run_preference: Runner, tiny_pairs: list[str], data_dir: Path, computed: list[int]
) -> None:
    """What is computed is found by content, under whatever name a source has it."""
    same = f"eval.sets.same={{path: {data_dir / 'golden' / 'prefs.jsonl'}, limit: 20}}"
    keys = [same, "eval.samples=0", "train.epochs=1", "batch.examples=4"]
    run = run_preference(*tiny_pairs, *keys, devices=1)
    assert len(computed) == len(set(computed)) == 2 * sum(x["examples"] for x in run.metrics)


def test_a_pass_that_was_stopped_goes_on_and_changes_no_bit(
    run_preference: Runner,
    tiny_pairs: list[str],
    tmp_path: Path,
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [*tiny_pairs, "train.steps=6", "batch.examples=1"]
    calm = run_preference(*keys, devices=1)
    every = sorted(computed)
    computed.clear()
    calls = iter([False, True])
    with monkeypatch.context() as patched:
        patched.setattr(reference.Preemption, "reached", lambda _: next(calls))
        with pytest.raises(SystemExit) as left:
            run_preference(*keys, devices=1, folder=tmp_path / "run")
    assert left.value.code == PREEMPTED
    first = sorted(computed)
    assert 0 < len(first) < len(every)
    stopped = run_preference(*keys, devices=1, folder=tmp_path / "run")
    assert sorted(computed) == every, "each once"
    np.testing.assert_array_equal(stopped.losses, calm.losses)
    for name, want in calm.weights.items():
        np.testing.assert_array_equal(stopped.weights[name], want, err_msg=name)


def test_held_out_pairs_are_measured_and_their_prompts_answered(
    run_preference: Runner, tiny_model: Path, data_dir: Path
) -> None:
    """At a rate of nearly 0 the policy is the reference: log 2, and TRL's first log-probs of the
    golden model."""
    sets = [
        f"eval.sets.held.path={data_dir / 'golden' / 'prefs.jsonl'}",
        *("eval.sets.held.limit=4", "eval.samples=1", "eval.max_new_tokens=4"),
    ]
    for mode, model in (("cached", data_dir / "golden" / "model"), ("live", tiny_model)):
        keys = ["train.steps=1", "optim.lr=1e-30", "batch.packing=best_fit", f"reference={mode}"]
        run = run_preference(*keys, *sets, f"model.path={model}", devices=2)
        (line,) = evaluations(run)
        log = json.loads((data_dir / "golden" / "dpo_sigmoid_b4.json").read_text())["log_history"]
        np.testing.assert_allclose(line["eval/held/loss"], np.log(2), rtol=1e-5)
        for name in ("logps/chosen", "logps/rejected") if model != tiny_model else ():
            assert abs(line[f"eval/held/{name}"] - log[0][name]) < 1e-3
        assert abs(line["eval/held/rewards/margins"]) < 1e-5
        assert 0 <= line["eval/held/rewards/accuracies"] <= 1
        row = json.loads((data_dir / "golden" / "prefs.jsonl").open().readline())
        sample = json.loads((run.folder / "samples" / "1_held.jsonl").read_text())
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert sample["expected"] == row["chosen"][0]["content"] + "<|im_end|>\n"


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_nothing_is_compiled_after_step_two(
    run_preference: Runner, tiny_pairs: list[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    lowered: list[str] = []
    at_step: dict[int, int] = {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: lowered.append(event) if event == TRACED else None
    )
    write = Writer.write

    def counting(self: Writer, step: int, metrics: dict) -> None:
        if "loss" in metrics:  # other lines come after a save, which copies the arrays
            at_step[step] = len(lowered)
        write(self, step, metrics)

    monkeypatch.setattr(Writer, "write", counting)
    run_preference(
        *tiny_pairs, "train.steps=6", f"reference={mode}", "checkpoint.every=100", devices=4
    )
    assert at_step[1] > 0
    assert at_step[6] == at_step[2], at_step


def test_pitfall_19_a_checkpoint_holds_no_reference(
    run_preference: Runner, tiny_pairs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three numbers a parameter (it and AdamW's two), whichever the reference."""
    saved: list[Any] = []
    save = Checkpoints.save

    def seen(self: Checkpoints, step: int, state: Any, *rest: Any, **options: Any) -> None:
        saved.append(state)
        save(self, step, state, *rest, **options)

    monkeypatch.setattr(Checkpoints, "save", seen)
    sizes = {}
    for mode in ("cached", "live"):
        run = run_preference(*tiny_pairs, "train.steps=1", f"reference={mode}", devices=1)
        files = (run.folder / "checkpoints" / "1").rglob("*")
        sizes[mode] = sum(file.stat().st_size for file in files if file.is_file())
        numbers = sum(x.size for x in jax.tree.leaves(saved[-1]))
        parameters = sum(x.size for x in jax.tree.leaves(saved[-1].params))
        assert abs(numbers - 3 * parameters) < 10
    assert abs(sizes["live"] / sizes["cached"] - 1) < 0.02, sizes
    assert sizes["live"] < 1.1 * 3 * 4 * parameters


def test_any_checkpoint_of_a_run_becomes_a_model_folder(
    run_preference: Runner, tiny_pairs: list[str], tmp_path: Path
) -> None:
    run = run_preference(*tiny_pairs, "train.steps=2", "checkpoint.every=1", devices=1)
    out = tmp_path / "out"
    keys = [f"source={run.folder}@2", f"out={out}", "mesh.fsdp=8"]
    assert convert.run(config.load(convert.Config, [], keys)) == 0
    found = load_file(out / "model.safetensors")
    for name, want in run.weights.items():
        np.testing.assert_array_equal(found[name], want, err_msg=name)
    card = (run.folder / "export" / "README.md").read_text()
    assert "Preference optimisation (posttrain preference, dpo)" in card


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_a_resumed_run_keeps_the_reference_it_started_with(
    run_preference: Runner, tiny_pairs: list[str], trained: Finished, mode: str
) -> None:
    """From another run's weights, which are neither model.path's nor those it has reached."""
    keys = [*tiny_pairs, f"checkpoint.init_from={trained.folder}", f"reference={mode}"]
    whole = run_preference(*keys, "train.steps=6", devices=1)
    part = run_preference(*keys, "train.steps=3", devices=1)
    assert abs(part.metrics[0]["rewards/margins"]) < 1e-5, "it starts from the reference"
    resumed = run_preference(*keys, "train.steps=6", devices=1, folder=part.folder)
    assert [line["step"] for line in resumed.metrics] == list(range(1, 7))
    for name, want in whole.weights.items():
        # a plan of six steps has other rows than one of three: other last digits
        apart = np.linalg.norm(resumed.weights[name] - want) / np.linalg.norm(want)
        assert apart < 1e-5, (name, apart)


def test_a_resumed_run_whose_start_has_changed_needs_nothing_of_it_or_says_so(
    run_preference: Runner,
    tiny_pairs: list[str],
    trained: Finished,
    tmp_path: Path,
    computed: list[int],
) -> None:
    model = copied(trained, tmp_path / "model")
    computed.clear()
    keys = [*tiny_pairs, f"model.path={model}", "model.random_init=false"]
    run = run_preference(*keys, "train.steps=2", devices=1)
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(2.0**-20)
    save_file(weights, file, metadata={"format": "pt"})
    before = len(computed)
    run_preference(*keys, "train.steps=2", devices=1, folder=run.folder)  # all is there
    assert len(computed) == before
    for mode in ("cached", "live"):
        more = ["train.steps=4", f"reference={mode}"]
        with pytest.raises(ValueError, match=f"{model} holds other weights now"):
            run_preference(*keys, *more, devices=1, folder=run.folder)


def test_log_probs_that_are_not_finite_end_the_pass_and_name_the_row(
    run_preference: Runner, tiny_pairs: list[str], trained: Finished, tmp_path: Path
) -> None:
    model = copied(trained, tmp_path / "model")
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    keys = [*tiny_pairs, f"model.path={model}", "model.random_init=false", "train.steps=2"]
    with pytest.raises(FloatingPointError, match=r"prefs\.jsonl:\d+: the reference's log-probs"):
        run_preference(*keys, devices=1, folder=tmp_path / "run")
    assert not list(Path(f"{tmp_path / 'run'}.cache").glob("reference/*/*.part.npy"))


def test_rows_are_no_size_of_a_step_of_pairs(run_preference: Runner) -> None:
    with pytest.raises(ConfigError, match=r"batch\.rows is 4: a step takes pairs"):
        run_preference("batch.examples=null", "batch.rows=4", devices=1)


def test_files_that_are_not_there_are_told_together_before_the_model_is_read(
    run_preference: Runner,
) -> None:
    keys = ["data.sources.prefs.path=/no/train.jsonl", "data.sources.more.path=/no/more.jsonl"]
    with pytest.raises(ValueError, match="no such file") as told:
        run_preference(*keys, "eval.sets.held.path=/no/test.jsonl", "model.path=no-model")
    for name in ("data.sources.prefs.path: /no/t", "data.sources.more.path", "eval.sets.held.path"):
        assert name in str(told.value)


class ChosenNLL(PreferenceLoss):
    """A user's own loss: imitates the chosen answers, and needs no reference."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps"})

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        assert batch.reference_logps is None
        segment_BT = jnp.maximum(batch.segment_ids - 1, 0)
        chosen_BT = jnp.take_along_axis(batch.chosen, segment_BT, axis=1)
        weights_BT = batch.loss_weights * chosen_BT
        return Terms(-outputs.logps, weights_BT, jnp.full(weights_BT.shape, -1), {})


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_where_the_loss_needs_no_reference_none_is_made(
    run_preference: Runner,
    tiny_pairs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    computed: list[int],
    mode: str,
) -> None:
    monkeypatch.setattr(reference, "fingerprint", lambda _: pytest.fail("not asked for"))
    keys = [f"loss.type={__name__}:ChosenNLL", f"reference={mode}", "train.steps=2"]
    run = run_preference(*tiny_pairs, *keys, devices=1)
    assert not computed
    np.testing.assert_allclose(run.losses, np.log(6400), rtol=0.02)
