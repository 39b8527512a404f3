"""The step of a config as the analytic model takes it: of sft, preference and reward_model."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from posttrain.config import ConfigError
from posttrain.models.spec import Spec
from posttrain.plan.analytic import Step, weights_of
from posttrain.plan.assumed import plan_of_a_step
from posttrain.train.config import ReferenceSync
from posttrain.types import EXAMPLES_OF, DataKind


def step_of(
    cfg: Any, spec: Spec, *, kind: DataKind = "samples", mode: Any = None, tokens: int | None = None
) -> Step:
    """What one optimiser step of the config is, on whatever mesh.

    kind, mode: as posttrain.train.setup.run's kind and reference. tokens: of an example; None: a
    row's. ConfigError where the model's formulas leave out what the config asks.
    """
    if wrong := _left_out(cfg):
        raise ConfigError("\n    ".join(wrong))
    length = cfg.data.seq_len
    batch = cfg.batch.model_copy(update={"accumulate": 1})
    plan = plan_of_a_step(
        batch, kind, seq_len=length, tokens=min(tokens or length, length), shards=1
    )
    param_bytes, compute_bytes = (
        jnp.dtype(name).itemsize for name in (cfg.model.param_dtype, cfg.model.dtype)
    )
    reference = 0
    if "reference_logps" in cfg.loss.needs:
        reference = compute_bytes if mode == "live" else 0
    if isinstance(mode, ReferenceSync):
        reference = param_bytes
    return Step(
        spec=spec,
        weights=weights_of(spec),
        rows=plan.rows,
        length=length,
        accumulate=cfg.batch.accumulate,
        together=EXAMPLES_OF[kind],
        remat=cfg.model.remat,
        head_chunk=cfg.train.head_chunk,
        param_bytes=param_bytes,
        compute_bytes=compute_bytes,
        optimizer=cfg.optim.type,
        moment_bytes=jnp.dtype(cfg.optim.moment_dtype).itemsize,
        reference_bytes=reference,
    )


def _left_out(cfg: Any) -> list[str]:
    """What the formulas know nothing of."""
    where = "--search and --smallest reckon"
    found = []
    if getattr(cfg, "lora", None) is not None:
        found.append(f"lora: {where} with all weights trained, not with adapters")
    for name in ("trainable", "frozen"):
        if getattr(cfg.train, name):
            found.append(f"train.{name}: {where} with all weights trained")
    return found
