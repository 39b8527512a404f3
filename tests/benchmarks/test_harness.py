"""The arithmetic of the benchmarks, which nobody checks by eye: rates, ratios, tables."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.benchmarks import harness
from tests.benchmarks.clock import Clock
from tests.benchmarks.harness import Figure, Run, best_of, fill_in, in_turns, number, table
from tests.benchmarks.inputs import PROMPTS, SHAPE, write_inputs
from tests.benchmarks.runs import sampling_rate, sampling_spans, training_rate


def run_of(*steps: tuple[float, float, int]) -> Run:
    made = [{"wall": wall, "cpu": cpu, "trained": n} for wall, cpu, n in steps]
    return Run(made, {}, peak_bytes=2**30, others=0.0)


def test_a_rate_leaves_out_the_first_step_and_its_time():
    run = run_of((10.0, 12.0, 1000), (12.0, 16.0, 30), (15.0, 22.0, 60))
    assert run.per_second("trained") == pytest.approx(90 / 10)
    assert run.per_second("trained", clock="wall") == pytest.approx(90 / 5)
    assert run.per_second("trained", warm=2) == pytest.approx(60 / 6)
    assert run.first_step == 10.0


def test_a_step_of_learning_online_is_split_where_its_answers_are_there():
    """The first step is left out, with the sampling before it."""
    steps = [{"wall": t, "cpu": 2 * t, "sampled": 100} for t in (20.0, 30.0, 42.0)]
    sampled = [{"wall": t, "cpu": 2 * t} for t in (15.0, 22.0, 33.0)]
    run = Run(steps, {"sampled": sampled}, peak_bytes=0, others=0.0)
    assert sampling_spans(run, "wall") == [2.0, 3.0]
    assert sampling_rate(run) == pytest.approx(200 / 10)
    assert training_rate(run) == pytest.approx(200 / 34)
    assert run.per_second("sampled") == pytest.approx(200 / 44)


def test_the_ratio_is_the_median_of_the_rounds_own_ratios():
    """Not the ratio of medians: a round that a machine was slow in was slow for both."""
    figure = Figure("f", "tok/s", (10.0, 2.0, 30.0), (5.0, 1.0, 10.0), "peer", goal=2.0)
    assert figure.ratios == [2.0, 2.0, 3.0]
    assert figure.ratio == 2.0
    assert figure.reached is True
    cells = figure.row()
    assert cells[2:] == ["10 tok/s", "5 tok/s", "2.00 (2.00 to 3.00)", "≥ 2 reached"]


def test_a_goal_can_be_missed_either_way():
    small = Figure("f", "", (1.0,), (2.0,), "peer", goal=0.4, better="less")
    assert small.reached is False
    assert "**not reached**" in small.row()[-1]
    assert Figure("f", "", (1.0,), (2.0,), "peer", goal=0.5, better="less").reached is True
    assert Figure("f", "", (1.0,), (2.0,), "peer", goal=0.6).reached is False
    assert Figure("f", "", (1.0,), (2.0,), "peer").reached is None


def test_sides_take_turns():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}
    assert in_turns(sides, 3, say=lambda _: None) == {"A": [1, 3, 5], "B": [2, 4, 6]}
    assert calls == list("ABABAB")


def test_the_best_side_is_that_of_the_highest_median():
    assert best_of({"a": [1.0, 9.0, 2.0], "b": [3.0, 3.0, 3.0]}) == ("b", (3.0, 3.0, 3.0))


def test_numbers_and_tables():
    assert [number(x) for x in (1234.5, 100.0, 99.94, 0.12345)] == ["1,234", "100", "99.9", "0.123"]
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_results_are_written_and_the_document_filled_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    figure = Figure("rate", "tok/s", (3.0,), (1.0,), "peer", goal=2.0)
    path = harness.write("sft", [figure], ["A note."], extra={"x": 1})
    found = json.loads(path.read_text())
    assert found["figures"][0]["ratio"] == 3.0
    assert found["extra"] == {"x": 1}
    assert str(path) in capsys.readouterr().out
    before = "a\n<!-- bench:sft -->\nold\n<!-- end -->\nb\n<!-- bench:dpo -->\nkept\n<!-- end -->\n"
    after = fill_in(before, {"sft": found})
    assert "old" not in after
    assert "kept" in after
    assert "| rate | peer | 3 tok/s | 1 tok/s | 3.00 (one round) | ≥ 2 reached |" in after
    assert after.startswith("a\n<!-- bench:sft -->\nOn ")
    assert fill_in(after, {"sft": found}) == after


def test_the_document_has_a_place_for_every_result():
    text = harness.DOCUMENT.read_text(encoding="utf-8")
    files = list(Path(__file__).parent.glob("test_*.py"))
    written = {name for path in files for name in _written(path.read_text(encoding="utf-8"))}
    assert len(written) >= 5, "the search itself is broken"
    assert {name for name in written if f"<!-- bench:{name} -->" not in text} == set()


def _written(source: str) -> set[str]:
    import ast

    return {
        str(node.args[0].value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "write"
        and isinstance(node.args[0], ast.Constant)
    }


def test_the_clock_counts_this_process(tmp_path):
    clock = Clock()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    clock.step(trained=3)
    clock.write(str(tmp_path / "out.json"))
    run = Run(**json.loads((tmp_path / "out.json").read_text()))
    assert run.steps[0]["cpu"] > 0.2
    age = time.time() - os.stat(f"/proc/{os.getpid()}").st_ctime
    assert 0 < run.first_step < age + 60, "since the start of the process, not since boot"
    assert run.peak_bytes > 2**24


def test_both_sides_open_the_same_files(data_dir, tmp_path):
    inputs = write_inputs(tmp_path / "inputs", data_dir)
    weights = load_file(inputs.model / "model.safetensors")
    assert sum(w.size for w in weights.values()) == 56_369_664
    assert weights["lm_head.weight"].shape == (SHAPE["vocab_size"], SHAPE["hidden_size"])
    assert np.std(weights["model.layers.7.mlp.up_proj.weight"]) == pytest.approx(0.02, rel=0.01)
    assert len(inputs.conversations.read_text().splitlines()) == 7473
    pairs = [json.loads(line) for line in inputs.pairs.read_text().splitlines()]
    assert len(pairs) >= 24, "six steps of four pairs"
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    prompts = [json.loads(line)["prompt"] for line in inputs.prompts.read_text().splitlines()]
    assert [[said["role"] for said in prompt] for prompt in prompts] == [["user"]] * PROMPTS
