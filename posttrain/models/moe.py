"""Mixture of experts: each token through the `chosen` experts its router finds best; none dropped.

    p = softmax(x W_r)    y = sum over the chosen e of w_e down_e(silu(gate_e(x)) * up_e(x))

w_e is p_e, over the sum of the chosen p's where the family normalises (Mixtral, arXiv:2401.04088,
section 2.1: a softmax of the chosen logits alone is the same; Qwen3-MoE), or as it is (OLMoE,
arXiv:2409.02060, section 2). The router's logits are float32 products of the compute dtype's
numbers.

On a mesh the tokens come to the experts: within `expert` every device gets all tokens of its group
(one all-gather), does those of its own experts, and the sums go back (one reduce-scatter). Expert
weights, most of such a model, are then gathered over `fsdp` alone, a part 1 / expert of them. An
exchange of each expert's tokens alone would move less (experts / chosen at the most), but no shape
is known before the router has spoken, and a fixed room for them would drop tokens.

Shape suffixes: B rows, T positions, D embed, E experts, F an expert's width, N tokens, C chosen
experts of a token, R = N * C rows by expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from posttrain.models.grouped_matmul import grouped_matmul
from posttrain.sharding import (
    all_gather,
    axes_of,
    batch_shards,
    partition_spec,
    reduce_scatter,
)
from posttrain.types import Routing

EXPERTS = "experts"  # what remat knows the results of the experts' products by

# Logical dims of the weights of one layer.
ROUTER_AXES = ("embed", "norm")
IN_AXES = ("experts", "embed", "mlp")  # gate and up
OUT_AXES = ("experts", "mlp", "embed")  # down


@dataclass(frozen=True)
class _Axes:
    """The mesh axes that each thing is cut along; () where it is whole."""

    tokens: tuple[str, ...] = ()  # rows and positions
    experts: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of all weights
    mlp: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return self.experts + self.embed + self.mlp


def moe_mlp(
    x_BTD: jax.Array,
    real_BT: jax.Array,
    router_DE: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    chosen: int,
    normalised: bool,
) -> tuple[jax.Array, Routing]:
    """([B, T, D] in x's dtype, what the router did with the tokens that are real).

    Weights are in x's dtype, laid out as ROUTER_AXES, IN_AXES and OUT_AXES say, not gathered.
    real_BT: bool, False on padding, which is computed and not counted.
    """
    local = functools.partial(_local, chosen=chosen, normalised=normalised)
    weights = (router_DE, gate_EDF, up_EDF, down_EFD)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x_BTD.shape[0] % batch_shards(mesh):
        return local(x_BTD, real_BT, *weights, axes=_Axes())
    rows = partition_spec(("batch", "length"), x_BTD.shape[:2], mesh)
    inner = partition_spec(IN_AXES, gate_EDF.shape, mesh)
    outer = partition_spec(OUT_AXES, down_EFD.shape, mesh)
    axes = _Axes(axes_of(rows[0]) + axes_of(rows[1]), *map(axes_of, inner))
    mapped = jax.shard_map(
        functools.partial(local, axes=axes),
        mesh=mesh,
        in_specs=(rows, rows, P(inner[1]), inner, inner, outer),
        out_specs=(rows, P()),
    )
    return mapped(x_BTD, real_BT, *weights)


def _local(
    x_BTD: Any, real_BT: Any, router: Any, gate: Any, up: Any, down: Any, *,
    chosen: int, normalised: bool, axes: _Axes,
) -> tuple[jax.Array, Routing]:  # fmt: skip
    """One device's rows, by its shards of the weights."""
    x = x_BTD.reshape(-1, x_BTD.shape[-1])
    router = all_gather(router, axes.embed, 0)
    weights, ids, routing = route(x, real_BT.reshape(-1), router, chosen, normalised)
    if axes.tokens:
        routing = jax.tree.map(lambda s: jax.lax.psum(s, axes.tokens), routing)
    first = 0
    gathered = (x, weights, ids)
    if axes.experts:
        first = jax.lax.axis_index(axes.experts) * gate.shape[0]
        gathered = tuple(all_gather(a, axes.experts, 0) for a in gathered)
    gate, up = (all_gather(w, axes.embed, 1) for w in (gate, up))
    down = all_gather(down, axes.embed, 2)
    # From here on all vary over all axes: of what is the same on several devices, the gradients
    # are summed over them.
    x, weights, ids = (_vary(a, axes.weights, axes.tokens) for a in gathered)
    gate, up, down = (_vary(w, axes.tokens, axes.weights) for w in (gate, up, down))
    y = _experts(x, weights, ids, gate, up, down, first)
    if axes.mlp:
        y = jax.lax.psum(y, axes.mlp)
    y = reduce_scatter(y, axes.experts, 0)
    return y.reshape(x_BTD.shape), routing


def _vary(a: jax.Array, over: tuple[str, ...], already: tuple[str, ...]) -> jax.Array:
    more = tuple(axis for axis in over if axis not in already)
    return jax.lax.pcast(a, more, to="varying") if more else a


def route(
    x_ND: jax.Array, real_N: jax.Array, router_DE: jax.Array, chosen: int, normalised: bool
) -> tuple[jax.Array, jax.Array, Routing]:
    """(weights float32 [N, C], expert ids int32 [N, C], sums over the real tokens)."""
    logits = jnp.einsum("nd,de->ne", x_ND, router_DE, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    logp = logits - lse[:, None]
    p = jnp.exp(logp)
    weights, ids = jax.lax.top_k(p, chosen)
    if normalised:
        weights = weights / weights.sum(-1, keepdims=True)
    real = real_N.astype(jnp.float32)
    picked = (ids[:, :, None] == jnp.arange(p.shape[1])).sum(1).astype(jnp.float32)
    entropy = jax.lax.stop_gradient(-(p * logp).sum(-1))
    routing = Routing(
        chosen=real @ picked,
        probs=real @ p,
        z=(lse**2 * real).sum(),
        entropy=(entropy * real).sum(),
        tokens=real.sum(),
    )
    return weights, ids, routing


def _experts(
    x_ND: Any, weights_NC: Any, ids_NC: Any, gate: Any, up: Any, down: Any, first: Any
) -> jax.Array:
    """The part of y that experts first .. first + len(gate) give."""
    experts = gate.shape[0]
    own = ids_NC.reshape(-1) - first
    own = jnp.where((own >= 0) & (own < experts), own, experts)  # others' rows come last
    order = jnp.argsort(own)
    inverse = jnp.argsort(order)
    sizes = (own[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)

    def product(rows: jax.Array, w: jax.Array) -> jax.Array:
        return checkpoint_name(grouped_matmul(rows, w, sizes), EXPERTS)

    rows = _by_expert(x_ND, order, inverse)
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    out_NCD = _by_token(product(hidden, down), order, inverse).reshape(*ids_NC.shape, -1)
    y = jnp.einsum("ncd,nc->nd", out_NCD, weights_NC, preferred_element_type=jnp.float32)
    return y.astype(x_ND.dtype)


# Two gathers that are each other's transpose: left to jax, either's gradient would be a scatter.


@jax.custom_vjp
def _by_expert(x_ND: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Each token's row once for each of its experts, in the experts' order: [R, D]."""
    return x_ND[order_R // (order_R.size // x_ND.shape[0])]


def _by_expert_fwd(x: Any, order: Any, inverse: Any) -> Any:
    return _by_expert(x, order, inverse), (inverse, x.shape)


def _by_expert_bwd(saved: Any, ct: jax.Array) -> Any:
    inverse, shape = saved
    summed = ct[inverse].reshape(shape[0], -1, shape[1]).astype(jnp.float32).sum(1)
    return summed.astype(ct.dtype), None, None


_by_expert.defvjp(_by_expert_fwd, _by_expert_bwd)


@jax.custom_vjp
def _by_token(rows_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Rows in the experts' order back in the tokens': [R, D]."""
    return rows_RD[inverse_R]


def _by_token_fwd(rows: Any, order: Any, inverse: Any) -> Any:
    return rows[inverse], order


def _by_token_bwd(order: Any, ct: jax.Array) -> Any:
    return ct[order], None, None


_by_token.defvjp(_by_token_fwd, _by_token_bwd)


@dataclass(frozen=True)
class RouterWeights:
    """What the losses of the router are multiplied by, beside the loss that is trained."""

    balance: float
    z: float


NO_ROUTER = RouterWeights(0.0, 0.0)


def router_loss(part: Routing, whole: Routing, weights: RouterWeights) -> jax.Array:
    """The part that some tokens have in the router's losses of the whole step; parts add up.

    The gradient is by part.probs and part.z. Both losses are means over tokens and layers:

    balance: E * sum over experts of (its share of the tokens) * (its mean probability), from Switch
    Transformer (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6). With several experts a token the
    shares add up to `chosen`, as in transformers and megablocks: it is `chosen` at perfect balance.
    Layer by layer, as in the papers; transformers multiplies the means over all layers, which lets
    one layer's imbalance make up for another's. The shares are those of the whole step (Qiu et al.
    2025, arXiv:2501.11873), so that they are no matter of its micro-batches.

    z: logsumexp(router logits) squared, from ST-MoE (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """
    n = jnp.maximum(whole.tokens, 1)
    shares = jax.lax.stop_gradient(whole.chosen / n[..., None])
    balance = (shares * part.probs / n[..., None]).sum(-1).mean() * part.probs.shape[-1]
    return weights.balance * balance + weights.z * (part.z / n).mean()
