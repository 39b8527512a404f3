"""The compiled programs of the engine: prefill of prompts, placing them in slots, decoding.

Layers are unstacked once per weight sync (slicing stacked weights inside the token loop copies them
all) and whole but for the axes `tensor` and `expert`. Caches are one pair of arrays a layer,
donated from call to call.

Nothing here decides anything: which prompt goes where and which slots are live is said by the host
with every call, so that several hosts that say the same stay together.

Shape suffixes: R rows of a prefill, P its positions, B slots, S cache slots of one of them, K
key/value heads, H head_dim, D embed, V vocabulary rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from posttrain.models import kv_cache
from posttrain.models.head import soft_cap
from posttrain.models.kv_cache import KEYS, VALUES
from posttrain.models.layers import rope_tables, segment_attend
from posttrain.models.quantized import dense
from posttrain.models.spec import LayerKind, Spec
from posttrain.models.transformer import Transformer
from posttrain.sampling.sampler import IN_ANSWER, IN_PROMPT, Choice, Uses, draw
from posttrain.sharding import BATCH_AXES, constrain, partition_spec


@dataclass(frozen=True)
class Static:
    """What programs are made for, beside shapes. Its hash is asked for with every call."""

    trunk: Any  # graph of embedding, final norm and head
    layers: tuple[Any, ...]  # each layer's graph, in the model's order
    tree: Any  # how the flat weights lie in their states

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.trunk, self.layers, self.tree))

    def __hash__(self) -> int:
        return self._hash


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What is known of prompts that were read, or of slots: all that decoding goes on from."""

    caches: tuple[tuple[Any, Any], ...]  # keys, values of each layer (models/kv_cache.py)
    logits: jax.Array  # float32 [B, V], of the next token
    seen: jax.Array  # uint8 [B, V], of each token (sampler.py)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the host says of the slots: arrays of [B]."""

    lengths: Any  # int32: tokens in the cache
    ends: Any  # int32: no token beyond this length
    live: Any  # bool
    stops: Any  # int32 [B, n]; -1: none
    seeds: Any  # uint32 [B, 3]; with the position they fix a draw
    choice: Choice


def unstack(model: Transformer) -> tuple[list[jax.Array], Static]:
    """The weights, in the compute dtype, and what they are. Nothing of it is the model's own."""
    graphs, stacks = {}, {}
    for name in model.spec.stacks:
        graphs[name], stacks[name] = nnx.split(model.layers[name])
    trunk = nnx.merge(*nnx.split(model))  # a copy, to take the layers out of
    del trunk.layers
    trunk_graph, trunk_state = nnx.split(trunk)
    # (stack, index in it) of each layer, in the model's order
    places = {n: (s.name, i) for s in model.spec.stacks.values() for i, n in enumerate(s.layers)}
    order = tuple(places[n] for n in range(model.spec.layers))
    weights = _cut(trunk_state, stacks, order=order, dtype=model.compute.dtype)
    leaves, tree = jax.tree.flatten(weights)
    return leaves, Static(trunk_graph, tuple(graphs[name] for name, _ in order), tree)


@functools.partial(jax.jit, static_argnames=("order", "dtype"))
def _cut(
    trunk: nnx.State,
    stacks: dict[str, nnx.State],
    *,
    order: tuple[tuple[str, int], ...],
    dtype: Any,
) -> Any:
    """Weights in the compute dtype, to which the forward pass casts too; norms stay as they are.

    Gathered over `fsdp`, but for those of experts (models/moe.py gathers them itself).
    """

    def one(path: Any, param: Any, layer: int | None) -> Any:
        value, axes = param.get_value(), param.get_metadata("out_sharding")
        name = jax.tree_util.keystr(path)
        if layer is not None:
            value, axes = jax.tree.map(lambda x: x[layer], value), axes[1:]
        value = dense(value, dtype)
        if "norm" not in name:
            value = value.astype(dtype)
        if "moe" not in name:
            axes = tuple(None if axis == "embed" else axis for axis in axes)
        return param.replace(constrain(value, axes))

    def each(state: nnx.State, layer: int | None) -> Any:
        return jax.tree_util.tree_map_with_path(
            functools.partial(one, layer=layer),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    return each(trunk, None), tuple(each(stacks[name], i) for name, i in order)


class _Network:
    """The model inside a compiled program."""

    def __init__(self, weights: list[jax.Array], static: Static):
        trunk, layers = jax.tree.unflatten(static.tree, weights)
        self.trunk: Any = nnx.merge(static.trunk, trunk)
        self.layers: list[Any] = [
            nnx.merge(graph, state) for graph, state in zip(static.layers, layers, strict=True)
        ]
        self.spec: Spec = self.trunk.spec

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array, attend: Any) -> jax.Array:
        """After the final norm. attend(i, q, k, v, kind): the attention of layer i."""
        x = self.trunk.embed(tokens_BT, gathered=True)
        ropes = rope_tables(self.spec, positions_BT)
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, ropes, functools.partial(attend, i))
        return self.trunk.normed(x)

    def next_logits(self, hidden_BD: jax.Array) -> jax.Array:
        """float32 [B, V]; padding rows of the vocabulary at -inf."""
        kernel = self.trunk.head_kernel().astype(hidden_BD.dtype)
        logits = jnp.einsum("bd,dv->bv", hidden_BD, kernel, preferred_element_type=jnp.float32)
        logits = soft_cap(logits, self.spec.final_softcap)
        if logits.shape[1] > self.spec.vocab_size:
            real = jnp.arange(logits.shape[1]) < self.spec.vocab_size
            logits = jnp.where(real, logits, -jnp.inf)
        return constrain(logits, ("batch", None))


@functools.partial(jax.jit, static_argnames="static")
def prefill(
    weights: list[jax.Array], tokens_RP: jax.Array, lengths_R: jax.Array, static: Static
) -> Rows:
    """Reads prompts, padded on the right."""
    network = _Network(weights, static)
    tokens_RP = constrain(tokens_RP, ("batch", None))
    positions = jnp.broadcast_to(jnp.arange(tokens_RP.shape[1]), tokens_RP.shape)
    real = positions < lengths_R[:, None]
    own = segment_attend(network.spec, real.astype(jnp.int32), "auto")
    caches: dict[int, tuple[kv_cache.Pieces, kv_cache.Pieces]] = {}

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array, kind: LayerKind) -> jax.Array:
        kept = functools.partial(kv_cache.to_cache, lengths_B=lengths_R, window=kind.window)
        caches[i] = kept(k, dim=KEYS), kept(v, dim=VALUES)
        return own(q, k, v, kind)

    hidden = network.hidden(tokens_RP, positions, attend)
    last = jnp.take_along_axis(hidden, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(tokens_RP.shape[0])[:, None]
    shape = (tokens_RP.shape[0], network.spec.vocab_rows)
    marks = jnp.where(real, IN_PROMPT, 0).astype(jnp.uint8)
    return Rows(
        caches=tuple(caches[i] for i in range(len(caches))),
        logits=network.next_logits(last),
        seen=constrain(jnp.zeros(shape, jnp.uint8).at[rows, tokens_RP].max(marks), ("batch", None)),
    )


@functools.partial(jax.jit, static_argnames=("slots", "length", "spec", "dtype"))
def empty(slots: int, length: int, spec: Spec, dtype: Any) -> Rows:
    """Slots with room for `length` tokens each, a multiple of kv_cache.CHUNK."""

    def cache(kind: LayerKind) -> tuple[kv_cache.Pieces, kv_cache.Pieces]:
        def zeros(*shape: int) -> jax.Array:
            return constrain(jnp.zeros((slots, spec.kv_heads, *shape), dtype), kv_cache.AXES)

        sizes = [size for _, size in kv_cache.cut(kv_cache.cache_slots(length, kind.window))]
        keys = tuple(zeros(spec.head_dim, size) for size in sizes)
        return keys, tuple(zeros(size, spec.head_dim) for size in sizes)

    caches = tuple(map(cache, spec.kinds))
    shape = (slots, spec.vocab_rows)
    logits, seen = jnp.zeros(shape), jnp.zeros(shape, jnp.uint8)
    return Rows(caches, *(constrain(x, ("batch", None)) for x in (logits, seen)))


@functools.partial(jax.jit, static_argnames=("length", "spec"))
def grown(rows: Rows, length: int, spec: Spec) -> Rows:
    """The same with room for more tokens each."""

    def longer(new: jax.Array, old: jax.Array) -> jax.Array:
        more = [(0, n - o) for n, o in zip(new.shape, old.shape, strict=True)]
        return constrain(jnp.pad(old, more), kv_cache.AXES)

    def all_longer(new: kv_cache.Pieces, old: kv_cache.Pieces) -> kv_cache.Pieces:
        return (*map(longer, new, old), *new[len(old) :])

    caches = empty(*rows.seen.shape[:1], length, spec, rows.caches[0][0][0].dtype).caches
    return Rows(
        tuple(tuple(map(all_longer, *both)) for both in zip(caches, rows.caches, strict=True)),
        rows.logits,
        rows.seen,
    )


@functools.partial(jax.jit, donate_argnames="rows")
def place(rows: Rows, read: Rows, moves: jax.Array, counts: jax.Array) -> Rows:
    """Puts prompts that were read into slots, or what is in other slots; one may go into many.

    moves: int32 [shards, n, 2], (slot of the shard, row of `read`) of the slots that each block of
    slots gets; counts: int32 [shards], how many of them are meant.
    """
    mesh = jax.sharding.get_abstract_mesh()
    across = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    by_block = PartitionSpec(BATCH_AXES)

    def layout(x: jax.Array) -> PartitionSpec:
        return partition_spec(kv_cache.AXES if x.ndim > 2 else ("batch", None), x.shape, mesh)

    def block(rows: Rows, read: Rows, moves: jax.Array, counts: jax.Array) -> Rows:
        if across:
            gather = functools.partial(jax.lax.all_gather, axis_name=across, axis=0, tiled=True)
            read = jax.tree.map(gather, read)

        def move(i: jax.Array, rows: Rows) -> Rows:
            slot, row = moves[0, i, 0], moves[0, i, 1]
            one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), read)

            def put(old: jax.Array, new: jax.Array) -> jax.Array:
                """A prompt may be padded beyond what a slot has room for."""
                fits = new[tuple(map(slice, old.shape))]
                return jax.lax.dynamic_update_slice(old, fits, (slot,) + (0,) * (old.ndim - 1))

            def put_all(old: kv_cache.Pieces, new: kv_cache.Pieces) -> kv_cache.Pieces:
                """Either may have more pieces than the other: in those there is nothing to keep."""
                return (*map(put, old, new), *old[len(new) :])

            return Rows(
                tuple(
                    tuple(map(put_all, mine, its))
                    for mine, its in zip(rows.caches, one.caches, strict=True)
                ),
                put(rows.logits, one.logits),
                put(rows.seen, one.seen),
            )

        return jax.lax.fori_loop(0, counts[0], move, rows)

    layouts = (jax.tree.map(layout, rows), jax.tree.map(layout, read), by_block, by_block)
    mapped = jax.shard_map(
        block, mesh=mesh, in_specs=layouts, out_specs=layouts[0], check_vma=False
    )
    return mapped(rows, read, moves, counts)


@functools.partial(jax.jit, static_argnames=("stride", "static"), donate_argnames="rows")
def decode(
    weights: list[jax.Array], rows: Rows, slots: Slots, uses: Uses, floor: jax.Array,
    longest: jax.Array, *, stride: int, static: Static,
) -> tuple[Rows, tuple[jax.Array, ...]]:  # fmt: skip
    """At most `stride` tokens more in each live slot, until no more than `floor` are live.

    longest: as in kv_cache.cached_attention, in the last of these steps. Gives (rows, (tokens,
    log-probs of the distributions drawn from, the model's own)), each [B, stride] and the same on
    every device; the token is -1 where the slot was not live any more.
    """
    network = _Network(weights, static)
    count = slots.live.shape[0]
    keys = jax.vmap(_key)(slots.seeds)

    def step(carry: Any) -> Any:
        i, rows, lengths, live, said = carry
        drawn = draw(
            rows.logits, rows.seen, jax.vmap(jax.random.fold_in)(keys, lengths), slots.choice, uses
        )
        token = jnp.where(live, drawn.token, -1)
        now = (token, drawn.logp, drawn.plain_logp)
        said = tuple(all_.at[:, i].set(new) for all_, new in zip(said, now, strict=True))
        rows = _advanced(network, rows, drawn.token, lengths, longest)
        lengths = jnp.where(live, lengths + 1, lengths)
        ended = (token[:, None] == slots.stops).any(-1) | (lengths >= slots.ends)
        return i + 1, rows, lengths, live & ~ended, said

    def unfinished(carry: Any) -> jax.Array:
        i, _, _, live, _ = carry
        return (i < stride) & (live.sum() > floor)

    blank = jnp.zeros((count, stride), jnp.float32)
    said = (jnp.full(blank.shape, -1, jnp.int32), blank, blank)
    start = (jnp.int32(0), rows, slots.lengths, slots.live, said)
    _, rows, _, _, said = jax.lax.while_loop(unfinished, step, start)
    return rows, tuple(constrain(x, (None, None)) for x in said)


def _key(seeds: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for seed in seeds:
        key = jax.random.fold_in(key, seed)
    return key


def _advanced(
    network: _Network, rows: Rows, token_B: jax.Array, lengths_B: jax.Array, longest: jax.Array
) -> Rows:
    """Reads one token more in every slot; in slots that are not live, where nobody looks."""
    spec, caches = network.spec, list(rows.caches)

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array, kind: LayerKind) -> jax.Array:
        keys = kv_cache.write(caches[i][0], k, lengths_B, KEYS)
        values = kv_cache.write(caches[i][1], v, lengths_B, VALUES)
        caches[i] = (keys, values)
        return kv_cache.cached_attention(
            q,
            keys,
            values,
            lengths_B,
            longest,
            window=kind.window,
            softcap=spec.attention_softcap,
            scale=spec.attention_scale,
        )

    hidden = network.hidden(token_B[:, None], lengths_B[:, None], attend)
    seen = jax.vmap(lambda seen, token: seen.at[token].set(seen[token] | IN_ANSWER))(
        rows.seen, token_B
    )
    return Rows(tuple(caches), network.next_logits(hidden[:, 0]), constrain(seen, ("batch", None)))
