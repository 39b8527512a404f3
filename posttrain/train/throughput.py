"""How much arithmetic a step is, by a stated convention, and what share of the peak that makes.

CONVENTION: 6 FLOPs (2 forward, 4 backward) per weight of each matmul per token that passes it: the
layers' matrices once per non-padding token (of a mixture the router and the experts that a token is
sent to), the vocabulary head once per TRAINED token (it runs on no other; a reward model has none).
Attention is causal and within its segment: a segment of n tokens has n (n + 1) / 2 query-key pairs,
less those before the window in layers that have one, each 2 matmuls of 2 * heads * head_dim FLOPs
forward, three times that in training. Where adapters alone are trained the model's weights get no
gradient, and their matmuls are 4 FLOPs (2 forward, 2 backward); the adapters' own count nothing. A
live reference adds a forward pass of all of it. Padding, rematerialisation and the optimiser count
nothing, nor do passes for what a loss must know of a step's other micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain.models.spec import Spec

CONVENTION = "6 FLOPs/weight/token, causal attention, non-padding tokens, head on trained tokens"

# Peak dense bfloat16 TFLOP/s of one device as jax names it; vendors' data sheets.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}


@dataclass(frozen=True, eq=False)
class StepSize:
    """What one optimiser step holds, counted on the host from the plan."""

    examples: int
    trained: int
    positions: int  # rows * row length, padding included
    segments: np.ndarray  # int64: the tokens of each

    @property
    def tokens(self) -> int:
        """Not padding."""
        return int(self.segments.sum())

    def keys_seen(self, window: int | None) -> int:
        """By all queries: their own and those before it, back to the window's start."""
        n = self.segments
        beyond = np.maximum(n - (n if window is None else window), 0)
        return int((n * (n + 1) - beyond * (beyond + 1)).sum()) // 2


def train_flops(
    spec: Spec, size: StepSize, *, live_reference: bool = False, adapters: bool = False
) -> float:
    """FLOPs of one optimiser step by CONVENTION."""
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attended = spec.layers * (2 * width + 2 * kv_width)
    mixed = 3 * spec.experts_chosen * spec.expert_mlp
    mlps = sum(mixed + kind.experts if kind.experts else 3 * spec.mlp for kind in spec.kinds)
    matmuls = 2 * spec.embed * (attended + mlps) * size.tokens
    matmuls += 2 * spec.embed * spec.vocab_size * size.trained if spec.head == "lm" else 0
    seen = {window: size.keys_seen(window) for window in {kind.window for kind in spec.kinds}}
    attention = 4 * width * sum(seen[kind.window] for kind in spec.kinds)
    passes = 1 if live_reference else 0
    return float(matmuls * (passes + (2 if adapters else 3)) + attention * (passes + 3))
