"""The vocabulary head: log-probabilities of trained tokens, without ever holding all logits.

Inside shard_map each shard compacts ITS OWN trained positions to a static budget and walks them
in chunks, as many as it fills: a budget that is too large costs no logits. W is gathered over
`fsdp` once before the loop and its gradient, added up in float32, scattered once after it; in the
loop only softmax statistics cross, and only over `tensor`.

Shape suffixes: B rows, T positions, D embed, V vocabulary rows, n compacted positions, c chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain.sharding import (
    BATCH_AXES,
    all_gather,
    axes_of,
    batch_shards,
    partition_spec,
    reduce_scatter,
)
from posttrain.types import TokenOutputs

_NEGATIVE = -1e30  # a padding row's logit: exp gives exactly 0, and no inf - inf


@dataclass(frozen=True)
class _Plan:
    """What the loop must know statically."""

    mesh: jax.sharding.Mesh
    slots: int  # compacted positions of a shard, a multiple of chunk
    chunk: int
    vocab_size: int
    softcap: float | None
    temperature: float
    context: str | None  # the axis that rows are cut along, if any
    fsdp: tuple[str, ...]  # those that W's D is cut along
    tensor: str | None  # that of its V

    @property
    def rows(self) -> P:
        """The layout of [B, T, ...]."""
        return P(BATCH_AXES, self.context)

    entropy: bool
    correct: bool
    log_sum_sq: bool


def soft_cap(z: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(z / cap); z itself where there is no cap."""
    return z if cap is None else cap * jnp.tanh(z / cap)


def trained_targets(segment_ids_BT: jax.Array, loss_weights_BT: jax.Array) -> jax.Array:
    """bool [B, T]: tokens with a weight and a token before them in their segment."""
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return (loss_weights_BT != 0) & (segment_ids_BT > 0) & (segment_ids_BT == before)


def _gather(w: jax.Array, dtype: Any, plan: _Plan) -> jax.Array:
    return all_gather(w.astype(dtype), plan.fsdp, 0)


def _over_tensor(reduce: Any, x: jax.Array, plan: _Plan) -> jax.Array:
    return reduce(x, plan.tensor) if plan.tensor else x


def _offset(width: int, plan: _Plan) -> Any:
    """The vocabulary id of this shard's first column."""
    return jax.lax.axis_index(plan.tensor) * width if plan.tensor else 0


def _logits(h_cD: jax.Array, w_DV: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """This shard's columns of the logits, capped, over the temperature, float32, and their
    vocabulary ids."""
    ids = _offset(w_DV.shape[1], plan) + jnp.arange(w_DV.shape[1])
    z = jnp.einsum("cd,dv->cv", h_cD, w_DV, preferred_element_type=jnp.float32)
    z = soft_cap(z, plan.softcap)
    if plan.temperature != 1:
        z = z / plan.temperature
    return jnp.where(ids < plan.vocab_size, z, _NEGATIVE), ids


def _positions(trained_BT: jax.Array, plan: _Plan) -> jax.Array:
    """Flat indices of this shard's trained positions, ascending: int32 [chunks, c].

    Slots left over hold indices past the end, each another one: gathers give 0, scatters drop.
    """
    flat = trained_BT.reshape(-1)
    at = jnp.nonzero(flat, size=plan.slots, fill_value=flat.size)[0]
    slot = jnp.arange(plan.slots)
    at = jnp.where(slot < flat.sum(), at, flat.size + slot)
    return at.reshape(-1, plan.chunk).astype(jnp.int32)


def _walked(trained_BT: jax.Array, plan: _Plan) -> jax.Array:
    """How many chunks hold a trained position: the first ones. The same over `tensor`."""
    return -(-jnp.minimum(trained_BT.sum(dtype=jnp.int32), plan.slots) // plan.chunk)


def _take(x: jax.Array, at_c: jax.Array) -> jax.Array:
    """x[at_c], 0 past the end."""
    return x.at[at_c].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)


def _put(x: jax.Array, at_c: jax.Array, values: jax.Array) -> jax.Array:
    """x with values at at_c, but for those past the end."""
    return x.at[at_c].set(values, mode="drop", indices_are_sorted=True, unique_indices=True)


def _forward(hidden_BTD, w, next_BT, trained_BT, plan: _Plan):  # inside shard_map
    tokens, h_flat = next_BT.reshape(-1), hidden_BTD.reshape(next_BT.size, -1)
    at = _positions(trained_BT, plan)
    w_DV = _gather(w, hidden_BTD.dtype, plan)

    def chunk(at_c: jax.Array) -> dict[str, jax.Array]:
        y = _take(tokens, at_c)
        z, ids = _logits(_take(h_flat, at_c), w_DV, plan)
        top = _over_tensor(jax.lax.pmax, z.max(-1), plan)
        total = _over_tensor(jax.lax.psum, jnp.exp(z - top[:, None]).sum(-1), plan)
        lse = top + jnp.log(total)
        target = jnp.where(ids == y[:, None], z, 0).sum(-1)
        out = {"logps": _over_tensor(jax.lax.psum, target, plan) - lse, "lse": lse}
        if plan.entropy:
            mean = (jnp.exp(z - lse[:, None]) * z).sum(-1)
            out["entropy"] = lse - _over_tensor(jax.lax.psum, mean, plan)
        if plan.correct:
            best = jnp.where(z == top[:, None], ids, jnp.iinfo(jnp.int32).max).min(-1)
            out["correct"] = (_over_tensor(jax.lax.pmin, best, plan) == y).astype(jnp.float32)
        if plan.log_sum_sq:
            squares = jnp.exp(2 * (z - top[:, None])).sum(-1)
            squares = jnp.log(_over_tensor(jax.lax.psum, squares, plan))
            out["log_sum_sq"] = squares + 2 * (top - lse)
        return out

    def body(i: jax.Array, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {k: out[k].at[i].set(v) for k, v in chunk(at[i]).items()}

    names = jax.eval_shape(chunk, at[0])
    out = jax.lax.fori_loop(
        0, _walked(trained_BT, plan), body, {k: jnp.zeros(at.shape, jnp.float32) for k in names}
    )
    zeros = jnp.zeros(next_BT.size, jnp.float32)
    out = {k: _put(zeros, at.reshape(-1), v.reshape(-1)) for k, v in out.items()}
    out = {k: v.reshape(next_BT.shape) for k, v in out.items()}
    saved = {name: out[name] for name in ("lse", "entropy") if name in out}
    del out["lse"]
    overflow = trained_BT.sum() > plan.slots
    out["logps"] = jnp.where(overflow & trained_BT, jnp.nan, out["logps"])
    return out, saved


def _backward(hidden_BTD, w, next_BT, trained_BT, saved, ct, plan: _Plan):  # inside shard_map
    tokens, h_flat = next_BT.reshape(-1), hidden_BTD.reshape(next_BT.size, -1)
    at = _positions(trained_BT, plan)
    w_DV = _gather(w, hidden_BTD.dtype, plan)
    saved, ct = ({k: v.reshape(-1) for k, v in tree.items()} for tree in (saved, ct))

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at_c, (dw_DV, dh_flat) = at[i], carry
        h, y = _take(h_flat, at_c), _take(tokens, at_c)
        z, ids = _logits(h, w_DV, plan)
        logp = z - _take(saved["lse"], at_c)[:, None]
        p, g = jnp.exp(logp), _take(ct["logps"], at_c)[:, None]
        dz = jnp.where(ids == y[:, None], g, 0) - g * p
        if plan.entropy:  # dH/dz = -p (log p + H)
            entropy, g = (_take(x["entropy"], at_c)[:, None] for x in (saved, ct))
            dz -= g * p * (logp + entropy)
        if plan.softcap is not None:  # z is capped: dz/dlogit = 1 - tanh^2; 0 in padding columns
            dz *= jnp.maximum(1 - (z * plan.temperature / plan.softcap) ** 2, 0)
        if plan.temperature != 1:
            dz /= plan.temperature
        dz = dz.astype(w_DV.dtype)
        dh = jnp.einsum("cv,dv->cd", dz, w_DV, preferred_element_type=jnp.float32)
        dw_DV += jnp.einsum("cd,cv->dv", h, dz, preferred_element_type=jnp.float32)
        return dw_DV, _put(dh_flat, at_c, dh.astype(dh_flat.dtype))

    zeros = (jnp.zeros(w_DV.shape, jnp.float32), jnp.zeros_like(h_flat))
    dw, dh = jax.lax.fori_loop(0, _walked(trained_BT, plan), body, zeros)
    dw = reduce_scatter(dw, plan.fsdp, 0)
    others = (*BATCH_AXES, *([plan.context] if plan.context else []))
    copies = [axis for axis in others if axis not in plan.fsdp and plan.mesh.shape[axis] > 1]
    dw = jax.lax.psum(dw, tuple(copies)) if copies else dw
    dh = _over_tensor(jax.lax.psum, dh, plan)
    return dh.reshape(hidden_BTD.shape), dw.astype(w.dtype)


def _shard_map(f: Any, plan: _Plan, in_specs: Any, out_specs: Any) -> Any:
    # the replication of results is ours to keep (psums above), so that no rule adds another
    return jax.shard_map(
        functools.partial(f, plan=plan),
        mesh=plan.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _outputs(hidden_BTD, w, next_BT, trained_BT, plan: _Plan) -> Any:
    return _outputs_fwd(hidden_BTD, w, next_BT, trained_BT, plan)[0]


def _outputs_fwd(hidden_BTD, w, next_BT, trained_BT, plan: _Plan):
    rows, kernel = plan.rows, P(plan.fsdp or None, plan.tensor)
    forward = _shard_map(_forward, plan, (rows, kernel, rows, rows), (rows, rows))
    out, saved = forward(hidden_BTD, w, next_BT, trained_BT)
    return out, (hidden_BTD, w, next_BT, trained_BT, saved)


def _outputs_bwd(plan: _Plan, residuals, ct):
    rows, kernel = plan.rows, P(plan.fsdp or None, plan.tensor)
    specs = (rows, kernel, rows, rows, rows, rows)
    backward = _shard_map(_backward, plan, specs, (rows, kernel))
    dh, dw = backward(*residuals, ct)
    return dh, dw, None, None


_outputs.defvjp(_outputs_fwd, _outputs_bwd)


def token_outputs(
    hidden_BTD: jax.Array,
    W_DV: jax.Array,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    loss_weights_BT: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    budget: int,
    vocab_size: int,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
    correct: bool = False,
    log_sum_sq: bool = False,
) -> TokenOutputs:
    """Log-probabilities of the trained tokens (weight != 0), by the positions before them.

    hidden_BTD: after the final norm, in the compute dtype; W_DV: the head's kernel in the
    weights' dtype. budget: the most trained tokens any shard's rows may hold; chunk: how many
    are in logits at once. vocab_size: tokens that exist (spec.vocab_size); W's further columns
    are padding and have probability 0. softcap: logits z become softcap * tanh(z / softcap)
    (spec.final_softcap; Gemma 2, arXiv:2408.00118, section 2). temperature: everything is of the
    distribution softmax(z / temperature), that of a sampler's draws. Differentiable in hidden and W
    through logps and entropy (nats); `correct` is 1 where the target is the (first) most probable
    token, `log_sum_sq` the log of sum_v p(v)^2: neither has a gradient.

    A shard that holds more trained tokens than fit gives NaN for all of its log-probs, so that
    no loss is made of a part of them; budget_overflow counts them.
    Raises ValueError if the mesh does not divide the rows.
    """
    shards = batch_shards(mesh)
    if hidden_BTD.shape[0] % shards:
        raise ValueError(
            f"{hidden_BTD.shape[0]} rows do not divide over {shards} shards of the mesh"
        )
    kernel = partition_spec(("embed", "vocab"), W_DV.shape, mesh)
    (context,) = partition_spec(("length",), tokens_BT.shape[1:], mesh)
    # a shard trains no more tokens than it has positions, of which `budget` knows nothing
    positions = tokens_BT.size // shards // (mesh.shape[context] if context else 1)
    chunk, slots = _layout(min(budget, positions), chunk)
    plan = _Plan(
        mesh=mesh,
        slots=slots,
        chunk=chunk,
        vocab_size=vocab_size,
        softcap=softcap,
        temperature=temperature,
        context=context,
        fsdp=axes_of(kernel[0]),
        tensor=kernel[1],
        entropy=entropy,
        correct=correct,
        log_sum_sq=log_sum_sq,
    )
    # What a position predicts is moved to it, and what comes of it moved back, a number a token:
    # inside, no shard needs its neighbour's activations.
    trained = trained_targets(segment_ids_BT, loss_weights_BT)
    next_BT, trained = _before(tokens_BT), _before(trained)
    with jax.named_scope("head"):
        out: Any = _outputs(hidden_BTD, W_DV, next_BT, trained, plan)
    return TokenOutputs(**{name: jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for name, x in out.items()})


def _before(x_BT: jax.Array) -> jax.Array:
    """What belongs to each token, at the position before it."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _layout(budget: int, chunk: int) -> tuple[int, int]:
    """(chunk, slots): even chunks of at most `chunk`, rounded up to 8, that hold the budget."""
    budget = max(budget, 1)
    chunks = -(-budget // chunk)
    size = -(-budget // (chunks * 8)) * 8
    return size, size * chunks


def budget_overflow(
    segment_ids_BT: jax.Array,
    loss_weights_BT: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    budget: int,
    chunk: int = 1024,
) -> jax.Array:
    """int32: trained tokens, over all shards, for which token_outputs has no room. 0 = sound."""
    trained = _before(trained_targets(segment_ids_BT, loss_weights_BT))
    (cut,) = partition_spec(("length",), trained.shape[1:], mesh)
    parts = mesh.shape[cut] if cut else 1
    counts = trained.reshape(batch_shards(mesh), -1, parts, trained.shape[1] // parts).sum((1, 3))
    return jnp.maximum(counts - _layout(budget, chunk)[1], 0).sum()
