"""Causal attention within the segments of packed rows, behind one function.

Every implementation honours segment ids or raises ValueError; none is swapped in silently for
another. The visible keys are a function of (segment, position in the row) alone.
Shape suffixes: B rows, T positions, S cache slots, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from posttrain.sharding import BATCH_AXES

_SPLASH_BLOCK = 512
_CHUNK, _CHUNKS = 128, 32  # queries of one chunk, at the least; chunks of a row, at the most
_NEGATIVE = -1e30  # a masked score: exp gives exactly 0
ATTENTION = "attention"  # what remat knows attention's results by
_LANES = 128  # splash's kernel cuts rows into blocks of whole lanes


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool [B, 1, T, T]: may query t see key s? Same segment and s <= t.

    Padding (segment 0) sees earlier padding, so that no row of the softmax is empty.
    """
    t = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return same & jnp.tril(jnp.ones((t, t), bool))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    implementation: str,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the earlier positions of the same segment; float32 softmax.

    q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K; segment_ids: int32 [B, T]. Gives
    [B, T, N, H] in q's dtype. implementation: reference (any device; holds [B, N, T, T]), chunked
    (any device; half of that), cudnn (GPU), splash (TPU), auto (see resolve).
    interpret: run splash's kernel on the CPU, slowly.
    Raises ValueError where the implementation asked for cannot do this exactly.
    """
    name = resolve(q, implementation, jax.default_backend())
    if name == "splash":
        return _splash(q, k, v, segment_ids, interpret=interpret)
    if name == "cudnn":
        return _cudnn(q, k, v, segment_ids)
    if name == "chunked":
        return _chunked(q, k, v, segment_ids)
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segment_ids), implementation="xla"
    )


def resolve(q: jax.Array, implementation: str, platform: str) -> str:
    """What `auto` stands for, by platform and q's shape and dtype alone; other names as they are.

    Raises ValueError on an unknown name, and where the kernel named takes no such q.
    """
    checks: dict[str, Callable[[jax.Array], str | None]] = {
        "reference": lambda _: None,
        "chunked": lambda _: None,
        "cudnn": _cudnn_refusal,
        "splash": _splash_refusal,
    }
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
        return kernel if kernel and checks[kernel](q) is None else "chunked"
    if implementation not in checks:
        raise ValueError(
            f"attention {implementation!r} is not known (there are: auto, {', '.join(checks)})"
        )
    if refusal := checks[implementation](q):
        raise ValueError(f"attention: {implementation} cannot do this: {refusal}")
    return implementation


def _cudnn_refusal(q: jax.Array) -> str | None:
    _, t, _, head_dim = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, found {q.dtype} (model.dtype)"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, found {head_dim}"
    return f"it needs rows of even length, found {t}" if t % 2 else None


def _splash_refusal(q: jax.Array) -> str | None:
    t = q.shape[1]
    return f"it needs rows of a multiple of {_LANES}, found {t}" if t % _LANES else None


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    # its own causal flag knows no segments: the whole mask goes in as one
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segment_ids), implementation="cudnn"
    )


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Chunk by chunk of queries against the keys up to the chunk's end.

    Half of the reference's arithmetic and memory, since keys after a chunk are never touched; the
    backward pass makes the scores again.
    """
    b, t, n, head_dim = q.shape
    groups = k.shape[2]
    size = max(_CHUNK, -(-t // _CHUNKS))
    q_BTKGH = q.reshape(b, t, groups, n // groups, head_dim)

    @jax.checkpoint
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, _NEGATIVE)
        p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", p, v)

    def chunk(start: int) -> jax.Array:
        end = min(start + size, t)
        rows = slice(start, end)
        same = segment_ids[:, rows, None] == segment_ids[:, None, :end]
        mask = same & (jnp.arange(start, end)[:, None] >= jnp.arange(end))
        return attend(q_BTKGH[:, rows], k[:, :end], v[:, :end], mask)

    return jnp.concatenate([chunk(start) for start in range(0, t, size)], 1).reshape(q.shape)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool
) -> jax.Array:
    """Pallas kernel for TPU. It cannot be partitioned by the compiler: shard_map does it."""
    mesh = jax.sharding.get_abstract_mesh()
    kernel = functools.partial(_splash_local, interpret=interpret)
    if mesh.empty:
        return kernel(q, k, v, segment_ids)
    shards = mesh.shape["tensor"]
    heads = "tensor" if q.shape[2] % shards == 0 and k.shape[2] % shards == 0 else None
    qkv, rows = PartitionSpec(BATCH_AXES, None, heads), PartitionSpec(BATCH_AXES)
    mapped = jax.shard_map(
        kernel, mesh=mesh, in_specs=(qkv, qkv, qkv, rows), out_specs=qkv, check_vma=False
    )
    return mapped(q, k, v, segment_ids)


def _splash_local(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, t, n, head_dim = q.shape
    size = next(b for b in (_SPLASH_BLOCK, 256, _LANES) if t % b == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    causal = masks.MultiHeadMask([masks.CausalMask((t, t))] * n)
    kernel: Any = splash.make_splash_mha_single_device(
        causal,
        block_sizes=blocks,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION,
    )
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # the kernel does not

    def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))  # heads first
    return jax.vmap(row)(q, k, v, segment_ids).swapaxes(1, 2).astype(q.dtype)


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    """Attention of one new token a row over its cache; float32 softmax.

    q: [B, 1, N, H]; keys, values: [B, S, K, H]; at: int32 [B], the new token's own slot: it sees
    slots 0..at. Gives [B, 1, N, H].
    """
    visible = jnp.arange(keys.shape[1]) <= at[:, None]
    return jax.nn.dot_product_attention(
        q, keys, values, mask=visible[:, None, None, :], implementation="xla"
    )
