"""Frozen matrices in 8 or 4 bits, as qwix's arrays (the extra posttrain[qlora]).

A quantised weight is codes [L, in.., out..] and a float32 scale for every block of the last input
dim (QLoRA, Dettmers et al. 2023, section 3): int8 is round(w / scale), nf4 the nearest of the 16
quantiles of its appendix E. It is made dense layer by layer, where it is multiplied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from posttrain.config import ConfigError
from posttrain.models.keys import key_of
from posttrain.sharding import named_sharding

BLOCK = 64
"""Weights that share a scale, as in QLoRA; fewer where the dim is no multiple of it."""


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            "lora.quantize: qwix is not installed: pip install 'posttrain[qlora]'"
        ) from error
    return qwix


def is_quantized(value: Any) -> bool:
    """Whether a parameter's value is a quantised array."""
    return hasattr(value, "qvalue")


def dense(value: Any, dtype: Any) -> jax.Array:
    """A quantised weight's values, worked out in float32, in `dtype`; others as they are."""
    return _qwix().dequantize(value).astype(dtype) if is_quantized(value) else value


def quantize(path: str, w: jax.Array, axes: tuple[str, ...], kind: str) -> Any:
    """The weight at a path as a quantised array, laid on the mesh as it lay; w is given up.

    w: [L, in.., out..], axes its logical ones. kind: int8 or nf4. Of a shape, shapes are given.
    """
    qwix, last = _qwix(), key_of(path).in_dims - 1  # of a layer's weight, the last input dim
    block = max(n for n in range(1, BLOCK + 1) if w.shape[last + 1] % n == 0)

    def one(w: jax.Array) -> Any:
        return qwix.quantize(
            w.astype(jnp.float32),
            "nf4" if kind == "nf4" else jnp.int8,
            channelwise_axes=[dim for dim in range(w.ndim) if dim != last],
            tiled_axes={last: block},
        )

    def make(w: jax.Array) -> Any:  # one layer after another: the search for codes needs room
        return jax.lax.map(one, w)

    shapes = jax.eval_shape(make, w)
    assert isinstance(w.sharding, NamedSharding)
    mesh = w.sharding.mesh
    assert isinstance(mesh, Mesh)
    layout = jax.tree.map(lambda x: named_sharding(mesh, axes, x.shape), shapes)
    if isinstance(w, jax.ShapeDtypeStruct):

        def place(x: Any, at: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

        return jax.tree.map(place, shapes, layout)
    made = jax.jit(make, out_shardings=layout)(w)
    w.delete()
    return made
