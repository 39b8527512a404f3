"""The decoder: embedding, stacked layers under scans, final norm, vocabulary head's kernel.

Shape suffixes: B rows, T positions, D embed, V vocabulary rows, L layers of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from posttrain.models.adapters import with_new_columns, with_new_rows
from posttrain.models.attention import ATTENTION
from posttrain.models.dropout import Dropout, set_dropout
from posttrain.models.embedding import look_up
from posttrain.models.head import soft_cap
from posttrain.models.layers import (
    ROWS,
    Attend,
    Compute,
    Layer,
    Ropes,
    make_norm,
    make_param,
    rms_norm,
    rope_tables,
    segment_attend,
)
from posttrain.models.moe import EXPERTS
from posttrain.models.score import segment_scores, token_values
from posttrain.models.spec import ModelConfig, Spec, Stack
from posttrain.sharding import constrain, named_sharding
from posttrain.types import Routing

_POLICIES = jax.checkpoint_policies
_INPUT = "layer_input"  # what remat knows a layer's input by


def _and(policy: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """What `policy` keeps, and what has one of these names."""
    return _POLICIES.save_from_both_policies(policy, _POLICIES.save_only_these_names(*names))


def _with_attention(policy: Callable[..., Any]) -> Callable[..., Any]:
    """What `policy` keeps, and the results of attention."""
    named = _and(policy, ATTENTION)

    def keep(primitive: Any, *args: Any, **params: Any) -> Any:
        # cudnn's kernel gives no name to what its backward pass reads
        kernel = primitive.name.startswith("dot_product_attention_fwd")
        return kernel or named(primitive, *args, **params)

    return keep


# What the backward pass keeps of each layer; the rest is computed again. With no policy at all a
# scan would keep every intermediate, and a copy of each weight, gathered. The products of experts
# are matmuls that no policy of jax's knows as such.
_WEIGHT_MATMULS = _and(_POLICIES.dots_with_no_batch_dims_saveable, EXPERTS)
REMAT: dict[str, Callable[..., Any]] = {
    "none": _with_attention(_WEIGHT_MATMULS),
    "full": _POLICIES.nothing_saveable,
    "attention": _with_attention(_POLICIES.nothing_saveable),
    "dots": _WEIGHT_MATMULS,
    "dots_batch": _and(_POLICIES.dots_saveable, EXPERTS),
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Transformer(nnx.Module):
    """A decoder. Parameters: embedding [V, D], layers/<stack>/* [L, ...] (spec.stacks),
    final_norm [D] and, where the head is not tied, head [D, V]; of a reward model or a critic
    score [D, 1]."""

    def __init__(self, spec: Spec, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.compute = spec, compute
        dtype, std = compute.param_dtype, spec.init_std
        shape = (spec.vocab_rows, spec.embed)
        self.embedding = make_param(rngs, shape, ("vocab", "embed"), dtype, std)
        self.layers = nnx.Dict(
            {name: Layer(spec, stack, compute, rngs) for name, stack in spec.stacks.items()}
        )
        self.final_norm = make_norm(rngs, spec, (spec.embed,), ("norm",), compute)
        if spec.head != "lm":
            self.score = make_param(rngs, (spec.embed, 1), ("norm", "norm"), dtype, std)
        elif not spec.tied:
            self.head = make_param(rngs, shape[::-1], ("embed", "vocab"), dtype, std)

    def embed(self, tokens_BT: jax.Array, *, gathered: bool = False) -> jax.Array:
        """Embedded tokens [B, T, D], scaled, in the compute dtype; gathered as in look_up."""
        x = look_up(self.embedding[...], tokens_BT, self.compute.dtype, gathered=gathered)
        x = with_new_rows(self, tokens_BT, x)
        if self.spec.embed_scale != 1:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        return constrain(x, ROWS)

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """What the head reads: [B, T, D] after the final norm, in the compute dtype.

        positions restart in each segment; a segment sees itself alone; 0 is padding.
        """
        return self.routed(tokens_BT, positions_BT, segment_ids_BT)[0]

    def routed(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """hidden, and what the routers of the layers that are mixtures did; None: there are none.

        The Routing has a leading dim, those layers in the order of spec.stacks. dropout: of what
        adapters read, in training.
        """
        ropes = rope_tables(self.spec, positions_BT)
        attend = segment_attend(self.spec, segment_ids_BT, self.compute.attention)
        x, found = self.embed(tokens_BT), []
        for group in self.spec.groups:
            x, routings = self._scan(group, x, ropes, attend, segment_ids_BT > 0, dropout)
            found += [routing for routing in routings if routing is not None]
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found) if found else None
        return self.normed(constrain(x, ROWS)), routing

    def _scan(
        self, group: tuple[Stack, ...], x_BTD: jax.Array, ropes: Ropes, attend: Attend,
        real_BT: jax.Array, dropout: Dropout | None,
    ) -> tuple[jax.Array, list[Routing | None]]:  # fmt: skip
        """The layers of a group: each step of the scan is one period, each layer its own remat.

        Gives the Routing of each stack too, [L, ...].
        """
        split = [nnx.split(self.layers[stack.name]) for stack in group]
        # XLA inlines a loop of one step, and could then keep what remat means to drop
        once = len(group[0].layers) == 1

        def period(x: jax.Array, layers: Any) -> tuple[jax.Array, list[Routing | None]]:
            routings = []
            for (graph, _), (layer, number) in zip(split, layers, strict=True):

                def run(x: jax.Array, layer: nnx.State, number: Any, graph: Any = graph) -> Any:
                    module = nnx.merge(graph, layer)
                    if dropout is not None:
                        set_dropout(module, dropout, number)
                    return module(checkpoint_name(x, _INPUT), ropes, attend, real_BT)

                policy = REMAT[self.compute.remat]
                x, routing = jax.checkpoint(run, policy=policy, prevent_cse=once)(x, layer, number)
                routings.append(routing)
            return x, routings

        numbers = [jnp.array(stack.layers) for stack in group]
        layers = tuple((s, n) for (_, s), n in zip(split, numbers, strict=True))
        return jax.lax.scan(period, x_BTD, layers)

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return rms_norm(x_BTD, self.final_norm, self.spec)

    def scores(self, hidden_BTD: jax.Array, segment_ids_BT: jax.Array, segments: int) -> jax.Array:
        """A reward model's value of each segment, float32 [B, S]; 0 where there is none."""
        return segment_scores(hidden_BTD, self.score[...], segment_ids_BT, segments)

    def values(self, hidden_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """A critic's value of what comes from each token on, float32 [B, T]."""
        return token_values(hidden_BTD, self.score[...], segment_ids_BT)

    def head_kernel(self) -> jax.Array:
        """[D, V] in the weights' dtype; the embedding transposed where the head is tied."""
        kernel = self.embedding[...].T if self.spec.tied else self.head[...]
        return with_new_columns(self, kernel)

    def logits(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """All logits, float32 [B, T, vocab_size]: for tests and small inputs alone."""
        x = self.hidden(tokens_BT, positions_BT, segment_ids_BT)
        kernel = self.head_kernel()[:, : self.spec.vocab_size].astype(self.compute.dtype)
        logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.spec.final_softcap)


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
