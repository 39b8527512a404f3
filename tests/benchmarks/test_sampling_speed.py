"""`make bench`: the sampling engine against transformers' generate, and a shared prompt read once.

Both sides answer the same requests of ragged lengths (side_sampling.py). generate takes a batch at
a time and goes on until its longest answer is done; here a slot is filled anew as soon as its
answer ends.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.harness import Figure, Run, in_turns, measure, write
from tests.benchmarks.inputs import Inputs
from tests.benchmarks.runs import quiet_note
from tests.benchmarks.side_sampling import GROUP, PROMPT

pytestmark = pytest.mark.bench
GOALS = {
    ("golden model", 8): 4.0,
    ("golden model", 64): 10.0,
    ("bench model", 8): 1.5,
    ("bench model", 64): 2.5,
}


def side(name: str, model: Path, batch: int = GROUP) -> Run:
    settings = json.dumps({"side": name, "model": str(model), "batch": batch})
    return measure("tests.benchmarks.side_sampling", settings, env={"JAX_PLATFORMS": "cpu"})


def test_tokens_per_second(trl: None, inputs: Inputs, data_dir: Path, rounds: int) -> None:
    """transformers comes with the parity environment, as TRL does."""
    models = {"golden model": data_dir / "golden/model", "bench model": inputs.model}
    figures, everything = [], []
    for (model, batch), goal in GOALS.items():
        found = in_turns(
            {
                name: lambda n=name, m=model, b=batch: side(n, models[m], b)
                for name in ("ours", "transformers")
            },
            rounds,
        )
        everything += [run for runs in found.values() for run in runs]
        for what, clock, wanted in (("second", "wall", goal), ("CPU-second", "cpu", None)):
            ours, theirs = (
                tuple(run.per_second("tokens", clock=clock) for run in found[name])
                for name in ("ours", "transformers")
            )
            name = f"{model}, {batch} at once, tokens per {what}"
            figures.append(Figure(name, "tok/s", ours, theirs, "transformers", goal=wanted))
    write("sampling", figures, [quiet_note({"all": everything})])
    assert all(figure.reached is not False for figure in figures)


def test_a_shared_prompt_is_read_once(inputs: Inputs, rounds: int) -> None:
    """A prompt of PROMPT tokens with GROUP answers against as many prompts; one token each."""
    found = in_turns({"both": lambda: side("prefill", inputs.model)}, rounds)

    def seconds(run: Run, name: str, since: list[dict[str, float]]) -> float:
        """By the wall, from each of these marks to the next called `name`."""
        pairs = zip(since, run.marks[name][1:], strict=False)  # the first compiled the programs
        return sum(mark["wall"] - start["wall"] for start, mark in pairs)

    group = tuple(seconds(run, "group", run.marks["apart"]) for run in found["both"])
    apart = tuple(seconds(run, "apart", run.marks["group"][1:]) for run in found["both"])
    name = f"prefill of {GROUP} answers to one prompt of {PROMPT} tokens"
    figures = [Figure(name, "s", group, apart, f"{GROUP} prompts", goal=1 / 3, better="less")]
    write("prefill", figures, [quiet_note(found)])
    assert all(figure.reached is not False for figure in figures)
