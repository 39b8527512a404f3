"""What a training step needs of each device's memory, from shapes alone, in milliseconds.

--search ranks by it (and by floors.py). Each term is a formula over a model's weights, so that it
can be followed and doubted; how far it is off is shown beside the plans that were compiled. Bytes
and numbers are of one device where nothing else is said. Sources: "How to scale your model"
(Austin et al. 2025), chapter 5 (what FSDP and tensor parallelism divide); Korthikanti et al. 2022,
arXiv:2205.05198, section 4 (activations of a layer); posttrain's own layers, head and optimiser.

Left out: adapters and frozen weights, norms' and biases' gathered copies, the batch itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from posttrain.models.layers import Compute
from posttrain.models.spec import RematName, Spec
from posttrain.models.transformer import Transformer
from posttrain.sharding import LOGICAL_RULES

Sizes = Mapping[str, int]
"""Of the mesh's axes, by the names of network.AXES."""


@dataclass(frozen=True)
class Weight:
    """One parameter: its path, shape and logical axes (sharding.LOGICAL_RULES)."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def layers(self) -> int:
        """How many layers' weights are stacked in it."""
        return self.shape[0] if self.axes[0] == "layers" else 1

    @property
    def matrix(self) -> bool:
        """Whether a layer's tokens are multiplied by it."""
        vector = "norm" in self.name or "bias" in self.name
        return self.axes[0] == "layers" and len(self.shape) > 2 and not vector

    @property
    def last(self) -> bool:
        """Whether it is the last matrix of its layer."""
        return self.name.endswith(".down")

    def ways(self, sizes: Sizes) -> dict[str, int]:
        """Mesh axis -> into how many parts it cuts the weight; a dim it cannot cut stays whole."""
        cut = {}
        for size, axis in zip(self.shape, self.axes, strict=True):
            rule = LOGICAL_RULES[axis]
            if rule and size % sizes[rule[0]] == 0:
                cut[rule[0]] = sizes[rule[0]]
        return cut

    def held(self, sizes: Sizes) -> float:
        """Numbers that a device keeps."""
        return math.prod(self.shape) / math.prod(self.ways(sizes).values())

    def gathered(self, sizes: Sizes) -> float:
        """Numbers of one layer's weight where it is used: all that no axis but fsdp cuts."""
        return self.held(sizes) * self.ways(sizes).get("fsdp", 1) / self.layers


def weights_of(spec: Spec) -> tuple[Weight, ...]:
    """All of a model's parameters; nothing is allocated."""
    compute = Compute(jnp.dtype("bfloat16"), jnp.dtype("float32"), "full", "auto")
    state = jax.eval_shape(lambda: nnx.split(Transformer(spec, compute, nnx.Rngs(0)))[1])
    return tuple(
        Weight(
            ".".join(map(str, path)),
            tuple(param.get_value().shape),
            tuple(param.get_metadata("out_sharding")),
        )
        for path, param in nnx.to_flat_state(state)
    )


@dataclass(frozen=True)
class Step:
    """One optimiser step, and how it is computed."""

    spec: Spec
    weights: tuple[Weight, ...]
    rows: int
    """Of a step, of all devices and micro-batches together."""
    length: int
    """Positions of a row."""
    accumulate: int = 1
    """Micro-batches."""
    together: int = 1
    """Rows that no two micro-batches may share: the sides of a pair, which are two."""
    remat: RematName = "full"
    trained: float = 1.0
    """Share of the positions that the vocabulary head sees."""
    head_chunk: int = 256
    param_bytes: int = 4
    compute_bytes: int = 2
    optimizer: str = "adamw"
    moment_bytes: int = 4
    reference_bytes: int = 0
    """Of a number of a live reference, which has a forward pass of its own; 0: there is none."""

    def tokens(self, sizes: Sizes) -> float:
        """Positions of a device in one micro-batch."""
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        return self.rows / self.accumulate / shards * self.length / sizes["context"]

    def refusals(self, sizes: Sizes) -> list[str]:
        """Why this mesh is none for this step; empty where it is one."""
        spec, found = self.spec, []
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        rows = self.rows / self.accumulate
        if rows % shards:
            found.append(
                f"the {rows:g} rows of a micro-batch do not divide over data x fsdp x expert="
                f"{shards}"
            )
        if sizes["context"] > 1 and self.length % (128 * sizes["context"]):
            found.append(f"context={sizes['context']} leaves no whole 128 positions of a row")
        experts = max(kind.experts for kind in spec.kinds)
        if sizes["expert"] > 1 and (not experts or experts % sizes["expert"]):
            found.append(f"expert={sizes['expert']} does not divide {experts} experts")
        mlp = spec.expert_mlp if experts else spec.mlp
        widths = {"heads": spec.heads, "key heads": spec.kv_heads, "columns of the mlp": mlp}
        for name, width in (widths | {"rows of the vocabulary": spec.vocab_rows}).items():
            if width % sizes["tensor"]:
                found.append(f"tensor={sizes['tensor']} does not divide {width} {name}")
        if spec.embed % sizes["fsdp"]:
            found.append(f"fsdp={sizes['fsdp']} does not divide the width {spec.embed}")
        return found


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest time of a step, which `phase` names."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    """Kept by the forward pass for the backward pass."""
    working: float
    """Weights gathered, and what one layer, or the head, computes with them."""
    phase: str

    @property
    def total(self) -> float:
        """What a device must have."""
        parts = (self.parameters, self.optimizer, self.gradients, self.activations, self.working)
        return sum(parts)


def memory(step: Step, sizes: Sizes) -> Memory:
    """parameters + optimiser's state + the fullest of three times:

    head       the vocabulary head's backward pass: its kernel gathered, a float32 gradient of it,
               a chunk's logits; all that the forward pass keeps
    layers     the first layer's backward pass: gradients of all layers have their place, weights
               of two layers are gathered (the next one's while this one's are used)
    embedding  the table's gradient, float32, beside all others
    """
    spec, weights, c = step.spec, step.weights, step.compute_bytes
    tokens, head = step.tokens(sizes), head_kernel(step, sizes)
    elements = sum(weight.held(sizes) for weight in weights)
    in_layers = sum(weight.held(sizes) for weight in weights if weight.axes[0] == "layers")
    saved = spec.layers * tokens * kept(step, sizes)
    positions = min(tokens * step.trained, step.head_chunk)
    logits = positions * head / spec.embed * (4 + 4 + c)  # float32, their gradient, its cast
    layer = max(
        sum(w.gathered(sizes) for w in weights if w.matrix and f"layers.{stack}." in w.name)
        for stack in spec.stacks
    )
    table = spec.vocab_rows * spec.embed / sizes["tensor"]
    widest = tokens * spec.embed * c
    phases = {
        "head": (0.0, saved, head * (c + 4) + logits + 2 * widest),
        "layers": (in_layers, saved, layer * 3 * c + tokens * computed(step, sizes)),
        "embedding": (elements, 0.0, table * 4 + widest),
    }

    def size(phase: str) -> float:
        made, activations, working = phases[phase]
        return made * step.param_bytes + activations + working

    phase = max(phases, key=size)
    made, activations, working = phases[phase]
    summed = elements * 4 if step.accumulate > 1 else 0  # over micro-batches, float32
    return Memory(
        parameters=elements * (step.param_bytes + step.reference_bytes),
        optimizer=sum(_moments(step, weight, sizes) for weight in weights),
        gradients=made * step.param_bytes + summed,
        activations=activations,
        working=working,
        phase=phase,
    )


def widths(spec: Spec, sizes: Sizes) -> tuple[float, float, float]:
    """Of a token on one device: numbers of its queries, of its keys and values, of its mlp."""
    t = sizes["tensor"]
    experts = any(kind.experts for kind in spec.kinds)
    q, kv = spec.heads * spec.head_dim / t, 2 * spec.kv_heads * spec.head_dim / t
    return q, kv, (spec.experts_chosen * spec.expert_mlp if experts else spec.mlp) / t


def kept(step: Step, sizes: Sizes) -> float:
    """Bytes that remat keeps of a token in each layer (models/transformer.py, REMAT).

    full: the layer's input. attention: also its result, twice (the kernel's own residual, and what
    the layer names), and the softmax's sum of each head in float32. dots: also q, k, v, o, gate
    and up, the matmuls whose results the backward pass reads. none: both. offload: nothing, the
    inputs lie in the host's memory.
    """
    spec, c = step.spec, step.compute_bytes
    q, kv, f = widths(spec, sizes)
    total = 0.0 if step.remat == "offload" else c * spec.embed
    if step.remat in ("none", "attention"):
        total += 2 * c * q + 4 * q / spec.head_dim
    if step.remat in ("none", "dots", "dots_batch"):
        total += c * (q + kv + spec.embed * (1 + spec.post_norm) + 2 * f)
    return total


def computed(step: Step, sizes: Sizes) -> float:
    """Bytes of a token while its layer's backward pass is under way: four times the width
    (inputs and their gradients), q, k, v and their gradients, and four of the mlp's."""
    q, kv, f = widths(step.spec, sizes)
    return step.compute_bytes * (4 * step.spec.embed + 3 * q + 2 * kv + 4 * f)


def head_kernel(step: Step, sizes: Sizes) -> float:
    """Numbers of the vocabulary head's kernel on a device, gathered; 0 where there is none."""
    spec = step.spec
    return spec.vocab_rows * spec.embed / sizes["tensor"] if spec.head == "lm" else 0.0


def _moments(step: Step, weight: Weight, sizes: Sizes) -> float:
    """Bytes of the optimiser's state for a weight (posttrain/optim.py).

    adamw: a first moment in moment_dtype and a second in float32. muon: for a layer's matrices the
    first alone. adafactor: means of rows and columns, float32, whole on every device.
    """
    held = weight.held(sizes)
    if step.optimizer == "adafactor":
        dims = sorted(weight.shape)[-2:]
        factored = len(dims) == 2 and min(dims) >= 128
        return 4 * math.prod(weight.shape) * sum(1 / d for d in dims) if factored else 4 * held
    second = 0 if step.optimizer == "muon" and weight.matrix else 4
    return held * (step.moment_bytes + second)
