"""The pieces of a decoder layer: weights and how they are gathered, RMSNorm, RoPE, MLP, attention.

Shape suffixes: B rows, T positions, D embed, N query heads, K key/value heads, H head_dim,
F mlp width, L layers of a stack. Weights hold all L of them; the scan hands a layer its slice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from posttrain.models import moe
from posttrain.models.attention import ATTENTION, attention
from posttrain.models.dropout import dropped
from posttrain.models.quantized import dense
from posttrain.models.spec import LayerKind, Rope, Spec, Stack
from posttrain.sharding import FSDP_AXES, constrain
from posttrain.types import Routing


def make_param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], dtype: Any, std: float | None
) -> nnx.Param:
    """A weight with its logical axes. std: of its normal values; None = ones, 0 = zeros."""
    assert len(shape) == len(axes), (shape, axes)
    if std is None:
        value = jnp.ones(shape, dtype)
    elif std == 0:
        value = jnp.zeros(shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype)
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, axes: tuple[str | None, ...]) -> Any:
    """The whole weight from its fsdp shards (tensor shards stay); the ONE place that does it.

    A stage for each of FSDP_AXES. The gradient is pinned to each stage's layout on the way back, so
    that it is summed and scattered and never kept whole: the transpose of a plain constraint would
    keep it replicated.
    """
    for stage in reversed(range(len(FSDP_AXES))):
        w = constrain(w, axes, gathered=FSDP_AXES[stage:])
    return w


def _gather_fwd(w: jax.Array, axes: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return gather(w, axes), None


def _gather_bwd(axes: tuple[str | None, ...], _: None, ct: jax.Array) -> tuple[jax.Array]:
    for stage in range(len(FSDP_AXES)):
        ct = constrain(ct, axes, gathered=FSDP_AXES[stage + 1 :])
    return (ct,)


gather.defvjp(_gather_fwd, _gather_bwd)


def weight(param: nnx.Param, dtype: Any) -> jax.Array:
    """A weight ready for a matmul: cast first, then gathered, so that half the bytes travel."""
    value = param.get_value()
    axes = tuple(param.get_metadata("out_sharding"))[-value.ndim :]
    return gather(dense(value, dtype).astype(dtype), axes)


def project(x: jax.Array, w: jax.Array, dims: int = 1) -> jax.Array:
    """x times w over the last `dims` dims of x and the first of w: one product of two matrices.

    With rows and positions apart the weight's gradient would sum over two dims, and XLA for the CPU
    transposes whole activations first.
    """
    inner = math.prod(w.shape[:dims])
    out = x.reshape(-1, inner) @ w.reshape(inner, -1)
    return out.reshape(*x.shape[: x.ndim - dims], *w.shape[dims:])


def linear(module: Any, name: str, x: jax.Array, dims: int = 1) -> jax.Array:
    """x times a layer's weight, module.<name>, plus what its adapter adds and module.<name>_bias,
    where there are any.

    The ONE place where a layer's weight meets its input; `dims` as in project. The module's
    `compute` says in which dtype. A compiled program's operations bear the weight's name.
    """
    dtype = module.compute.dtype
    with jax.named_scope(name):
        out = project(x, weight(getattr(module, name), dtype), dims)
    a = getattr(module, f"{name}_lora_a", None)
    if a is not None:
        b = getattr(module, f"{name}_lora_b")
        read = dropped(module, name, x)
        added = project(project(read, weight(a, dtype), dims), weight(b, dtype))
        out = out + added * jnp.asarray(module.adapter.scale, dtype)
    bias = getattr(module, f"{name}_bias", None)
    return out if bias is None else out + bias[...].astype(dtype)


def make_norm(
    rngs: nnx.Rngs, spec: Spec, shape: Sequence[int], axes: Sequence[str], compute: Compute
) -> nnx.Param:
    """A norm's weight, at first a scale of one."""
    return make_param(rngs, shape, axes, compute.param_dtype, 0 if spec.norm_offset else None)


def rms_norm(x: jax.Array, scale: nnx.Param, spec: Spec) -> jax.Array:
    """x / rms(x) * (norm_offset + scale) over scale's dims, in float32; the result in x's dtype."""
    x32, scale32 = x.astype(jnp.float32), scale[...].astype(jnp.float32)
    over = tuple(range(-scale32.ndim, 0))
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + spec.rms_eps)
    if spec.norm_offset:
        scale32 = scale32 + spec.norm_offset
    return (x32 * scale32).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dims, float32 [head_dim / 2].

    llama3 (Llama 3.1 release): wavelengths over original/low are slowed by `factor`, those
    under original/high kept, those between interpolated.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "default":
        return freqs
    if rope.kind == "linear":
        return (freqs / np.float32(rope.factor)).astype(np.float32)
    turns = rope.original_max_positions * freqs / np.float32(2 * np.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    return ((1 - keep) * freqs / np.float32(rope.factor) + keep * freqs).astype(np.float32)


Ropes = dict[Rope, tuple[jax.Array, jax.Array]]
"""cos and sin, float32 [B, T, 1, head_dim / 2], of each Rope among a model's layers."""


def rope_tables(spec: Spec, positions_BT: jax.Array) -> Ropes:
    """Computed once for all layers."""
    ropes = dict.fromkeys(kind.rope or spec.rope for kind in spec.pattern)
    tables = {}
    for rope in ropes:
        frequencies = rope_frequencies(rope, spec.head_dim)
        angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
        tables[rope] = jnp.cos(angles), jnp.sin(angles)
    return tables


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of x [B, T, N, H] in float32; the result in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Compute:
    """How layers are computed; none of it is in the weights. Hashable (it lives in the graph)."""

    dtype: Any
    param_dtype: Any
    remat: str
    attention: str


ROWS = ("batch", "length", None)
"""The logical dims of activations [B, T, D]."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, LayerKind], jax.Array]
"""q [B,T,N,H], k and v [B,T,K,H] -> [B,T,N,H]: training's attention or the decoder's cache."""


class Attention(nnx.Module):
    """Grouped-query attention; biases and norms of q and k only where the family has them."""

    def __init__(self, spec: Spec, stack: Stack, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.kind, self.compute = spec, stack.kind, compute
        n, d, h = len(stack.layers), spec.embed, spec.head_dim
        q, kv = spec.heads, spec.kv_heads
        dtype, std = compute.param_dtype, spec.init_std
        axes = ("layers", "embed", "heads", "head_dim")
        self.q = make_param(rngs, (n, d, q, h), axes, dtype, std)
        axes = ("layers", "embed", "kv_heads", "head_dim")
        self.k = make_param(rngs, (n, d, kv, h), axes, dtype, std)
        self.v = make_param(rngs, (n, d, kv, h), axes, dtype, std)
        axes = ("layers", "heads", "head_dim", "embed")
        self.o = make_param(rngs, (n, q, h, d), axes, dtype, std)
        if spec.qkv_bias:
            axes = ("layers", "heads", "head_dim")
            self.q_bias = make_param(rngs, (n, q, h), axes, dtype, 0)
            axes = ("layers", "kv_heads", "head_dim")
            self.k_bias = make_param(rngs, (n, kv, h), axes, dtype, 0)
            self.v_bias = make_param(rngs, (n, kv, h), axes, dtype, 0)
        if spec.out_bias:
            self.o_bias = make_param(rngs, (n, d), ("layers", "norm"), dtype, 0)
        if spec.qk_norm == "head":
            self.q_norm = make_norm(rngs, spec, (n, h), ("layers", "norm"), compute)
            self.k_norm = make_norm(rngs, spec, (n, h), ("layers", "norm"), compute)
        if spec.qk_norm == "width":
            axes = ("layers", "heads", "head_dim")
            self.q_norm = make_norm(rngs, spec, (n, q, h), axes, compute)
            axes = ("layers", "kv_heads", "head_dim")
            self.k_norm = make_norm(rngs, spec, (n, kv, h), axes, compute)

    def __call__(self, x_BTD: jax.Array, ropes: Ropes, attend: Attend) -> jax.Array:
        spec, rope = self.spec, ropes[self.kind.rope or self.spec.rope]
        q, k, v = (linear(self, name, x_BTD) for name in ("q", "k", "v"))
        if spec.qk_norm:
            q = rms_norm(q, self.q_norm, spec)
            k = rms_norm(k, self.k_norm, spec)
        out = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, self.kind)
        return linear(self, "o", checkpoint_name(out, ATTENTION), 2)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: Spec, stack: Stack, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.compute = spec, compute
        n, d, f = len(stack.layers), spec.embed, spec.mlp
        dtype, std = compute.param_dtype, spec.init_std
        self.gate = make_param(rngs, (n, d, f), ("layers", "embed", "mlp"), dtype, std)
        self.up = make_param(rngs, (n, d, f), ("layers", "embed", "mlp"), dtype, std)
        self.down = make_param(rngs, (n, f, d), ("layers", "mlp", "embed"), dtype, std)
        if spec.mlp_bias:
            self.gate_bias = make_param(rngs, (n, f), ("layers", "mlp"), dtype, 0)
            self.up_bias = make_param(rngs, (n, f), ("layers", "mlp"), dtype, 0)
            self.down_bias = make_param(rngs, (n, d), ("layers", "norm"), dtype, 0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate, up = linear(self, "gate", x_BTD), linear(self, "up", x_BTD)
        return linear(self, "down", ACTIVATIONS[self.spec.activation](gate) * up)


class Mixture(nnx.Module):
    """Experts in the MLP's place, and the router that chooses among them: see models/moe.py.

    Its weights meet their inputs there, not in `linear`: they take no adapter.
    """

    def __init__(self, spec: Spec, stack: Stack, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.compute = spec, compute
        n, d, f, e = len(stack.layers), spec.embed, spec.expert_mlp, stack.kind.experts
        param = functools.partial(make_param, rngs, dtype=compute.param_dtype, std=spec.init_std)
        self.router = param((n, d, e), ("layers", *moe.ROUTER_AXES))
        self.gate = param((n, e, d, f), ("layers", *moe.IN_AXES))
        self.up = param((n, e, d, f), ("layers", *moe.IN_AXES))
        self.down = param((n, e, f, d), ("layers", *moe.OUT_AXES))

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None) -> tuple[jax.Array, Routing]:
        weights = (
            w[...].astype(self.compute.dtype) for w in (self.router, self.gate, self.up, self.down)
        )
        return moe.moe_mlp(
            x_BTD,
            jnp.ones(x_BTD.shape[:2], bool) if real_BT is None else real_BT,
            *weights,
            chosen=self.spec.experts_chosen,
            normalised=self.spec.experts_normalised,
        )


class Layer(nnx.Module):
    """Attention and MLP with residuals, and the norms that the family has before and after them.

    Holds the weights of a stack's L layers.
    """

    def __init__(self, spec: Spec, stack: Stack, compute: Compute, rngs: nnx.Rngs):
        self.spec, self.compute = spec, compute
        norm = functools.partial(
            make_norm, rngs, spec, (len(stack.layers), spec.embed), ("layers", "norm"), compute
        )
        if spec.pre_norm:
            self.attention_norm = norm()
        self.attention = Attention(spec, stack, compute, rngs)
        if spec.post_norm:
            self.attention_post_norm = norm()
        if spec.pre_norm:
            self.mlp_norm = norm()
        if stack.kind.experts:
            self.moe = Mixture(spec, stack, compute, rngs)
        else:
            self.mlp = MLP(spec, stack, compute, rngs)
        if spec.post_norm:
            self.mlp_post_norm = norm()

    def __call__(
        self, x_BTD: jax.Array, ropes: Ropes, attend: Attend, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """One layer's output; self holds one layer's slice (no leading L).

        Of a mixture also what its router did with the tokens that are real (None: all are).
        """
        spec = self.spec
        x = constrain(x_BTD, ROWS)
        y = rms_norm(x, self.attention_norm, spec) if spec.pre_norm else x
        y = self.attention(y, ropes, attend)
        x = x + (rms_norm(y, self.attention_post_norm, spec) if spec.post_norm else y)
        x = constrain(x, ROWS)
        y = rms_norm(x, self.mlp_norm, spec) if spec.pre_norm else x
        y, routing = self.moe(y, real_BT) if hasattr(self, "moe") else (self.mlp(y), None)
        return x + (rms_norm(y, self.mlp_post_norm, spec) if spec.post_norm else y), routing


def segment_attend(spec: Spec, segment_ids_BT: jax.Array, implementation: str) -> Attend:
    """Training's attention: causal within each segment of a packed row."""
    return lambda q, k, v, kind: attention(
        q,
        k,
        v,
        segment_ids_BT,
        implementation=implementation,
        window=kind.window,
        softcap=spec.attention_softcap,
        scale=spec.attention_scale,
    )
