"""`posttrain plan CONFIG --search` and `--smallest`, of jobs with one train step: sft, preference,
reward_model.

What compiles a config for a slice is handed in (jobs/plan.py caches it); layouts are tried as the
user's own config with their keys over it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from posttrain import sharding
from posttrain.plan.compiled import Compiled
from posttrain.plan.overflow import Overflow, sentence
from posttrain.plan.reckoned import step_of
from posttrain.plan.search import Layout, Result, as_json, overlay, search, smallest, table
from posttrain.plan.topology import Slice
from posttrain.sharding import MeshConfig
from posttrain.train.model import open_abstract

CompileConfig = Callable[[Any, Slice], Compiled | Overflow]
"""A config's train step, compiled for the slices."""
WithKeys = Callable[[Sequence[str]], Any]
"""key.path=value ... -> the user's config with them over it."""


def step(cfg: Any, setup: Mapping[str, Any], tokens: int | None) -> Any:
    """The step of a config. setup: as posttrain.train.setup.run takes it; tokens: of an example."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    with jax.set_mesh(mesh):
        model = open_abstract(cfg, mesh, head=setup.get("head", "lm"), new_head=True)
    kind, mode = setup.get("kind", "samples"), setup.get("reference")
    return step_of(cfg, model.spec, kind=kind, mode=mode, tokens=tokens)


def result_of(found: Compiled | Overflow, layout: Layout) -> Result:
    """What the search has to know of a compiled program, or of one that does not fit."""
    if isinstance(found, Overflow):
        message = sentence(found, remat=layout.step.remat)
        return Result(False, None, None, None, None, message)
    wire: dict[str, float] = {}
    for each in found.collectives:
        wire[each.kind] = wire.get(each.kind, 0.0) + each.total
    times = (found.times.compute, found.times.hbm, found.times.network)
    return Result(True, found.memory.peak, found.flops, wire, times)


def run_search(
    cfg: Any,
    one: Slice,
    setup: Mapping[str, Any],
    *,
    with_keys: WithKeys,
    compile: CompileConfig,
    command: str,
    tokens: int | None = None,
    overlay_file: Path | None = None,
    json_file: Path | None = None,
) -> list[str]:
    """Lines to the user; the winner's overlay and the search's figures in files, where asked."""

    def compiled(layout: Layout) -> Result:
        return result_of(compile(with_keys(layout.overrides), one), layout)

    outcome = search(step(cfg, setup, tokens), one, compiled)
    lines = table(outcome, one)
    if json_file is not None:
        text = json.dumps(as_json(outcome, one), indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
        lines.append(f"written: {json_file}")
    if outcome.winner is not None:
        text = overlay(outcome.winner, command)
        if overlay_file is None:
            lines += ["", text.rstrip()]
        else:
            overlay_file.write_text(text, encoding="utf-8")
            lines.append(f"written: {overlay_file}, to lay over the config")
    return lines


def run_smallest(
    cfg: Any,
    like: Slice,
    setup: Mapping[str, Any],
    *,
    with_keys: WithKeys,
    compile: CompileConfig,
    tokens: int | None = None,
) -> tuple[Slice | None, list[str]]:
    """(the smallest slice of the generation that the step fits, lines to the user)."""

    def compiled(one: Slice, layout: Layout) -> Result:
        return result_of(compile(with_keys(layout.overrides), one), layout)

    found, said = smallest(step(cfg, setup, tokens), like, compiled)
    lines = [f"{one.name}: {why}" for one, why in said]
    if found is None:
        lines.append(f"no slice of {like.chip.name} fits")
    else:
        lines.append(f"the smallest slice: {found.name} ({found.chips} chips)")
    return found, lines
