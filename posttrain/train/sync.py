"""A reference that follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv:2404.09656).

After every update whose number is a multiple of `every`:

    reference <- mixup * policy + (1 - mixup) * reference

The reference stands in the state then, in the parameters' own dtype: small shares of it would be
lost in a smaller one, and a run goes on with the reference that it had. Of a model that is trained
in part, the part alone: of what is frozen there is one copy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.train.config import ReferenceSync
from posttrain.train.state import TrainState


def with_reference(state: TrainState) -> TrainState:
    """The state with a copy of its parameters as the first reference."""
    layout = jax.tree.map(lambda p: p.sharding, state.params)
    copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=layout)
    return dataclasses.replace(state, reference=copy(state.params))


def mixed(reference: Any, params: Any, step: jax.Array, cfg: ReferenceSync) -> Any:
    """The reference after update number `step`, which made these parameters."""

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        old_32, new_32 = old.astype(jnp.float32), new.astype(jnp.float32)
        return (cfg.mixup * new_32 + (1 - cfg.mixup) * old_32).astype(old.dtype)

    def follow(reference: Any, params: Any) -> Any:
        return jax.tree.map(mix, reference, params)

    return jax.lax.cond(step % cfg.every == 0, follow, lambda r, _: r, reference, params)
