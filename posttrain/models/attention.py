"""Causal attention within the segments of packed rows, behind one function.

Every implementation honours segment ids, windows and soft caps or raises ValueError; none is
swapped in silently for another. The visible keys are a function of (segment, position in the row)
alone.
Shape suffixes: B rows, T positions (of queries), S of keys, N query heads, K key/value heads, G
query heads of a key head, H head_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from posttrain.models import splash
from posttrain.models.splash import ATTENTION as ATTENTION
from posttrain.sharding import batch_shards, partition_spec

_CHUNK, _CHUNKS = 128, 32  # queries of one chunk, at the least; chunks of a row, at the most
_NEGATIVE = -1e30  # a masked score: exp gives exactly 0


@dataclass(frozen=True)
class _Rules:
    """How scores are made, beside causality and segments."""

    scale: float
    window: int | None
    softcap: float | None


def _visible(query_ids_BT: jax.Array, key_ids_BS: jax.Array, first: Any, window: int | None) -> Any:
    """bool [B, T, S]: may query t see key s? Same segment, not ahead of it, and nearer than window.

    Padding (segment 0) sees earlier padding, so that no row of the softmax is empty. `first`: how
    far the first query lies behind the first key.
    """
    behind = first + jnp.arange(query_ids_BT.shape[1])[:, None] - jnp.arange(key_ids_BS.shape[1])
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    return seen & (query_ids_BT[:, :, None] == key_ids_BS[:, None, :])


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    implementation: str,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(cap(q k * scale)) v over the earlier positions of the same segment; float32 softmax.

    q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K; segment_ids: int32 [B, T]. Gives
    [B, T, N, H] in q's dtype. implementation: reference (any device; holds [B, N, T, T]), chunked
    (any device; half of that, and no key before the window), cudnn (GPU), splash (TPU), auto (see
    resolve).
    window: query t sees keys s with t - s < window alone (Hugging Face's sliding_window); None:
    all. softcap: scores x become softcap * tanh(x / softcap) (Gemma 2, arXiv:2408.00118, section
    2); None: they stay. scale: None is 1 / sqrt(H).
    interpret: run splash's kernel on the CPU, slowly.
    Raises ValueError where the implementation asked for cannot do this exactly.
    """
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window is {window}, expected at least 1 (a token sees itself)"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap is {softcap}, expected more than 0")
    rules = _Rules(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    mesh = jax.sharding.get_abstract_mesh()
    cut = _cut(q, k, mesh)
    parts = mesh.shape["context"] if cut and cut[1] else 1
    name = resolve(q, implementation, _platform(mesh), softcap=softcap, context=parts)
    if name == "splash":
        return _splash(q, k, v, segment_ids, rules, cut, interpret=interpret)
    local = {"reference": _reference, "cudnn": _cudnn, "chunked": _chunked}[name]
    if parts == 1:  # the compiler cuts rows and heads by itself
        return local(q, k, v, segment_ids, segment_ids, 0, rules)
    return _mapped(functools.partial(local, rules=rules), mesh, cut)(q, k, v, segment_ids)


def _platform(mesh: Any) -> str:
    """Of the devices that a program is for: the mesh's, which need not be here (posttrain/plan)."""
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def _cut(q: jax.Array, k: jax.Array, mesh: Any) -> PartitionSpec | None:
    """How [B, T, heads, H] lies on the mesh. None: there is none, or it does not divide the rows.

    Heads are cut where `tensor` divides those of k and q, positions where `context` divides them.
    """
    if mesh.empty or q.shape[0] % batch_shards(mesh):
        return None
    fewest = (*q.shape[:2], math.gcd(q.shape[2], k.shape[2]))
    names = partition_spec(("batch", "length", "heads"), fewest, mesh)
    return PartitionSpec(*(n if n is None or _size(mesh, n) > 1 else None for n in names))


def _size(mesh: Any, entry: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in ([entry] if isinstance(entry, str) else entry))


def _mapped(local: Callable[..., jax.Array], mesh: Any, cut: Any, *first: Any) -> Any:
    """(q, k, v, segment ids) -> each device's queries against all keys of their rows.

    Keys, values and segment ids are gathered over `context`, and the keys' gradients scattered.
    first: layouts of arguments that come before q.
    """

    def shard(*args: Any) -> jax.Array:
        *before, q, k, v, ids = args
        if cut[1] is None:
            return local(*before, q, k, v, ids, ids, 0)
        k, v, keys = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, ids))
        return local(*before, q, k, v, ids, keys, jax.lax.axis_index("context") * q.shape[1])

    specs = (*first, cut, cut, cut, PartitionSpec(*cut[:2]))
    return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)


def resolve(
    q: jax.Array,
    implementation: str,
    platform: str,
    *,
    softcap: float | None = None,
    context: int = 1,
) -> str:
    """What `auto` stands for, by platform, q's shape and dtype, softcap and the number of devices
    that a row is cut over; other names as they are.

    Raises ValueError on an unknown name, and where the kernel named cannot do it.
    """
    checks: dict[str, Callable[[], str | None]] = {
        "reference": lambda: None,
        "chunked": lambda: None,
        "cudnn": lambda: _cudnn_refusal(q, softcap, context),
        "splash": lambda: _splash_refusal(q, context),
    }
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
        return kernel if kernel and checks[kernel]() is None else "chunked"
    if implementation not in checks:
        raise ValueError(
            f"attention {implementation!r} is not known (there are: auto, {', '.join(checks)})"
        )
    if refusal := checks[implementation]():
        raise ValueError(f"attention: {implementation} cannot do this: {refusal}")
    return implementation


def _cudnn_refusal(q: jax.Array, softcap: float | None, context: int) -> str | None:
    _, t, _, head_dim = q.shape
    if context > 1:
        return f"it takes whole rows, and mesh.context={context} cuts them"
    if softcap is not None:
        return f"it knows no soft cap of scores, and this model has one ({softcap:g})"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, found {q.dtype} (model.dtype)"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, found {head_dim}"
    return f"it needs rows of even length, found {t}" if t % 2 else None


def _splash_refusal(q: jax.Array, context: int) -> str | None:
    t, lanes = q.shape[1], splash.LANES
    if t % (lanes * context) == 0:
        return None
    each = f" for each of mesh.context={context} devices" if context > 1 else ""
    return f"it needs rows of a multiple of {lanes}{each}, found {t}"


def _capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: Any, rules: _Rules) -> jax.Array:
    """The formula: q [B, T, K, G, H] of G query heads a key head, k and v [B, S, K, H]."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = _capped(scores * rules.scale, rules.softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, _NEGATIVE)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v)


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: Any, rules: _Rules) -> jax.Array:
    """All scores at once: jax's own function, where it knows of all the rules."""
    if rules.softcap is None:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask_BTS[:, None], scale=rules.scale, implementation="xla"
        )
    return _attend(_grouped(q, k), k, v, mask_BTS, rules).reshape(q.shape)


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, K, N / K, H]."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])


# Of the next three: q [B, T, N, H] at positions `first` .. `first` + T of the row that k and v
# [B, S, K, H] are of, and the segment ids of both.


def _reference(
    q: Any, k: Any, v: Any, query_ids: Any, key_ids: Any, first: Any, rules: _Rules
) -> jax.Array:
    return _whole(q, k, v, _visible(query_ids, key_ids, first, rules.window), rules)


def _cudnn(
    q: Any, k: Any, v: Any, query_ids: Any, key_ids: Any, first: Any, rules: _Rules
) -> jax.Array:
    # its own causal and window flags know no segments: the whole mask goes in as one
    mask = _visible(query_ids, key_ids, first, rules.window)[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=rules.scale, implementation="cudnn"
    )


def _chunked(
    q: Any, k: Any, v: Any, query_ids: Any, key_ids: Any, first: Any, rules: _Rules
) -> jax.Array:
    """Chunk by chunk of queries against the keys from the window's start to the chunk's end.

    Half of the reference's arithmetic and memory without a window, since keys after a chunk are
    never touched; the backward pass makes the scores again. Where `first` is known to the device
    alone, keys after a chunk are touched too.
    """
    t, s = q.shape[1], k.shape[1]
    size = max(_CHUNK, -(-t // _CHUNKS))
    q_BTKGH = _grouped(q, k)
    attend = jax.checkpoint(functools.partial(_attend, rules=rules))

    def chunk(start: int) -> jax.Array:
        end = min(start + size, t)
        low, high = _keys(first + start, end - start, s, rules.window)
        rows, ids = query_ids[:, start:end], _span(key_ids, low, high)
        mask = _visible(rows, ids, first + start - low, rules.window)
        return attend(q_BTKGH[:, start:end], _span(k, low, high), _span(v, low, high), mask)

    return jnp.concatenate([chunk(start) for start in range(0, t, size)], 1).reshape(q.shape)


def _keys(first: Any, queries: int, keys: int, window: int | None) -> tuple[Any, int]:
    """(the first key that a chunk of queries touches, how many): static numbers if `first` is."""
    before = first if window is None else window - 1
    if isinstance(first, int):
        low = max(0, first - before)
        return low, first + queries - low
    if window is None or queries + before >= keys:
        return 0, keys
    number = queries + before
    return jnp.clip(first - before, 0, keys - number), number


def _span(x: jax.Array, low: Any, number: int) -> jax.Array:
    """x[:, low : low + number]."""
    if isinstance(low, int):
        return x[:, low : low + number]
    return jax.lax.dynamic_slice_in_dim(x, low, number, axis=1)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, rules: _Rules,
    cut: PartitionSpec | None, *, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Pallas kernel for TPU. It cannot be partitioned by the compiler: shard_map does it."""
    mesh = jax.sharding.get_abstract_mesh()
    make = functools.partial(
        splash.make_kernel, window=rules.window, softcap=rules.softcap, interpret=interpret
    )
    local = functools.partial(splash.attend, scale=rules.scale)
    t, heads = q.shape[1:3]
    if mesh.empty:
        return local(make(t, heads), q, k, v, segment_ids, segment_ids, 0)
    if cut is None:
        raise ValueError(f"attention: splash needs rows that the mesh divides, found {q.shape[0]}")
    heads //= mesh.shape["tensor"] if cut[2] else 1
    kernel = make(t, heads, parts=mesh.shape["context"] if cut[1] else 1)
    layout = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, cut[1])))
    return _mapped(local, mesh, cut, layout)(kernel, q, k, v, segment_ids)
