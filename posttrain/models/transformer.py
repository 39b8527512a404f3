"""The decoder: embedding, stacked layers under one scan, final norm, vocabulary head's kernel.

Shape suffixes: B rows, T positions, D embed, V vocabulary rows, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.models.attention import ATTENTION
from posttrain.models.embedding import look_up
from posttrain.models.layers import (
    Compute,
    Layer,
    make_param,
    rms_norm,
    rope_angles,
    segment_attend,
)
from posttrain.models.spec import ModelConfig, Spec
from posttrain.sharding import constrain, named_sharding

_POLICIES = jax.checkpoint_policies
_MATMULS = _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(ATTENTION)
)


def _matmuls_and_attention(primitive: Any, *args: Any, **params: Any) -> Any:
    # cudnn's kernel gives no name to what its backward pass reads
    kernel = primitive.name.startswith("dot_product_attention_fwd")
    return kernel or _MATMULS(primitive, *args, **params)


# What the backward pass keeps of each layer; the rest is computed again. With no policy at all a
# scan would keep every intermediate, and a copy of each weight, gathered.
REMAT: dict[str, Callable[..., Any]] = {
    "none": _matmuls_and_attention,
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "dots_batch": _POLICIES.dots_saveable,
}


class Transformer(nnx.Module):
    """A dense decoder (Llama, Qwen). Parameters: embedding [V, D], layers.* [L, ...],
    final_norm [D] and, where the head is not tied, head [D, V]."""

    def __init__(self, spec: Spec, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.compute = spec, compute
        dtype, std = compute.param_dtype, spec.init_std
        shape = (spec.vocab_rows, spec.embed)
        self.embedding = make_param(rngs, shape, ("vocab", "embed"), dtype, std)
        self.layers = Layer(spec, compute, rngs)
        self.final_norm = make_param(rngs, (spec.embed,), ("norm",), dtype, None)
        if not spec.tied:
            self.head = make_param(rngs, shape[::-1], ("embed", "vocab"), dtype, std)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embedded tokens [B, T, D] in the compute dtype."""
        x = look_up(self.embedding[...], tokens_BT, self.compute.dtype)
        return constrain(x, ("batch", None, None))

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """What the head reads: [B, T, D] after the final norm, in the compute dtype.

        positions restart in each segment; a segment sees itself alone; 0 is padding.
        """
        rope = rope_angles(self.spec, positions_BT)
        attend = segment_attend(segment_ids_BT, self.compute.attention)
        graph, stacked = nnx.split(self.layers)

        def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x, rope, attend), None

        policy = REMAT[self.compute.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(body, self.embed(tokens_BT), stacked)
        return self.normed(constrain(x, ("batch", None, None)))

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return rms_norm(x_BTD, self.final_norm, self.spec.rms_eps)

    def head_kernel(self) -> jax.Array:
        """[D, V] in the weights' dtype; the embedding transposed where the head is tied."""
        return self.embedding[...].T if self.spec.tied else self.head[...]

    def logits(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """All logits, float32 [B, T, vocab_size]: for tests and small inputs alone."""
        x = self.hidden(tokens_BT, positions_BT, segment_ids_BT)
        kernel = self.head_kernel()[:, : self.spec.vocab_size].astype(self.compute.dtype)
        return jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)


def compute_of(cfg: ModelConfig) -> Compute:
    """The static part of a model from its config."""
    return Compute(jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype), cfg.remat, cfg.attention)


def abstract_model(
    spec: Spec, compute: Compute, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and state of shapes, dtypes and shardings; nothing is allocated."""
    graph, state = jax.eval_shape(lambda: nnx.split(Transformer(spec, compute, nnx.Rngs(0))))

    def place(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        sharding = named_sharding(mesh, param.get_metadata("out_sharding"), value.shape)
        return param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return graph, jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def random_model(
    spec: Spec, compute: Compute, mesh: jax.sharding.Mesh, seed: int
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and random weights, born sharded; the same values on every mesh."""
    graph, abstract = abstract_model(spec, compute, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def make(key: jax.Array) -> nnx.State:
        return nnx.split(Transformer(spec, compute, nnx.Rngs(key)))[1]

    return graph, jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
