"""The check of attention: its own definition is right, and wrong kernels are caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.doctor import kernels
from posttrain.doctor.base import Level, Subject
from posttrain.models.attention import resolve
from tests.doctor.found import bad, found


def small() -> kernels.Case:
    return kernels.make_case(2, 24, 4, 2, 8, np.float64)


def one_by_one(case: kernels.Case) -> np.ndarray:
    """The forward, one query after another."""
    out = np.zeros_like(case.q)
    b, t, n, h = case.q.shape
    for row, at, head in np.ndindex(b, t, n):
        segment = case.segments[row, at]
        seen = [s for s in range(at + 1) if segment and case.segments[row, s] == segment]
        if seen:
            kv = head // (n // case.k.shape[2])
            scores = case.k[row, seen, kv] @ case.q[row, at, head] / np.sqrt(h)
            p = np.exp(scores - scores.max())
            out[row, at, head] = p / p.sum() @ case.v[row, seen, kv]
    return out


def test_the_definition_is_the_slow_loops_and_its_gradients_are_differences() -> None:
    case, rng = small(), np.random.default_rng(1)
    right = kernels.by_definition(case)
    np.testing.assert_allclose(right["forward"], one_by_one(case), atol=1e-12)
    for name in "qkv":
        for _ in range(5):
            at = tuple(rng.integers(0, n) for n in getattr(case, name).shape)
            value, h = getattr(case, name)[at], 1e-6
            sums = []
            for shift in (h, -h):
                getattr(case, name)[at] = value + shift
                sums.append(np.sum(one_by_one(case) * case.back))
            getattr(case, name)[at] = value
            np.testing.assert_allclose(
                right[name][at], (sums[0] - sums[1]) / (2 * h), atol=1e-7, err_msg=name
            )


def test_the_case_has_what_kernels_get_wrong() -> None:
    case = kernels.make_case(2, 256, 4, 2, 8, np.float32)
    lengths = np.unique(case.segments[1], return_counts=True)[1]
    assert 1 in lengths, "a segment of one token"
    assert (case.segments == 0).any(), "padding"
    assert not (case.back[case.segments == 0]).any()
    assert all(border % 64 for border in np.cumsum(lengths[1:])[:-1])


def test_what_this_platform_can_is_right_and_the_rest_says_why(subject: Subject) -> None:
    all_found = found(kernels.attention, subject)
    assert not bad(all_found)
    said = {name: f.said for name, f in all_found.items()}
    assert len(said) == 2 * len(kernels.IMPLEMENTATIONS)
    assert said["splash bfloat16"] == "not here: it needs a TPU"
    assert said["chunked float32"].endswith("(auto takes it)")


def masked(change: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Attention whose mask is changed: (mask [B, 1, T, T], segment_ids [B, T]) -> mask."""

    def attend(q: Any, k: Any, v: Any, segment_ids: Any, *, implementation: str) -> jax.Array:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = change(jnp.tril(same), segment_ids)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    return attend


def ignores_segments(mask: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), mask.shape)


def sees_one_token_too_many(mask: jax.Array, ids: jax.Array) -> jax.Array:
    return mask | jnp.eye(ids.shape[1], k=-1, dtype=bool)


def loses_one_block(mask: jax.Array, ids: jax.Array) -> jax.Array:
    return mask & ~jnp.eye(ids.shape[1], k=-128, dtype=bool)


def sees_ahead(mask: jax.Array, ids: jax.Array) -> jax.Array:
    return mask | jnp.eye(ids.shape[1], k=1, dtype=bool)


@pytest.mark.parametrize(
    "change", [ignores_segments, sees_one_token_too_many, loses_one_block, sees_ahead]
)
def test_a_kernel_with_a_wrong_mask_is_wrong_in_both_dtypes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    monkeypatch.setattr(kernels, "attend", masked(change))
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", ("reference",))
    wrong = {"reference float32": Level.WRONG, "reference bfloat16": Level.WRONG}
    assert bad(found(kernels.attention, subject)) == wrong


def test_a_kernel_whose_gradient_alone_is_wrong_is_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.attend

    def attend(q: Any, k: Any, v: Any, **options: Any) -> jax.Array:
        return right(q, k + 0.5 * (k - jax.lax.stop_gradient(k)), v, **options)

    monkeypatch.setattr(kernels, "attend", attend)
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", ("chunked",))
    all_found = found(kernels.attention, subject)
    assert set(bad(all_found).values()) == {Level.WRONG}
    finding = all_found["chunked float32"]
    assert finding.figures["forward_error"] < finding.figures["allowed"]


def test_nan_is_wrong() -> None:
    right = kernels.by_definition(small())
    nan = right | {"k": right["k"] * np.nan}
    assert kernels.errors(nan, right) == (0.0, np.inf)


def test_a_kernel_that_refuses_or_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernels.make_case(2, 24, 4, 2, 8, np.float32)
    right = kernels.by_definition(case)
    one = kernels._one("cudnn", "float32", case, right, 1.0, "gpu", "")
    assert one.level == Level.OK
    assert "refuses" in one.said
    assert "bfloat16" in one.said

    def attend(*_: Any, **__: Any) -> jax.Array:
        raise RuntimeError("no kernel image for this card\nand more")

    monkeypatch.setattr(kernels, "attend", attend)
    one = kernels._one("chunked", "float32", case, right, 1.0, "gpu", "")
    assert one.level == Level.PROBLEM
    assert one.said == "fails: RuntimeError: no kernel image for this card"


def test_where_float32_is_cut_the_kernels_are_held_to_it_and_again_at_highest(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TPU's default: float32 products of one bfloat16 pass."""
    monkeypatch.setattr(kernels, "float32_error", lambda: 2.3e-3)
    seen: list[Any] = []
    compute = kernels.on_device

    def on_device(case: kernels.Case, implementation: str) -> dict[str, np.ndarray]:
        seen.append(jax.config.jax_default_matmul_precision)
        return compute(case, implementation)

    monkeypatch.setattr(kernels, "on_device", on_device)
    findings = [f for f in kernels.attention(subject) if "float32" in f.what and f.figures]
    assert [f.figures["allowed"] for f in findings] == [2.3e-3 * 25] * 2 + [3e-5] * 2
    assert seen[:4] == [None, None, "highest", "highest"]


def test_every_implementation_there_is_is_looked_at() -> None:
    with pytest.raises(ValueError, match="is not known") as refusal:
        resolve(jnp.zeros((1, 8, 1, 8)), "?", "cpu")
    names = re.findall(r"\w+", str(refusal.value).split("there are:")[1])
    assert set(names) - {"auto"} == set(kernels.IMPLEMENTATIONS)
