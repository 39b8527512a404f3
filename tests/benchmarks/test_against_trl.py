"""`make bench PEERS=trl`: the same weights, rows and tokenizer in TRL, in turn with ours.

A CPU-second is one of user or system time of the process. Rates leave out the first step (it
compiles, or warms up); the time to it has a figure of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.harness import Figure, Run, best_of, in_turns, write
from tests.benchmarks.inputs import Inputs
from tests.benchmarks.runs import ROWS, TRL, Ours, quiet_note

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("trl")]

PADDED = {"pad_to_multiple_of": 512}
PACKED = {"packing": True}
LAYOUTS = {
    "TRL, padded to 512": PADDED,
    "TRL, padded to the longest": {},
    "TRL, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed, row by row": PACKED
    | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS},
    "TRL, packed, rows joined": PACKED,
}
"""ROWS rows a step each. Packing by best fit: examples do not see each other, as in ours."""
STEPS, PEER_STEPS = 5, 3
PAIRS, PAIR_STEPS = 4, 6
EPOCHS = 3  # of the DPO figure


@pytest.fixture
def ours(tmp_path: Path, inputs: Inputs) -> Ours:
    return Ours(tmp_path, inputs)


@pytest.fixture
def theirs(tmp_path: Path, inputs: Inputs) -> TRL:
    return TRL(tmp_path, inputs)


def test_both_sides_train_on_the_same(ours: Ours, theirs: TRL) -> None:
    """Without this the figures below would compare nothing: tokens, trained tokens and losses."""
    mine, peers = {"batch__order": "sequential"}, {"train_sampling_strategy": "sequential"}
    _same(ours.sft(3, batch__examples=ROWS, **mine), theirs.sft(3, **peers))
    _same(ours.preference(3, PAIRS, **mine), theirs.dpo(3, PAIRS, **peers))


def _same(a: Run, b: Run) -> None:
    for one, other in zip(a.steps, b.steps, strict=True):
        assert (one["examples"], one["tokens"]) == (other["examples"], other["tokens"])
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-3)  # TRL logs four digits
    assert [step["trained"] for step in a.steps[1:]] == [step["trained"] for step in b.steps[1:]]


def test_sft(ours: Ours, theirs: TRL, rounds: int) -> None:
    sides = {
        name: lambda args=args: theirs.sft(PEER_STEPS, **args) for name, args in LAYOUTS.items()
    }
    every = in_turns({"ours": lambda: ours.sft(STEPS), **sides}, 1)
    padded, *rest = LAYOUTS
    best, _ = best_of({name: [_rate(run) for run in every[name]] for name in rest})
    chosen = {name: sides[name] for name in (padded, best)}
    found = in_turns({"ours": lambda: ours.sft(STEPS), **chosen}, rounds)
    figures = []
    for name, goal in ((padded, 3.0), (best, 1.5)):
        figures += [
            _figure("SFT, trained tokens per CPU-second", found, name, _rate, goal=goal),
            _figure("SFT, trained tokens per second", found, name, _wall_rate),
            _figure("SFT, peak memory (GiB)", found, name, _peak, goal=0.5, better="less"),
        ]
    notes = [
        "TRL's layouts, trained tokens per CPU-second and peak memory in one run each: "
        + "; ".join(f"{n} {_rate(every[n][0]):.0f}, {_peak(every[n][0]):.1f} GiB" for n in LAYOUTS),
        _examples_note(found),
        quiet_note(found),
    ]
    write("sft", figures, notes)
    assert all(figure.reached is not False for figure in figures)


def test_start(ours: Ours, theirs: TRL, rounds: int) -> None:
    """The first step's update is made: with no cache of any kind, then with what that left.

    Eight examples a step on every side: a packed step of eight rows would be twice the work.
    """

    def start(side: Ours | TRL, forget: bool, **args: Any) -> Run:
        if forget:
            side.forget()
        return side.sft(1, **args)

    same = {"batch__examples": ROWS, "batch__order": "sequential"}
    peer_order = {"train_sampling_strategy": "sequential"}

    padded, longest, *_ = LAYOUTS
    figures, runs = [], {}
    for state, forget in (("cold", True), ("warm", False)):
        found = in_turns(
            {
                "ours": lambda forget=forget: start(ours, forget, **same),
                padded: lambda forget=forget: start(theirs, forget, **PADDED, **peer_order),
                longest: lambda forget=forget: start(theirs, forget, **peer_order),
            },
            rounds,
        )
        for name, goal in ((padded, 0.5), (longest, None)):
            figures.append(
                _figure(
                    f"start to the first step made, {state} (s)",
                    found,
                    name,
                    lambda run: run.first_step,
                    goal=goal,
                    better="less",
                )
            )
        runs |= {f"{state} {name}": of for name, of in found.items()}
    notes = [
        "Cold: nothing prepared, no compiled programs kept. Warm: both as the run before left "
        "them. The first step is part of the time: the same eight examples on every side.",
        quiet_note(runs),
    ]
    write("start", figures, notes)
    assert all(figure.reached is not False for figure in figures)


def test_dpo(ours: Ours, theirs: TRL, rounds: int) -> None:
    def mine() -> Run:
        ours.forget(compiled=False)  # the reference's pass is part of the measure
        return ours.preference(PAIR_STEPS, PAIRS)

    def peers() -> Run:
        theirs.forget()
        return theirs.dpo(PAIR_STEPS, PAIRS)

    name = "TRL, precompute_ref_log_probs"
    in_turns({"ours (compiles)": mine}, 1)
    found = in_turns({"ours": mine, name: peers}, rounds)
    figures = [
        _figure(f"DPO, pairs per CPU-second over {EPOCHS} epochs", found, name, _pairs, goal=2.0),
        _figure("DPO, training steps alone", found, name, lambda run: run.per_second("examples")),
        _figure("DPO, reference pass alone", found, name, _reference),
        _figure("DPO, peak memory (GiB)", found, name, _peak, goal=0.5, better="less"),
    ]
    notes = [
        f"{EPOCHS} epochs: one reference pass and {EPOCHS} times the steps, each at the rate "
        f"measured in {PAIR_STEPS} steps of {PAIRS} pairs. Our pass includes the tracing of its "
        "program; TRL's leaves out its first batch.",
        quiet_note(found),
    ]
    write("dpo", figures, notes)
    assert all(figure.reached is not False for figure in figures)


def _rate(run: Run) -> float:
    return run.per_second("trained")


def _wall_rate(run: Run) -> float:
    return run.per_second("trained", clock="wall")


def _peak(run: Run) -> float:
    return run.peak_bytes / 2**30


def _reference(run: Run) -> float:
    """Pairs per CPU-second of the pass before training.

    TRL's first batch is left out. Ours is the whole pass, tracing included: its batches do not
    depend on each other and overlap, so that none can be timed for itself.
    """
    marks = run.marks["reference"]
    seconds = marks[-1]["cpu"] - marks[0]["cpu"]
    if "pairs" in marks[0]:
        return sum(mark["pairs"] for mark in marks[1:]) / seconds
    return PAIRS * PAIR_STEPS / seconds


def _pairs(run: Run) -> float:
    """Pairs per CPU-second of EPOCHS epochs and one reference pass."""
    return EPOCHS / (1 / _reference(run) + EPOCHS / run.per_second("examples"))


def _figure(
    name: str,
    found: dict[str, list[Run]],
    peer: str,
    value: Callable[[Run], float],
    **options: Any,
) -> Figure:
    """A figure of ours against `peer`; a unit in brackets ends the name."""
    mine, other = (tuple(value(run) for run in found[side]) for side in ("ours", peer))
    what, _, unit = name.partition(" (")
    return Figure(what, unit.rstrip(")"), mine, other, peer, **options)


def _examples_note(found: dict[str, list[Run]]) -> str:
    mean = {
        name: statistics.mean(step["examples"] for run in runs for step in run.steps)
        for name, runs in found.items()
    }
    return "Examples a step: " + ", ".join(f"{name} {n:.1f}" for name, n in mean.items()) + "."
