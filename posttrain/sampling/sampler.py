"""From logits to a token, for rows that are all drawn differently.

Penalties (of tokens that prompt or answer hold), bias, temperature, then what is kept: the top_k
most probable; of these the fewest that hold top_p of their probability (Holtzman et al. 2020,
arXiv:1904.09751, section 3.1); of these the ones at least min_p as probable as the first (Nguyen et
al. 2024, arXiv:2407.01082, section 3). Tokens equal to the last one kept are kept too.

How a row is drawn is in arrays on device and a step that no row needs is left out there: another
setting compiles nothing. Nothing is sorted: the edge of top_k and top_p is found bit by bit.

Shape suffixes: B rows, V vocabulary rows, M biased tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

IN_PROMPT, IN_ANSWER = 1, 2
"""The bits of what has been seen of a token."""
_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How each row is drawn: arrays of [B]."""

    temperature: Any  # float32; 0: the most probable token
    top_k: Any  # int32; 0: all
    top_p: Any  # float32
    min_p: Any  # float32
    repetition_penalty: Any  # float32
    presence_penalty: Any  # float32
    biased: Any  # int32 [B, M]; V or more: none
    bias: Any  # float32 [B, M]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uses:
    """Which steps some row needs: scalars on device."""

    drawn: Any  # a temperature that is not 0
    top_k: Any
    top_p: Any
    min_p: Any
    penalties: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """One token a row and what was thought of it, [B]."""

    token: Any  # int32
    logp: Any  # float32, of the distribution drawn from; 0 where that is one token
    plain_logp: Any  # float32, of the model's own


def draw(
    logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array, choice: Choice, uses: Uses
) -> Drawn:
    """One token of each row, by one uniform number from the row's key.

    logits_BV: float32, -inf where there is no token. seen_BV: uint8, IN_PROMPT and IN_ANSWER.
    """
    x = changed(logits_BV, seen_BV, choice, uses)
    best = most_probable(x)

    def drawn(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        greedy = choice.temperature == 0
        x = kept(x / jnp.where(greedy, 1.0, choice.temperature)[:, None], choice, uses)
        p = jnp.exp(x - x.max(-1, keepdims=True))
        token = pick(p, jax.vmap(jax.random.uniform)(keys_B))
        logp = _at(x, token) - jax.nn.logsumexp(x, -1)
        return jnp.where(greedy, best, token), jnp.where(greedy, 0.0, logp)

    token, logp = jax.lax.cond(uses.drawn, drawn, lambda _: (best, jnp.zeros(best.shape)), x)
    return Drawn(token, logp, _at(logits_BV, token) - jax.nn.logsumexp(logits_BV, -1))


def _at(x: jax.Array, places_B: jax.Array) -> jax.Array:
    """Each row's x[place]."""
    places = places_B.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, places, axis=1)[:, 0]


def changed(logits_BV: jax.Array, seen_BV: jax.Array, choice: Choice, uses: Uses) -> jax.Array:
    """Logits after penalties and bias."""

    def penalised(x: jax.Array) -> jax.Array:
        repetition = choice.repetition_penalty[:, None]
        lower = jnp.where(x > 0, x / repetition, x * repetition)
        x = jnp.where(seen_BV > 0, lower, x)
        answered = (seen_BV & IN_ANSWER) > 0
        return jnp.where(answered, x - choice.presence_penalty[:, None], x)

    def both(x: jax.Array) -> jax.Array:
        """What a row does not ask for changes nothing: a step left out would be a copy more."""
        rows = jnp.arange(x.shape[0])[:, None]
        return penalised(x).at[rows, choice.biased].add(choice.bias, mode="drop")

    return _where_used(uses.penalties | uses.bias, both, logits_BV)


def _where_used(used: Any, step: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return jax.lax.cond(used, step, lambda x: x, x)


def kept(x_BV: jax.Array, choice: Choice, uses: Uses) -> jax.Array:
    """Tempered logits with all but the kept tokens at -inf; the most probable is always kept."""

    def by_count(x: jax.Array) -> jax.Array:
        enough = lambda above: above.sum(-1) >= choice.top_k  # noqa: E731
        return _from(x, _edge(_ranks(x), enough), choice.top_k > 0)

    def by_mass(x: jax.Array) -> jax.Array:
        p = jnp.exp(x - x.max(-1, keepdims=True))
        wanted = choice.top_p * p.sum(-1)
        enough = lambda above: jnp.where(above, p, 0).sum(-1) >= wanted  # noqa: E731
        return _from(x, _edge(_ranks(x), enough), choice.top_p < 1)

    def by_part(x: jax.Array) -> jax.Array:
        least = x.max(-1, keepdims=True) + jnp.log(choice.min_p)[:, None]  # of 0: -inf
        return jnp.where(x >= least, x, -jnp.inf)

    x = _where_used(uses.top_k, by_count, x_BV)
    x = _where_used(uses.top_p, by_mass, x)
    return _where_used(uses.min_p, by_part, x)


def _ranks(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats: all bits of negative ones turned, the sign of others."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _edge(ranks_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B]: the highest rank such that the tokens from it upwards are enough, bit by bit."""

    def bit(i: jax.Array, edge: jax.Array) -> jax.Array:
        higher = edge | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ranks_BV >= higher[:, None]), higher, edge)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(ranks_BV.shape[0], jnp.uint32))


def _from(x: jax.Array, edge: jax.Array, used: jax.Array) -> jax.Array:
    return jnp.where((_ranks(x) >= edge[:, None]) | ~used[:, None], x, -jnp.inf)


def pick(p_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """int32 [B]: the token that u in [0, 1) falls on where all lie side by side, each as wide as
    its p >= 0 (of any sum). By blocks first; a token of p 0 is never picked."""
    p = _in_blocks(p_BV, 0)
    blocks = p.sum(-1)
    ends = jnp.cumsum(blocks, -1)
    target = u_B * ends[:, -1]
    block = _first(ends, target, blocks)
    before = jnp.where(block > 0, _at(ends, jnp.maximum(block - 1, 0)), 0.0)
    inside = _at(p, block)
    place = _first(jnp.cumsum(inside, -1), target - before, inside)
    return (block * _BLOCK + place).astype(jnp.int32)


def most_probable(x_BV: jax.Array) -> jax.Array:
    """int32 [B]: the first of the greatest. By blocks, so that x is gone through once."""
    x = _in_blocks(x_BV, -jnp.inf)
    blocks = x.max(-1)
    most = blocks.max(-1, keepdims=True)
    block = _first_true(blocks == most)
    return (block * _BLOCK + _first_true(_at(x, block) == most)).astype(jnp.int32)


def _in_blocks(x_BV: jax.Array, blank: float) -> jax.Array:
    rows, vocab = x_BV.shape
    padded = jnp.pad(x_BV, ((0, 0), (0, -vocab % _BLOCK)), constant_values=blank)
    return padded.reshape(rows, -1, _BLOCK)


def _first(ends: jax.Array, target: jax.Array, width: jax.Array) -> jax.Array:
    """The first that ends beyond the target and has a width; by rounding there may be none: then
    the last that has a width."""
    wide = width > 0
    first = _first_true(wide & (ends > target[:, None]))
    last = jnp.where(wide, jnp.arange(wide.shape[1]), 0).max(-1)
    return jnp.where(first < wide.shape[1], first, last)


def _first_true(x_BV: jax.Array) -> jax.Array:
    """Its place; V where there is none. XLA's argmax goes through a row one by one on the CPU."""
    size = x_BV.shape[1]
    return jnp.where(x_BV, jnp.arange(size), size).min(-1)
