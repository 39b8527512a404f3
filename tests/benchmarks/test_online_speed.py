"""`make bench PEERS=trl,tunix`: a whole step of GRPO against TRL's and Tunix's, and the engine
inside `posttrain rl` against the engine alone.

A step: 64 answers, 8 prompts with 8 each, of 64 tokens (the weights are random: hardly any ends
earlier), sampled at temperature 1, judged by a regular expression, and one update of AdamW from
them. No KL and no reference on any side. All answers are equally long, which is kind to those that
pad: prompts alone are ragged.

The comparison needs PEERS=trl, and leaves Tunix out where PEERS does not name it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.harness import Figure, Run, best_of, in_turns, write
from tests.benchmarks.inputs import Inputs
from tests.benchmarks.runs import (
    ANSWERS,
    ASKED,
    NEW_TOKENS,
    ROOM,
    TRL,
    Ours,
    Tunix,
    engine_alone,
    quiet_note,
    sampling_rate,
    training_rate,
)

pytestmark = pytest.mark.bench
STEPS = 2  # the first compiles
ROUNDS = 4  # of the engine inside the loop and alone; the first compiles
PROGRAMS = ("prefill", "place", "decode")
ROW_COUNTS = {"ours, 8 rows at once": 8, "ours, 11 rows at once": 11}  # of a micro-batch
LAYOUTS = {
    "TRL, 64 answers at once": {"per_device_train_batch_size": 64},
    "TRL, 8 answers at once": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8},
}


@pytest.fixture
def ours(tmp_path: Path, inputs: Inputs) -> Ours:
    return Ours(tmp_path, inputs)


def test_a_step_of_grpo(
    trl: None, tunix: str, ours: Ours, inputs: Inputs, tmp_path: Path, rounds: int
) -> None:
    """We and TRL train in two layouts each: the quicker one of each side is compared."""
    theirs = TRL(tmp_path, inputs)
    sides = {
        name: lambda n=rows: ours.rl(STEPS, round__micro_tokens=n * ROOM)
        for name, rows in ROW_COUNTS.items()
    }
    sides |= {n: lambda a=args: theirs.grpo(STEPS, **a) for n, args in LAYOUTS.items()}
    if tunix:
        sides["Tunix"] = lambda: Tunix(tunix, inputs).grpo(STEPS)
    found = in_turns(sides, rounds)
    mine, best = (
        best_of({name: [_rate(run) for run in found[name]] for name in layouts})[0]
        for layouts in (ROW_COUNTS, LAYOUTS)
    )
    figures = []
    for peer in (best, *(["Tunix"] if tunix else [])):
        for name, unit, value, goal in (
            ("GRPO, sampled and trained tokens per CPU-second", "tok/s", _rate, 2.0),
            ("GRPO, sampling alone", "tok/s", sampling_rate, None),
            ("GRPO, training alone", "tok/s", training_rate, None),
        ):
            figures.append(Figure(name, unit, *_both(found, mine, peer, value), peer, goal=goal))
        memory = _both(found, mine, peer, _peak)
        figures.append(Figure("GRPO, peak memory", "GiB", *memory, peer, better="less"))
    notes = [
        "Tokens per CPU-second, and what a step held: "
        + "; ".join(_step_note(name, runs[0]) for name, runs in found.items())
        + ".",
        quiet_note(found),
    ]
    write("grpo", figures, notes)
    whole = ASKED * ANSWERS * NEW_TOKENS
    for name, runs in found.items():
        for step in (step for run in runs for step in run.steps):
            assert step["examples"] == ASKED * ANSWERS, (name, step)
            assert step["sampled"] >= 0.95 * whole, (name, step)
    assert all(figure.reached is not False for figure in figures)


def test_the_engine_inside_the_loop(ours: Ours, inputs: Inputs, rounds: int) -> None:
    """From a step's end until the next round may be trained on, against the engine that samples
    the same requests and does nothing else; then what its programs hold."""
    sides = {"ours": lambda: ours.rl(ROUNDS), "alone": lambda: engine_alone(inputs, ROUNDS)}
    found = in_turns(sides, rounds)
    figures = []
    for what, clock, goal in (("second", "wall", 0.8), ("CPU-second", "cpu", None)):
        inside = tuple(sampling_rate(run, clock) for run in found["ours"])
        alone = tuple(run.per_second("sampled", clock=clock) for run in found["alone"])
        name = f"sampling inside a run of `rl`, tokens per {what}"
        figures.append(Figure(name, "tok/s", inside, alone, "the engine alone", goal=goal))
    accounts = [run.marks["memory"][0] for run in found["alone"]]
    figures.append(
        Figure(
            "memory of sampling",
            "GiB",
            tuple(a["peak"] / 2**30 for a in accounts),
            tuple((a["weights"] + a["cache"]) / 2**30 for a in accounts),
            "weights and cache",
            goal=1.1,
            better="less",
        )
    )
    notes = [
        "Inside the loop counts all that is between a step's end and the next step's batch: new "
        "weights, sampling, rewards, advantages, what is written down. Memory by the compiler's "
        "account, of the largest of the engine's programs: "
        + ", ".join(f"{name} {accounts[0][name] / 2**30:.2f} GiB" for name in PROGRAMS)
        + ".",
        quiet_note(found),
    ]
    write("engine", figures, notes)
    assert all(figure.reached is not False for figure in figures)


def _rate(run: Run) -> float:
    return run.per_second("sampled")


def _peak(run: Run) -> float:
    return run.peak_bytes / 2**30


def _both(
    found: dict[str, list[Run]], mine: str, peer: str, value: Callable[[Run], float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ours and the peer's, one a round."""
    ours, theirs = (tuple(value(run) for run in found[side]) for side in (mine, peer))
    return ours, theirs


def _step_note(name: str, run: Run) -> str:
    """The same on every side, but for answers that end of themselves."""
    last = run.steps[-1]
    return (
        f"{name} {_rate(run):.0f}, {last['examples']} answers, {last['sampled']:,} tokens sampled, "
        f"{last['tokens']:,} with the prompts"
    )
