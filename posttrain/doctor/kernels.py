"""Attention on this device against its definition, in float64 on the host.

Shape suffixes as in models/attention.py. An error is the largest difference of any element that is
not padding, relative to the right element plus the root mean square of all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.doctor.base import Finding, Findings, Level, Subject
from posttrain.doctor.matmul import FLOAT32, float32_error
from posttrain.models.attention import attention as attend
from posttrain.models.attention import resolve

IMPLEMENTATIONS = ("reference", "chunked", "cudnn", "splash")
_ONLY_ON = {"cudnn": ("gpu", "an NVIDIA card"), "splash": ("tpu", "a TPU")}
# several times what the reference shows; a key too many or too few gives 0.3 and more
_TOLERANCE = {"float32": 3e-5, "bfloat16": 8e-2}
_COARSE = 25  # times the error of a float32 product, where those are cut to fewer bits


@dataclass(frozen=True)
class Case:
    """Packed rows: q [B, T, N, H], k and v [B, T, K, H], the gradient that comes back, segments."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    back: np.ndarray
    segments: np.ndarray


def make_case(b: int, t: int, n: int, k: int, h: int, dtype: Any) -> Case:
    """Segments whose borders lie on no block's border, one of a single token, and padding."""
    rng = np.random.default_rng(0)
    ends = [int(t * part) + 1 for part in (0.13, 0.55, 0.93)]
    segments = np.zeros((b, t), np.int32)
    segments[:, : ends[0]] = 1
    segments[:, ends[0]] = 2
    segments[:, ends[0] + 1 : ends[1]] = 3
    segments[:, ends[1] : ends[2]] = 4
    segments[0] = np.where(segments[0] > 2, 3, segments[0])  # and one longer than the others

    def draw(heads: int) -> np.ndarray:
        return np.asarray(rng.normal(size=(b, t, heads, h)), dtype)

    q, keys, values, back = draw(n), draw(k), draw(k), draw(n)
    return Case(q, keys, values, np.where(segments[..., None, None] > 0, back, 0), segments)


def by_definition(case: Case) -> dict[str, np.ndarray]:
    """forward: softmax(q k / sqrt(H)) v over earlier positions of the segment; q, k, v: gradients.

    All in float64; the forward is 0 at padding.
    """
    b, t, n, h = case.q.shape
    groups = n // case.k.shape[2]

    def heads_first(x: np.ndarray, repeat: int = 1) -> np.ndarray:
        return np.repeat(x.astype(np.float64), repeat, axis=2).swapaxes(1, 2)

    q, back = heads_first(case.q), heads_first(case.back)
    k, v = heads_first(case.k, groups), heads_first(case.v, groups)
    same = case.segments[:, None, :, None] == case.segments[:, None, None, :]
    seen = same & np.tril(np.ones((t, t), bool))
    scores = np.where(seen, q @ k.swapaxes(2, 3) / np.sqrt(h), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = back @ v.swapaxes(2, 3)
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdims=True)) / np.sqrt(h)

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(b, -1, groups, t, h).sum(2).swapaxes(1, 2)

    return {
        "forward": (p @ v).swapaxes(1, 2) * (case.segments > 0)[..., None, None],
        "q": (d_scores @ k).swapaxes(1, 2),
        "k": grouped(d_scores.swapaxes(2, 3) @ q),
        "v": grouped(p.swapaxes(2, 3) @ back),
    }


def on_device(case: Case, implementation: str) -> dict[str, np.ndarray]:
    """What by_definition gives, by an implementation of models/attention.py."""

    @jax.jit
    def both(q: Any, k: Any, v: Any, back: Any, segments: Any) -> Any:
        f = functools.partial(attend, segment_ids=segments, implementation=implementation)
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(back)

    out, *gradients = both(case.q, case.k, case.v, case.back, case.segments)
    found = dict(zip("qkv", gradients, strict=True))
    found["forward"] = out * (case.segments > 0)[..., None, None]
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, float]:
    """(forward, the worst gradient); not a number counts as infinite."""

    def error(name: str) -> float:
        right = wanted[name]
        apart = np.abs(found[name] - right) / (np.abs(right) + np.sqrt(np.mean(right**2)))
        return float(np.nan_to_num(apart, nan=np.inf).max())

    return error("forward"), max(error(name) for name in "qkv")


def attention(on: Subject) -> Findings:
    """kernels against the definition in float64: forward and gradients, packed segments"""
    platform = on.local_devices()[0].platform
    shape = (2, 256, 4, 2, 64) if platform == "cpu" else (1, 1024, 4, 2, 128)
    coarse = float32_error()
    for dtype in (jnp.float32, jnp.bfloat16):
        name = jnp.dtype(dtype).name
        case = make_case(*shape, dtype)
        wanted = by_definition(case)
        allowed = _TOLERANCE[name]
        if name == "float32" and coarse > FLOAT32:
            allowed = max(allowed, _COARSE * coarse)
        auto = resolve(jnp.asarray(case.q), "auto", platform)
        for implementation in IMPLEMENTATIONS:
            chosen = " (auto takes it)" if implementation == auto else ""
            yield _one(implementation, name, case, wanted, allowed, platform, chosen)
        if allowed > _TOLERANCE[name]:
            with jax.default_matmul_precision("highest"):
                for implementation in ("reference", "chunked"):
                    yield _one(
                        implementation, name, case, wanted, _TOLERANCE[name], platform, ", highest"
                    )


def _one(
    implementation: str,
    dtype: str,
    case: Case,
    wanted: dict[str, np.ndarray],
    allowed: float,
    platform: str,
    note: str,
) -> Finding:
    what = f"{implementation} {dtype}"
    where, hardware = _ONLY_ON.get(implementation, (platform, ""))
    if platform != where:
        return Finding(what, f"not here: it needs {hardware}")
    try:
        resolve(jnp.asarray(case.q), implementation, platform)
    except ValueError as refusal:
        return Finding(what, f"refuses: {refusal}")
    todo = f"choose another by model.attention, and report {implementation} with the versions above"
    try:
        forward, gradient = errors(on_device(case, implementation), wanted)
    except Exception as error:  # a kernel that does not compile or run, whatever it raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        said = f"fails: {type(error).__name__}: {first[:200]}"
        return Finding(what, said, Level.PROBLEM, todo)
    right = max(forward, gradient) <= allowed
    return Finding(
        what,
        f"error {forward:.1e}, of gradients {gradient:.1e}; allowed {allowed:.0e}{note}",
        Level.OK if right else Level.WRONG,
        "" if right else todo,
        {"forward_error": forward, "gradient_error": gradient, "allowed": allowed},
    )
