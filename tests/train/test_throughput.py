"""FLOPs of a step against a count of every matmul, one by one."""

from __future__ import annotations

import dataclasses

import numpy as np

from posttrain.models.spec import LayerKind, Rope, Spec
from posttrain.train.throughput import StepSize, train_flops

SPEC = Spec(
    family="llama", vocab_size=50, vocab_rows=64, embed=12, layers=3, heads=4, kv_heads=2,
    head_dim=5, mlp=17, max_positions=99, rms_eps=1e-5, rope=Rope(), tied=False, config_json="{}",
)  # fmt: skip


def forward_flops(
    segments: list[int], trained: int, windows: tuple[int, ...] = (99, 99, 99)
) -> int:
    """2 FLOPs per multiply-add, matmul by matmul, query by query; windows: of each layer."""
    total = 0
    for n in segments:
        for position in range(n):
            for window in windows:
                total += 2 * 12 * 4 * 5  # q
                total += 2 * 2 * 12 * 2 * 5  # k, v
                total += 2 * 4 * 5 * 12  # o
                total += 3 * 2 * 12 * 17  # gate, up, down
                total += min(position + 1, window) * 4 * (2 * 5 + 2 * 5)  # scores, then values
    return total + trained * 2 * 12 * 50


def test_train_flops_count_three_times_the_forward_matmuls() -> None:
    segments, trained = [7, 1, 20], 11
    size = StepSize(
        examples=3,
        trained=trained,
        positions=64,
        segments=np.array(segments),
    )
    assert train_flops(SPEC, size) == 3 * forward_flops(segments, trained)
    assert train_flops(SPEC, size, live_reference=True) == 4 * forward_flops(segments, trained)
    # of adapters: no gradients of the model's matrices; attention has none
    narrow = dataclasses.replace(SPEC, pattern=(LayerKind(window=0),))  # no attention at all
    matmuls = train_flops(narrow, size) / 3
    gradients = train_flops(SPEC, size) - train_flops(SPEC, size, adapters=True)
    assert gradients == matmuls
    with_reference = train_flops(SPEC, size, live_reference=True, adapters=True)
    assert with_reference == 4 * forward_flops(segments, trained) - matmuls


def test_keys_before_a_window_count_nothing() -> None:
    kinds = (LayerKind(window=5), LayerKind(), LayerKind(window=1))
    spec, segments = dataclasses.replace(SPEC, pattern=kinds), [7, 1, 20]
    size = StepSize(examples=3, trained=11, positions=64, segments=np.array(segments))
    assert train_flops(spec, size) == 3 * forward_flops(segments, 11, (5, 99, 1))


def test_of_a_mixture_the_experts_of_a_token_count() -> None:
    """Two of its three layers: a router of 12 x 6, and 2 of 6 experts."""
    kinds = (LayerKind(), LayerKind(experts=6), LayerKind(experts=6))
    mixture = dataclasses.replace(SPEC, pattern=kinds, experts_chosen=2, expert_mlp=7)
    size = StepSize(examples=1, trained=4, positions=16, segments=np.array([10]))
    gap = 2 * 12 * (2 * 3 * 7 + 6 - 3 * 17)
    assert train_flops(mixture, size) - train_flops(SPEC, size) == 6 * 10 * gap


def test_pitfall_33_padding_and_untrained_positions_count_nothing() -> None:
    size = StepSize(examples=1, trained=4, positions=16, segments=np.array([10]))
    wider = dataclasses.replace(size, positions=1024)
    assert train_flops(SPEC, wider) == train_flops(SPEC, size)
    less = dataclasses.replace(size, trained=3)
    assert train_flops(SPEC, size) - train_flops(SPEC, less) == 6 * 12 * 50
