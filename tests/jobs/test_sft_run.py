"""What a run of `posttrain sft` does besides its numbers: compiling once, evaluating, starting from
another run, going on after its end, refusing what is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.metrics import Writer
from tests.jobs.runs import Finished, Runner

TRACED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def test_nothing_is_compiled_after_step_two(
    run_sft: Runner, tiny_sft: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts programs that jax lowers, which it does whether or not a compile cache has them."""
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
    keys = ["train.steps=6", "batch.packing=best_fit", "checkpoint.every=100"]
    run_sft(*tiny_sft, *keys, devices=4)
    assert at_step[1] > 0
    assert at_step[6] == at_step[2], at_step


def test_evaluation_is_the_mean_over_every_trained_token(run_sft: Runner, data_dir: Path) -> None:
    """Loss of the untrained golden model on 20 conversations against TRL's log-probs of them."""
    held_out = [
        f"eval.sets.twenty.path={data_dir / 'golden' / 'sft.jsonl'}",
        "eval.sets.twenty.limit=20",
        "eval.every=1",
        "eval.samples=2",
        "eval.max_new_tokens=8",
    ]
    run = run_sft("train.steps=1", "optim.lr=1e-30", *held_out, devices=2)
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = next(x["eval/twenty/loss"] for x in lines if "eval/twenty/loss" in x)
    rows = json.loads((data_dir / "golden" / "logps_20.json").read_text())
    logps = np.concatenate(
        [np.array(r["logps"])[np.array(r["assistant_mask"][1:]) > 0] for r in rows]
    )
    np.testing.assert_allclose(found, -logps.mean(), rtol=1e-5)
    samples = (run.folder / "samples" / "1_twenty.jsonl").read_text().splitlines()
    assert len(samples) == 2
    first = json.loads(samples[0])
    assert first["prompt"].endswith("<|im_start|>assistant\n")
    assert "Natalia" in first["prompt"]
    assert first["expected"].endswith("<|im_end|>")


def test_a_finished_run_is_extended_and_equals_one_made_at_once(
    run_sft: Runner, tiny_model: Path
) -> None:
    """To the bit, since the fullest row is among the first: the head's budget is the same."""
    model = f"model.path={tiny_model}"
    whole = run_sft(model, "train.steps=6", devices=1)
    part = run_sft(model, "train.steps=3", devices=1)
    longer = run_sft(model, "train.steps=6", devices=1, folder=part.folder)
    for name, want in whole.weights.items():
        np.testing.assert_array_equal(longer.weights[name], want, err_msg=name)
    with pytest.raises(ConfigError, match=r"optim\.lr: the run has 0\.001, this config 0\.002"):
        run_sft(model, "train.steps=6", "optim.lr=0.002", devices=1, folder=part.folder)


def test_a_resumed_run_whose_data_have_changed_says_so(
    run_sft: Runner, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The config names a file, not what is in it: other rows under its name are other steps."""
    rows = (data_dir / "golden" / "sft.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows[:16]))
    keys = [f"data.sources.gsm8k.path={file}", f"data.cache_dir={tmp_path / 'cache'}"]
    keys.append(f"model.path={tiny_model}")
    run = run_sft(*keys, "train.steps=1", devices=1)
    file.write_text("".join(rows[8:24]))
    with pytest.raises(ValueError, match="the prepared data are not those that the run began with"):
        run_sft(*keys, "train.steps=2", devices=1, folder=run.folder)
    assert len(run.metrics) == 1


def test_init_from_starts_a_new_run_from_anothers_weights(
    run_sft: Runner, tiny_sft: list[str]
) -> None:
    first = run_sft(*tiny_sft, "train.steps=3", devices=1)
    keys = [*tiny_sft, "train.steps=2"]
    second = run_sft(*keys, f"checkpoint.init_from={first.folder}", devices=1)
    third = run_sft(*keys, f"model.path={first.folder / 'export'}", devices=1)
    np.testing.assert_array_equal(second.losses, third.losses)
    assert second.metrics[0]["loss"] < first.metrics[0]["loss"]
    assert second.metrics[0]["step"] == 1


def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    run_sft: Runner, tiny_sft: list[str], tmp_path: Path
) -> None:
    keys = [*tiny_sft, "train.steps=8", "optim.lr=1e30", "checkpoint.every=1"]
    with pytest.raises(FloatingPointError, match=r"step \d+: (loss|grad_norm) is"):
        run_sft(*keys, folder=tmp_path, devices=1)
    bad = next(x["step"] for x in Finished(0, tmp_path).metrics if isinstance(x["loss"], str))
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert all(step < bad for step in saved)


def test_mixtures_report_each_source_under_its_name(
    run_sft: Runner, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    rows = (data_dir / "golden" / "sft.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(rows[100:140]) + "\n")
    run = run_sft(
        f"model.path={tiny_model}", "train.epochs=1",
        f"data.sources.other.path={tmp_path / 'other.jsonl'}",
        "data.sources.gsm8k.limit=40", "batch.order=shuffle", devices=1,
    )  # fmt: skip
    assert len(run.metrics) == 10
    assert sum(line["examples"] for line in run.metrics) == 80
    for line in run.metrics:
        parts = [line[k] for k in ("loss/gsm8k", "loss/other") if k in line]
        assert min(parts) - 1e-6 <= line["loss"] <= max(parts) + 1e-6
    assert any("loss/other" in line for line in run.metrics)


def test_rows_longer_than_the_models_context_are_refused(run_sft: Runner) -> None:
    with pytest.raises(ConfigError, match=r"seq_len is 4096, and the model's context is 2048"):
        run_sft("train.steps=1", "data.seq_len=4096", devices=1)
