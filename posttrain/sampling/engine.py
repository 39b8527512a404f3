"""Plain decoding: prefill the prompts, then one token a step for all rows, with a KV cache.

Layers are unstacked once per Engine (slicing stacked weights inside the token loop copies them),
caches are one pair of arrays a layer and donated from call to call. Shapes are few: batch, prompt
and cache lengths are rounded up to powers of two.

Shape suffixes: B rows, P prompt positions, S cache slots, K key/value heads, H head_dim,
D embed, V vocabulary rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posttrain.models.attention import cached_attention
from posttrain.models.head import soft_cap
from posttrain.models.layers import rope_tables, segment_attend
from posttrain.models.quantized import dense
from posttrain.models.spec import LayerKind
from posttrain.models.transformer import Transformer
from posttrain.sampling.sampler import Choice, choose
from posttrain.sharding import batch_shards, constrain, replicated

OnToken = Callable[[int, int], None]
"""Called with (row, token) as soon as a token is known, stop tokens included."""

STRIDE = 32
"""Decode steps between two looks at the host, where nobody waits for single tokens."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt. tokens end with the stop token, if one was reached
    (stopped); logps: of each token under the model's own distribution (temperature 1)."""

    tokens: list[int]
    logps: list[float]
    stopped: bool


@dataclass(frozen=True)
class _Static:
    """What compiled programs are made for, beside shapes."""

    trunk: nnx.GraphDef  # embedding, final norm, head
    layers: tuple[nnx.GraphDef, ...]
    greedy: bool
    filtered: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """The state of all rows between two calls."""

    caches: tuple[tuple[jax.Array, jax.Array], ...]  # per layer k, v: [B, S, K, H]
    logits: jax.Array  # float32 [B, V]: of the next token
    lengths: jax.Array  # int32 [B]: tokens in the cache
    ends: jax.Array  # int32 [B]: no token beyond this length
    done: jax.Array  # bool [B]
    steps: jax.Array  # int32 [B]: tokens drawn so far; with seed and row it fixes the draw


class Engine:
    """A model ready to decode: its weights unstacked, in the compute dtype."""

    def __init__(self, model: Transformer):
        leaves = jax.tree.leaves(nnx.state(model))
        self.spec, self.mesh = model.spec, leaves[0].sharding.mesh
        with jax.set_mesh(self.mesh):
            self._graphs, self._weights = _unstack(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Iterable[int] = (),
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Continues each prompt until a stop token, max_new_tokens, or the model's context ends.

        temperature 0: the most probable token. Otherwise drawn from softmax(logits / temperature)
        cut to the top_k most probable (0: all) and to the smallest set that holds top_p. A row's
        draw depends on seed, row and position alone, not on its neighbours.
        Raises ValueError on an empty prompt, or one that leaves no room in the model's context.
        """
        if not prompts:
            return []
        longest = max(len(p) for p in prompts)
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < self.spec.max_positions:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; this model takes 1 to "
                    f"{self.spec.max_positions - 1}"
                )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        rows = batch_shards(self.mesh) * _bucket(-(-len(prompts) // batch_shards(self.mesh)), 1)
        tokens = np.zeros((rows, _bucket(longest, 32)), np.int32)
        lengths = np.ones(rows, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
            lengths[i] = len(prompt)
        ends = np.minimum(lengths + max_new_tokens, self.spec.max_positions).astype(np.int32)
        ends[len(prompts) :] = 0  # rows that fill the batch up are done before they begin
        choice = Choice(np.float32(temperature), np.int32(top_k), np.float32(top_p))
        static = _Static(
            *self._graphs,
            greedy=temperature == 0,
            filtered=top_k > 0 or top_p < 1,
        )
        stops = sorted(set(stop_ids))
        padded_stops = np.full(_bucket(len(stops), 8), -1, np.int32)
        padded_stops[: len(stops)] = stops
        slots = _bucket(int(max(ends.max(), tokens.shape[1])), 32)
        with jax.set_mesh(self.mesh):
            put = functools.partial(_replicate, self.mesh)
            state = _prefill(self._weights, put(tokens), put(lengths), put(ends), slots, static)
            draw = functools.partial(
                _decode,
                choice=choice,
                seed=np.uint32(seed),
                stops=padded_stops,
                stride=1 if on_token else STRIDE,
                static=static,
            )
            found = self._run(draw, state, len(prompts), on_token)
        return [Completion(t, logps, t[-1] in set(stops)) for t, logps in found]

    def _run(
        self, draw: Callable[..., Any], state: _Rows, prompts: int, on_token: OnToken | None
    ) -> list[tuple[list[int], list[float]]]:
        """Draws until all rows are done: each prompt's tokens and log-probs."""
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in range(prompts)]
        done = False
        while not done:
            state, said = draw(self._weights, state)
            tokens, logps, done = jax.device_get(said)
            for step, row in np.ndindex(tokens.shape[1], prompts):
                if (token := int(tokens[row, step])) >= 0:
                    found[row][0].append(token)
                    found[row][1].append(float(logps[row, step]))
                    if on_token:
                        on_token(row, token)
        return found


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt: Engine(model).generate for one call, options as there."""
    found = Engine(model).generate(prompts, max_new_tokens=max_new_tokens, **options)
    return [completion.tokens for completion in found]


def _bucket(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _replicate(mesh: jax.sharding.Mesh, x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])


def _unstack(model: Transformer) -> tuple[Any, Any]:
    """((trunk's graph, each layer's graph), (trunk's state, each layer's state))."""
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
    return (trunk_graph, tuple(graphs[name] for name, _ in order)), weights


@functools.partial(jax.jit, static_argnames=("order", "dtype"))
def _cut(
    trunk: nnx.State,
    stacks: dict[str, nnx.State],
    *,
    order: tuple[tuple[str, int], ...],
    dtype: Any,
) -> Any:
    """Weights in the compute dtype, to which the forward pass casts too; norms stay as they are."""

    def one(path: Any, param: Any, layer: int | None) -> Any:
        value, axes = param.get_value(), param.get_metadata("out_sharding")
        if layer is not None:
            value, axes = jax.tree.map(lambda x: x[layer], value), axes[1:]
        value = dense(value, dtype)
        if "norm" not in jax.tree_util.keystr(path):
            value = value.astype(dtype)
        return param.replace(constrain(value, axes))

    def each(state: nnx.State, layer: int | None) -> Any:
        return jax.tree_util.tree_map_with_path(
            functools.partial(one, layer=layer),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    return each(trunk, None), tuple(each(stacks[name], i) for name, i in order)


def _layers(
    weights: Any, x_BTD: jax.Array, positions_BT: jax.Array, static: _Static, attend: Any
) -> jax.Array:
    """All layers, unrolled, and the final norm. attend(i, q, k, v, kind): attention of layer i."""
    trunk = nnx.merge(static.trunk, weights[0])
    ropes = rope_tables(trunk.spec, positions_BT)
    for i, (graph, layer) in enumerate(zip(static.layers, weights[1], strict=True)):
        x_BTD, _ = nnx.merge(graph, layer)(x_BTD, ropes, functools.partial(attend, i))
    return trunk.normed(x_BTD)


def _next_logits(weights: Any, hidden_BD: jax.Array, static: _Static) -> jax.Array:
    """float32 [B, V]; padding rows of the vocabulary at -inf."""
    trunk = nnx.merge(static.trunk, weights[0])
    kernel = trunk.head_kernel().astype(hidden_BD.dtype)
    logits = jnp.einsum("bd,dv->bv", hidden_BD, kernel, preferred_element_type=jnp.float32)
    real = jnp.arange(logits.shape[1]) < trunk.spec.vocab_size
    logits = soft_cap(logits, trunk.spec.final_softcap)
    return constrain(jnp.where(real, logits, -jnp.inf), ("batch", None))


@functools.partial(jax.jit, static_argnames=("slots", "static"))
def _prefill(
    weights: Any, tokens_BP: jax.Array, lengths: jax.Array, ends: jax.Array, slots: int,
    static: _Static,
) -> _Rows:  # fmt: skip
    """Runs the prompts (padded on the right) and leaves the rows ready to draw a token."""
    rows, width = tokens_BP.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens_BP.shape)
    trunk = nnx.merge(static.trunk, weights[0])
    own = segment_attend(trunk.spec, (positions < lengths[:, None]).astype(jnp.int32), "reference")
    caches: dict[int, tuple[jax.Array, jax.Array]] = {}

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array, kind: LayerKind) -> jax.Array:
        room = ((0, 0), (0, slots - width), (0, 0), (0, 0))
        caches[i] = (_pin(jnp.pad(k, room)), _pin(jnp.pad(v, room)))
        return own(q, k, v, kind)

    x = trunk.embed(tokens_BP)
    hidden = _layers(weights, x, positions, static, attend)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _Rows(
        caches=tuple(caches[i] for i in range(len(weights[1]))),
        logits=_next_logits(weights, last, static),
        lengths=lengths,
        ends=ends,
        done=lengths >= ends,
        steps=jnp.zeros(rows, jnp.int32),
    )


def _pin(cache: jax.Array) -> jax.Array:
    return constrain(cache, ("batch", None, "kv_heads", None))


@functools.partial(jax.jit, static_argnames=("stride", "static"), donate_argnames="state")
def _decode(
    weights: Any, state: _Rows, *, choice: Choice, seed: jax.Array, stops: jax.Array, stride: int,
    static: _Static,
) -> tuple[_Rows, tuple[jax.Array, jax.Array, jax.Array]]:  # fmt: skip
    """At most `stride` tokens more for each row: (state, (tokens, logps, all done)).

    tokens, logps: [B, stride]; the token is -1 where the row was done.
    """
    rows = state.lengths.shape[0]
    said = (jnp.full((rows, stride), -1, jnp.int32), jnp.zeros((rows, stride), jnp.float32))
    key = jax.random.fold_in(jax.random.key(0), seed)

    def one(carry: Any) -> Any:
        i, s, (tokens, logps) = carry
        token = choose(
            s.logits, choice, key, s.steps, greedy=static.greedy, filtered=static.filtered
        )
        logp = jnp.take_along_axis(jax.nn.log_softmax(s.logits), token[:, None], 1)[:, 0]
        tokens = tokens.at[:, i].set(jnp.where(s.done, -1, token))
        logps = logps.at[:, i].set(jnp.where(s.done, 0.0, logp))
        return i + 1, _advance(weights, s, token, stops, static), (tokens, logps)

    def unfinished(carry: Any) -> jax.Array:
        i, s, _ = carry
        return (i < stride) & ~s.done.all()

    _, state, said = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, said))
    tokens, logps = (constrain(x, (None, None)) for x in said)
    return state, (tokens, logps, constrain(state.done.all(), ()))


def _advance(weights: Any, s: _Rows, token: jax.Array, stops: jax.Array, static: _Static) -> _Rows:
    """Puts a token into each row that is not done, and looks at what follows it."""
    length = jnp.where(s.done, s.lengths, s.lengths + 1)
    done = s.done | jnp.isin(token, stops) | (length >= s.ends)
    at = jnp.minimum(s.lengths, s.caches[0][0].shape[1] - 1)  # done rows write where none looks
    caches, trunk = list(s.caches), nnx.merge(static.trunk, weights[0])

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array, kind: LayerKind) -> jax.Array:
        rows = jnp.arange(at.shape[0])
        keys = _pin(caches[i][0].at[rows, at].set(k[:, 0]))
        values = _pin(caches[i][1].at[rows, at].set(v[:, 0]))
        caches[i] = (keys, values)
        return cached_attention(
            q,
            keys,
            values,
            at,
            window=kind.window,
            softcap=trunk.spec.attention_softcap,
            scale=trunk.spec.attention_scale,
        )

    x = trunk.embed(token[:, None])
    hidden = _layers(weights, x, at[:, None], static, attend)
    logits = _next_logits(weights, hidden[:, 0], static)
    return _Rows(tuple(caches), logits, length, s.ends, done, s.steps + 1)
