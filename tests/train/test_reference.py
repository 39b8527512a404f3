"""The live reference's copy, and the pass: whose examples it computes, in which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.data.plan import BatchConfig, Plan
from posttrain.train.reference import _cut, _View, live_copy
from posttrain.types import Example
from tests.models.tiny import mesh_of, open_tiny


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_live_copy_in_the_compute_dtype_says_the_same_to_the_bit(
    tmp_path: Path, family: str
) -> None:
    """Of biases, per-head norms and tied heads too; norms' scales are multiplied in float32."""
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path, family, mesh, dtype="bfloat16")
        rng = np.random.default_rng(0)

        def noise(p):
            return p + jax.device_put(rng.normal(0, 0.1, p.shape), p.sharding)

        params = jax.tree.map(noise, nnx.to_pure_dict(model.state))  # or norms would be 1
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        tokens = jnp.asarray(rng.integers(0, 160, (4, 24)), jnp.int32)
        places = jnp.tile(jnp.arange(24), (4, 1))

        @jax.jit
        def logits(params: Any) -> jax.Array:
            whole = nnx.merge(model.graph, nnx.State(params))
            return whole.logits(tokens, places, jnp.ones_like(tokens))

        want = np.asarray(logits(params))
        copy = live_copy(params, "bfloat16")
        for array in jax.tree.leaves(params):
            array.delete()  # as the first step does by donating them
        np.testing.assert_array_equal(np.asarray(logits(copy)), want)
        for path, array in jax.tree_util.tree_leaves_with_path(copy):
            norm = "norm" in jax.tree_util.keystr(path)
            assert array.dtype == (jnp.float32 if norm else jnp.bfloat16), path


def test_a_live_copy_is_never_wider_than_the_weights(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path, "llama", mesh, dtype="float32", param_dtype="bfloat16")
        params = nnx.to_pure_dict(model.state)
        copy = live_copy(params, "float32")
    assert {str(x.dtype) for x in jax.tree.leaves(copy)} == {"bfloat16"}
    first = jax.tree.leaves(params)[0]
    assert jax.tree.leaves(copy)[0].unsafe_buffer_pointer() != first.unsafe_buffer_pointer()


class FakeCache:
    """Sides of lengths 5 .. 12, their last halves trained. Token t of example i is 100 i + t."""

    def __init__(self) -> None:
        self.lengths = np.arange(5, 13, dtype=np.int32)
        self.trained = self.lengths // 2
        self.sides = 2

    def read(self, ids: list[int]) -> list[Example]:
        found = []
        for i in ids:
            n, weights = int(self.lengths[i]), np.zeros(self.lengths[i], np.float32)
            weights[n - n // 2 :] = 0.5
            found.append(Example((100 * i + np.arange(n)).astype(np.int32), weights))
        return found


def test_a_pass_packs_single_sides_and_gives_each_its_own_values_back() -> None:
    cache: Any = FakeCache()
    view = _View(cache, np.array([1, 2, 4, 7]))
    assert view.lengths.tolist() == [6, 7, 9, 12]
    plan = Plan(view, BatchConfig(rows=2, order="sequential"), seq_len=16, seed=0, epochs=1)
    found: dict[int, list[float]] = {}
    for step in range(plan.steps):
        layout = plan.layout(step)[0]
        values = np.zeros((2, 16), np.float32)
        trained = np.zeros((2, 16), bool)
        for row, members in enumerate(layout):
            start = 0
            for example in view.read(members[members >= 0].tolist()):
                end = start + len(example.tokens)
                values[row, start:end], trained[row, start:end] = (
                    example.tokens,
                    example.loss_weights > 0,
                )
                start = end
        for i, logps in _cut(view, layout, values, trained):
            assert i not in found
            found[i] = logps.tolist()
    want = {i: list(range(100 * i + n - n // 2, 100 * i + n)) for i, n in ((1, 6), (2, 7), (4, 9))}
    assert found == want | {7: list(range(706, 712))}
