"""Caches in pieces and rings, against plain softmax over what may be seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.models.kv_cache import (
    CHUNK,
    KEYS,
    VALUES,
    cache_slots,
    cached_attention,
    cut,
    to_cache,
    write,
)

LENGTH, STEPS, PROMPT = 5 * CHUNK, 90, 256
READ = np.array([200, 1, 110])  # tokens of each row's prompt; three rows, padded to PROMPT
K, G, H = 2, 2, 4


def test_pieces_lie_side_by_side_and_do_not_depend_on_how_many_there_are() -> None:
    long = cut(16 * CHUNK)
    assert [start for start, _ in long] == np.cumsum([0, *(size for _, size in long[:-1])]).tolist()
    assert sum(size for _, size in long) == 16 * CHUNK
    assert all(size <= max(CHUNK, start // 2) for start, size in long)
    assert cut(8 * CHUNK) == long[: len(cut(8 * CHUNK))]
    assert cut(8) == [(0, 8)]


def test_a_ring_is_as_long_as_its_window() -> None:
    assert cache_slots(1024, None) == 1024
    assert cache_slots(1024, 5) == 8
    assert cache_slots(1024, 300) == 3 * CHUNK
    assert cache_slots(256, 300) == 256


@pytest.mark.parametrize("window", [None, 5, 100, 200])
def test_a_token_sees_what_it_may_and_nothing_else(window: int | None) -> None:
    """Prompts on either side of the window, then token by token; the next piece holds rubbish."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, PROMPT + STEPS, n, H)).astype(np.float32) for n in (K * G, K, K))
    slots = cache_slots(LENGTH, window)

    def start(x: np.ndarray, dim: int) -> Any:
        read = to_cache(jnp.asarray(x[:, :PROMPT]), jnp.asarray(READ), window, dim)
        read = np.moveaxis(np.concatenate(read, dim), dim, 0)
        room = np.full((slots, 3, K, H), 1e3, np.float32)
        room[: len(read)] = read[:slots]
        pieces = (room[at : at + size] for at, size in cut(slots))
        return tuple(jnp.asarray(np.moveaxis(piece, 0, dim)) for piece in pieces)

    def step(carry: Any, _: None) -> Any:
        keys, values, at = carry
        now = [jnp.take_along_axis(x, at[:, None, None, None], axis=1) for x in (q, k, v)]
        keys, values = write(keys, now[1], at, KEYS), write(values, now[2], at, VALUES)
        longest = at.max() + 1
        out = cached_attention(now[0], keys, values, at, longest, window=window)
        return (keys, values, at + 1), out[:, 0]

    first = (start(k, KEYS), start(v, VALUES), jnp.asarray(READ))
    _, found = jax.jit(lambda first: jax.lax.scan(step, first, None, length=STEPS))(first)
    for row, read in enumerate(READ):
        for i in (0, 40, STEPS - 1):
            at = read + i
            seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
            for head in range(K * G):
                of = (row, seen, head // G)
                scores = k[of].astype(np.float64) @ q[row, at, head] * H**-0.5
                p = np.exp(scores - scores.max())
                want = p @ v[of] / p.sum()
                np.testing.assert_allclose(found[i, row, head], want, atol=2e-6)
