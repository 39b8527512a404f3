"""`make bench`: our own training on the bench model, against the machine and against itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.benchmarks.harness import Figure, Run, in_turns, measure, table, write
from tests.benchmarks.inputs import Inputs
from tests.benchmarks.runs import ROWS, Ours, quiet_note

pytestmark = pytest.mark.bench
STEPS = 5
SAVED_STEPS, SAVED_EVERY = 200, 50


@pytest.fixture
def ours(tmp_path: Path, inputs: Inputs) -> Ours:
    return Ours(tmp_path, inputs)


def test_a_step_against_the_machines_matmul(ours: Ours, rounds: int) -> None:
    """FLOPs by the CONVENTION of train/throughput.py: those of padding do not count."""
    found = in_turns(
        {
            "matmul": lambda: measure("tests.benchmarks.side_peak", env={"JAX_PLATFORMS": "cpu"}),
            "ours": lambda: ours.sft(STEPS),
        },
        rounds,
    )
    figures = [
        Figure(
            f"step's arithmetic, {what}",
            "GFLOP/s",
            tuple(_arithmetic(run, clock) for run in found["ours"]),
            tuple(max(_peaks(run, clock).values()) for run in found["matmul"]),
            "this machine's best float32 matmul",
            goal=goal,
        )
        for what, clock, goal in (("by the wall", "wall", 0.6), ("per CPU-second", "cpu", None))
    ]
    peaks = [_peaks(run, "wall") for run in found["matmul"]]
    rows = [[name, *(f"{peak[name]:.0f}" for peak in peaks)] for name in peaks[0]]
    waits = [_wait(run) for run in found["ours"]]
    print(table(["matmul, GFLOP/s", *(f"round {k + 1}" for k in range(rounds))], rows))
    notes = [
        f"The devices waited for data {max(waits):.2%} of the time at most (goal: under 1%).",
        quiet_note(found),
    ]
    write("step", figures, notes, peaks=peaks, data_wait=waits)
    assert max(waits) < 0.01
    assert all(figure.reached is not False for figure in figures)


def _peaks(run: Run, clock: str) -> dict[str, float]:
    """GFLOP/s of the quickest multiplication of each kind and size."""
    return {
        name: max(
            after["gflop"] / max(after[clock] - before[clock], 1e-9)
            for before, after in itertools.pairwise(marks)
        )
        if clock == "wall"  # CPU time comes in ticks too coarse for one multiplication
        else sum(mark["gflop"] for mark in marks) / (marks[-1][clock] - marks[0][clock])
        for name, marks in run.marks.items()
    }


def _arithmetic(run: Run, clock: str) -> float:
    """GFLOP/s of the steps after the first."""
    gflop = sum(1e3 * step["tflops"] * step["seconds"] for step in run.steps[1:])
    return gflop / (run.steps[-1][clock] - run.steps[0][clock])


def _wait(run: Run) -> float:
    later = run.steps[1:]
    return sum(step["data_wait"] for step in later) / sum(step["seconds"] for step in later)


def test_packed_against_padded(ours: Ours, rounds: int) -> None:
    """Rows of gsm8k, the same model and loss; one example a row, or as many as fit."""
    found = in_turns(
        {"packed": lambda: ours.sft(STEPS), "padded": lambda: ours.sft(3, batch__packing="none")},
        rounds,
    )
    packed, padded = (tuple(r.per_second("trained") for r in runs) for runs in found.values())
    name = "packed, trained tokens per CPU-second"
    figures = [Figure(name, "tok/s", packed, padded, "one example a row", goal=1.8)]
    write("packing", figures, [f"{ROWS} rows of 512 a step on both sides.", quiet_note(found)])
    assert all(figure.reached is not False for figure in figures)


def test_saving_costs_little(ours: Ours, data_dir: Path, rounds: int) -> None:
    """Whole runs of the golden model, start and end included: its steps are short, so this is
    what saving costs at its dearest."""
    keys = {"model__path": data_dir / "golden/model"}
    sides = {
        "saving": lambda: ours.sft(SAVED_STEPS, checkpoint__every=SAVED_EVERY, **keys),
        "not saving": lambda: ours.sft(SAVED_STEPS, **keys),
    }
    in_turns({"saving (compiles)": sides["saving"]}, 1)  # or the first round's first side would
    found = in_turns(sides, rounds)
    saving, none = (tuple(r.marks["end"][0]["wall"] for r in runs) for runs in found.values())
    name = f"{SAVED_STEPS} steps, saving every {SAVED_EVERY}"
    figures = [Figure(name, "s", saving, none, "saving at the end alone", goal=1.05, better="less")]
    write("saving", figures, [quiet_note(found)])
    assert all(figure.reached is not False for figure in figures)
