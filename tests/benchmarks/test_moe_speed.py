"""`make bench`: a mixture of experts against the dense MLP that does the same arithmetic."""

from __future__ import annotations

import pytest

from tests.benchmarks.harness import Figure, in_turns, measure, write
from tests.benchmarks.runs import quiet_note
from tests.benchmarks.side_moe import CHOSEN, EMBED, EXPERTS, TOKENS, WIDTH

pytestmark = pytest.mark.bench


def test_a_mixture_against_the_dense_mlp_of_its_active_size(rounds: int) -> None:
    """Forward and backward; the router, the sorting and the uneven groups are the difference."""
    env = {"JAX_PLATFORMS": "cpu"}
    sides = ("mixture", "dense", "ragged")
    found = in_turns(
        {s: lambda s=s: measure("tests.benchmarks.side_moe", s, env=env) for s in sides}, rounds
    )

    def seconds(side: str) -> tuple[float, ...]:
        return tuple(1 / run.per_second("tokens", clock="wall") * TOKENS for run in found[side])

    dense = f"dense MLP of width {CHOSEN * WIDTH}"
    figures = [
        Figure("mixture, as it runs here", "s", seconds("mixture"), seconds("dense"), dense,
               goal=2.0, better="less"),
        Figure("mixture, by ragged_dot", "s", seconds("ragged"), seconds("dense"), dense,
               better="less"),
    ]  # fmt: skip
    notes = [
        f"{EXPERTS} experts of width {WIDTH}, {CHOSEN} a token, {TOKENS:,} tokens of {EMBED}.",
        quiet_note(found),
    ]
    write("moe", figures, notes)
    assert all(figure.reached is not False for figure in figures)
