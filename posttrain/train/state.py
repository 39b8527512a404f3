"""The state of training: parameters, optimiser state, the number of updates made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain import optim, sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """params: those that are trained, a nested dict of arrays (see train/trainable.py).

    reference: likewise, of a reference that follows them (see train/sync.py); critic: the state of
    a critic, which is trained beside them by a step of its own. None: there is none.
    """

    step: jax.Array  # int32 scalar: updates made
    params: Any
    opt_state: Any
    reference: Any = None
    critic: TrainState | None = None


def new_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state on the mesh that the parameters lie on."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = jax.jit(lambda: jnp.int32(0), out_shardings=sharding.replicated(mesh))()
    return TrainState(step, params, optim.init_state(tx, params))


def new_abstract_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The same of abstract parameters: shapes, dtypes and shardings; nothing is allocated."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, params, optim.abstract_state(tx, params))


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a state or of parameters: what is restored to."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
