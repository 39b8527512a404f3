"""How long a training step takes at least: arithmetic, memory's traffic, the network's.

Counted from shapes, for one device, and held against what the chip's makers state. Floors assume
that each unit works at its peak and that the three overlap wholly: no program is faster, most are
slower, and none of it is a measurement. Sources: "How to scale your model" (Austin et al. 2025),
chapters 1 (rooflines), 3 (collectives), 4 (matmuls of a step) and 5 (traffic of FSDP and tensor
parallelism); what remat computes again, and what travels, is what posttrain's own layers do.

Left out: norms, softmax statistics, the routers' sums: all small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain.models.spec import LayerKind
from posttrain.plan.analytic import Sizes, Step, Weight, head_kernel, kept, widths
from posttrain.plan.network import Kind, Network, lay, wire_bytes
from posttrain.plan.topology import Slice
from posttrain.train.throughput import StepSize, train_flops

BLOCK = 512
"""Queries and keys of a block of the attention kernel, which computes blocks wholly or not."""

# What remat computes again: (all matmuls of a layer but its last, attention)
_AGAIN = {
    "none": (0, 0),
    "attention": (1, 0),
    "dots": (0, 1),
    "dots_batch": (0, 1),
    "full": (1, 1),
    "offload": (1, 1),
}


@dataclass(frozen=True)
class Collective:
    """All of a step's collectives of one purpose."""

    what: str
    kind: Kind
    axis: str
    wire: float
    """Bytes into each device."""
    seconds: float
    """At the least, one after the other."""


@dataclass(frozen=True)
class Floors:
    """Seconds that a step takes at least, by what would have to be faster."""

    compute: float
    hbm: float
    network: float
    flops: float
    """That a device does, what is computed again included."""
    model_flops: float
    """That a device's share of the step needs, by train/throughput.py's convention."""
    peak: float
    """FLOP/s of a device."""
    collectives: tuple[Collective, ...]

    @property
    def seconds(self) -> float:
        """Of a step, where everything overlaps."""
        return max(self.compute, self.hbm, self.network)

    @property
    def serial(self) -> float:
        """Of a step, where nothing does."""
        return self.compute + self.hbm + self.network

    @property
    def binds(self) -> str:
        """What sets the floor."""
        named = {"compute": self.compute, "HBM": self.hbm, "interconnect": self.network}
        return max(named, key=lambda name: named[name])

    @property
    def utilisation(self) -> float:
        """Upper bound of the model's FLOPs per second, as a share of the peak."""
        return self.model_flops / self.seconds / self.peak


def floors(step: Step, sizes: Sizes, one: Slice) -> Floors:
    """Of a step on these slices. ValueError where the mesh is not theirs."""
    chip, found = one.chip, _collectives(step, sizes, lay(sizes, one))
    peak = chip.tflops * 1e12 / chip.devices
    done = flops(step, sizes)
    return Floors(
        compute=done / peak,
        hbm=hbm_bytes(step, sizes) / (chip.hbm_gbs * 1e9 / chip.devices),
        network=sum(each.seconds for each in found),
        flops=done,
        model_flops=model_flops(step) / one.devices,
        peak=peak,
        collectives=found,
    )


def model_flops(step: Step) -> float:
    """Of all devices: train/throughput.py's, of full rows with one segment each."""
    positions = step.rows * step.length
    trained = round(positions * step.trained)
    size = StepSize(step.rows, trained, positions, np.full(step.rows, step.length, np.int64))
    return train_flops(step.spec, size, live_reference=step.reference_bytes > 0)


def seen(step: Step, kind: LayerKind, parts: int) -> float:
    """Keys that the kernel computes a query with, on the device that has most: the causal half of
    a row and half a block, of a window at the most the window and a block. Where a row is cut,
    the device with its end sees nearly all of it."""
    length = step.length
    causal = length * (1 - 1 / (2 * parts)) + min(BLOCK, length) / 2
    return causal if kind.window is None else min(causal, kind.window + BLOCK)


def used(step: Step, weight: Weight, sizes: Sizes) -> float:
    """Numbers of a layer's matrix that each token meets on a device: of experts the chosen."""
    whole = weight.gathered(sizes)
    if "experts" not in weight.axes:
        return whole
    experts = weight.shape[weight.axes.index("experts")]
    return whole * weight.ways(sizes)["expert"] * step.spec.experts_chosen / experts


def again(step: Step, weight: Weight) -> int:
    """How often remat computes its product anew: a layer's last result nobody reads but a norm."""
    matmuls, _ = _AGAIN[step.remat]
    return 0 if weight.last and not step.spec.post_norm else matmuls


def flops(step: Step, sizes: Sizes) -> float:
    """2 for a token and a weight forward, 4 backward, 2 for what is computed again. Attention is 2
    matmuls forward and 7 backward (scores are made anew in each of its two kernels); the head 2,
    4 and 2, since its logits are never kept."""
    spec, tokens = step.spec, step.tokens(sizes)
    reference = 1 if step.reference_bytes else 0
    total = sum(
        2
        * tokens
        * weight.layers
        * used(step, weight, sizes)
        * (3 + again(step, weight) + reference)
        for weight in step.weights
        if weight.matrix
    )
    q, _, _ = widths(spec, sizes)
    matmuls = 2 + 7 + 2 * _AGAIN[step.remat][1] + 2 * reference
    pairs = sum(seen(step, kind, sizes["context"]) for kind in spec.kinds)
    total += 2 * tokens * pairs * q * matmuls
    total += 2 * tokens * step.trained * head_kernel(step, sizes) * (4 + reference)
    return total * step.accumulate


def hbm_bytes(step: Step, sizes: Sizes) -> float:
    """Bytes between HBM and the chip, if all that is not a matmul is fused into its neighbours.

    A matmul reads its tokens and its weight and writes its result, forward, again, and twice
    backward; activation(gate) * up is made anew in each of the mlp's backward matmuls that reads
    it, of two arrays for one; gathered weights and gradients are written and read once more; what
    remat keeps is written, cut out of its stack, copied and read; each chunk of the head reads its
    kernel three times and adds to a float32 gradient of it; the optimiser reads and writes its
    state.
    """
    c, tokens, total = step.compute_bytes, step.tokens(sizes), 0.0
    reference = 1 if step.reference_bytes else 0
    for weight in step.weights:
        if weight.matrix:
            size = used(step, weight, sizes)
            read, written = _sides(step, weight, sizes)
            passes = 1 + again(step, weight) + reference
            total += weight.layers * c * tokens * (read + written) * (passes + 2)
            gathers = 2 * (2 + reference) if weight.ways(sizes).get("fsdp", 1) > 1 else 0
            total += weight.layers * c * size * (passes + 1 + gathers / 2 + 2)
    q, kv, f = widths(step.spec, sizes)
    attention, mlp = c * (2 * q + kv) * 4, c * f * 6
    total += step.spec.layers * tokens * (attention + mlp + 4 * kept(step, sizes))
    kernel, positions = head_kernel(step, sizes), tokens * step.trained
    chunks = -(-positions // step.head_chunk)
    total += kernel * (chunks * (3 * c + 8) + reference * chunks * c)
    total += positions * (kernel / step.spec.embed) * 4 * 6
    held = sum(weight.held(sizes) for weight in step.weights)
    state = 2 * step.param_bytes + 2 * (step.moment_bytes + 4) + 4 * 2
    return total * step.accumulate + held * state


def _sides(step: Step, weight: Weight, sizes: Sizes) -> tuple[float, float]:
    """Numbers of a token that go into a layer's matmul, and that come out of it."""
    embed = step.spec.embed
    other = used(step, weight, sizes) / embed
    return (other, embed) if weight.axes[-1] == "embed" else (embed, other)


def _collectives(step: Step, sizes: Sizes, network: Network) -> tuple[Collective, ...]:
    """What crosses the network: see the comment at each."""
    c, tokens, spec = step.compute_bytes, step.tokens(sizes), step.spec
    passes = 2 + (1 if step.reference_bytes else 0)
    found: list[Collective] = []

    def add(what: str, kind: Kind, axis: str, size: float, times: float = 1) -> None:
        if (n := sizes[axis]) > 1 and size:
            times *= step.accumulate
            wire = times * wire_bytes(kind, n, size)
            found.append(
                Collective(what, kind, axis, wire, times * network.seconds(kind, axis, size))
            )

    # A layer's weights are gathered over fsdp for the forward and for the backward pass, and their
    # gradients scattered once, all in the compute dtype.
    matrices = [weight for weight in step.weights if weight.matrix]
    size = sum(w.layers * w.gathered(sizes) * c for w in matrices if "fsdp" in w.ways(sizes))
    add("layers' weights", "all-gather", "fsdp", size, passes)
    add("layers' gradients", "reduce-scatter", "fsdp", size)
    # The head's kernel likewise, its gradient in float32; the table is gathered for the forward
    # pass alone.
    kernel, table = head_kernel(step, sizes), spec.vocab_rows * spec.embed / sizes["tensor"]
    add("head", "all-gather", "fsdp", kernel * c, passes)
    add("head's gradient", "reduce-scatter", "fsdp", kernel * 4)
    add("embedding", "all-gather", "fsdp", table * c, passes - 1)
    add("embedding's gradient", "reduce-scatter", "fsdp", table * 4)
    # What is left of gradients is summed over the axes that hold copies of the weights.
    for axis in ("data", "expert", "context"):
        copied = [w for w in matrices if axis not in w.ways(sizes)]
        size = sum(w.held(sizes) * c for w in copied)
        add("gradients of copies", "all-reduce", axis, size + (kernel + table) * 4 / sizes["fsdp"])
    # tensor: attention and mlp each sum activations forward, and their inputs' gradients backward;
    # attention's again where it is computed again.
    size = tokens * spec.embed * c
    sums = 2 * passes + _AGAIN[step.remat][0]
    add("activations", "all-reduce", "tensor", size, spec.layers * sums + 2)
    # context: keys and values of whole rows, gathered for each pass; their gradients scattered.
    _, kv, _ = widths(spec, sizes)
    size = tokens * sizes["context"] * kv * c * spec.layers
    add("keys and values", "all-gather", "context", size, passes)
    add("gradients of keys", "reduce-scatter", "context", size)
    # expert: each device gets its group's tokens, and their sums go back; backward the other way.
    mixtures = sum(1 for kind in spec.kinds if kind.experts)
    size = tokens * sizes["expert"] * spec.embed * c * mixtures
    add("tokens to experts", "all-gather", "expert", size, passes + _AGAIN[step.remat][0])
    add("tokens from experts", "reduce-scatter", "expert", size, passes)
    return tuple(found)
