"""Splash attention, jax's Pallas kernel for TPU, by the rules of models/attention.py.

Shape suffixes as there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

ATTENTION = "attention"  # what remat knows attention's results by
LANES = 128  # the kernel cuts rows into blocks of whole lanes
_BLOCK = 512


def make_kernel(
    t: int,
    heads: int,
    *,
    parts: int = 1,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    """The kernel of one row of T positions whose queries are cut into `parts`.

    It does not scale q. A pytree: what it skips lies in arrays, which are cut as the queries are.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = next(b for b in (_BLOCK, 256, LANES) if t // parts % b == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    if window is None:
        mask: Any = masks.CausalMask((t, t))
    else:
        mask = masks.LocalMask((t, t), window_size=(window - 1, 0), offset=0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION,
    )


def attend(
    kernel: Any, q: Any, k: Any, v: Any, query_ids: Any, key_ids: Any, _: Any, *, scale: float
) -> jax.Array:
    """One device's queries; where they lie in their rows, its part of the kernel knows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    def row(q: jax.Array, k: jax.Array, v: jax.Array, query_ids: Any, key_ids: Any) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(query_ids, key_ids))

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))  # heads first
    return jax.vmap(row)(q, k, v, query_ids, key_ids).swapaxes(1, 2).astype(q.dtype)
