"""What one instruction costs: arithmetic, bytes to and from HBM, the compiler's estimate of cycles.

FLOPs are those of matrix products (dots and convolutions, as which a TPU's compiler writes them)
and of splash attention's kernels; what is done element by element counts nothing. Bytes are of
arrays that lie in HBM where an instruction reads or writes them: what the compiler keeps in the
memory on the chip counts nothing, and of an array that is read in slices the slice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.plan import hlo
from posttrain.plan.hlo import Computation, Instruction, Module, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "all-gather-done"),
    *("all-reduce-done", "collective-permute-done", "send-done", "recv-done", "add-dependency"),
}
"""Operations that move nothing, or whose bytes were counted with another."""
_SLICES = ("dynamic-slice", "slice", "gather")
# Matrix products of each of splash attention's kernels, for every block that it visits: scores and
# values; scores again, dP and dQ; scores again, dP, dV and dK.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH_BLOCK = 512


@dataclass(frozen=True)
class Work:
    """Of one run of an instruction."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    kernel: bool = False  # a kernel's call, which the compiler knows nothing of

    @property
    def estimated(self) -> float:
        """FLOPs of which the compiler says how long they take."""
        return self.flops if self.cycles else 0.0


@dataclass(frozen=True)
class Counter:
    """windows: of each layer's attention, None where it sees all: what splash's kernels skip."""

    module: Module
    windows: Sequence[int | None] = (None,)

    def work(self, computation: Computation, one: Instruction) -> Work:
        """Of an instruction outside fusions."""
        if one.op in _FREE:
            return Work()
        flops = flops_of(computation, one)
        for where, inner in hlo.inside(self.module, one):
            flops += flops_of(where, inner)
        cycles = one.attribute(r'"estimated_cycles":"(\d+)"')
        if kernel := one.attribute(r'custom_call_target="(tpu_custom_call)"') or "":
            flops += self._splash(computation, one)
        return Work(flops, self._moved(computation, one), float(cycles or 0), bool(kernel))

    def _splash(self, computation: Computation, one: Instruction) -> float:
        """Of a kernel's call: q [.., N, T, H] and k [.., K, S, H] are the first operands of four
        bytes less and three dims. 0: it is another kernel."""
        kind = re.search(r"splash_mha_(fwd|dq|dkv)", f"{one.name} {one.op_name}")
        given = [computation.by_name[name].shapes[0] for name in one.operands]
        arrays = [s for s in given if len(s.dims) >= 3 and s.dtype in ("bf16", "f32", "f16")]
        if kind is None or len(arrays) < 2:
            return 0.0
        q, k = arrays[:2]
        visited = np.mean([_visited(q.dims[-2], k.dims[-2], window) for window in self.windows])
        return float(_SPLASH[kind[1]] * 2 * q.elements * k.dims[-2] * visited)

    def _moved(self, computation: Computation, one: Instruction) -> float:
        if one.op == "fusion":
            fused = self.module.computations[one.called[0]]
            read = sum(
                min(_read(self.module, fused, inner), _hbm(_given(computation, one, number)))
                for number, inner in fused.parameters.items()
            )
            return read + _written(fused, one.shapes)
        if one.op == "copy-start":  # its result holds the source too
            return _hbm(one.shapes[:1]) + _hbm(_given(computation, one, 0))
        if one.op == "slice-start":  # likewise; it reads what it takes
            return one.shapes[1].bytes + _hbm(one.shapes[1:2])
        if one.op in _SLICES:
            return 2 * _hbm(one.shapes)
        if one.op == "dynamic-update-slice":
            return 2 * _hbm(_given(computation, one, 1))
        if one.op == "custom-call" and one.attribute(r'target="(Assume|Allocate|Sharding)'):
            return 0.0
        given = sum(_hbm(_given(computation, one, n)) for n in range(len(one.operands)))
        return given + _hbm(one.shapes)


def _visited(queries: int, keys: int, window: int | None) -> float:
    """Share of the blocks of scores that splash's kernel makes: causal, and no older than window.

    Of a part of a row's queries: as of the row's middle.
    """
    block = next((b for b in (_SPLASH_BLOCK, 256, 128) if queries % b == 0), queries)
    if queries != keys:
        return (keys + block) / (2 * keys)
    number = queries // block
    rows = np.arange(number)
    oldest = np.zeros_like(rows) if window is None else np.maximum(rows * block - window + 1, 0)
    return float((rows - oldest // block + 1).sum() / number**2)


def _given(computation: Computation, one: Instruction, number: int) -> tuple[Shape, ...]:
    found = computation.operand(one, number)
    return found.shapes if found else ()


def _hbm(shapes: Sequence[Shape]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.space == 0))


def _read(module: Module, fused: Computation, value: Instruction) -> float:
    """Bytes of an operand that a fusion reads."""
    whole = float(sum(shape.bytes for shape in value.shapes))
    total = 0.0
    for user in fused.by_name.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        if user.op in _SLICES and first:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.op == "dynamic-update-slice" and first:
            pass  # in place
        elif user.op in ("bitcast", "reshape"):
            total += _read(module, fused, user)
        elif user.op == "fusion":
            inner = module.computations[user.called[0]]
            number = user.operands.index(value.name)
            total += _read(module, inner, inner.parameters[number])
        else:
            return whole
    return min(total, whole)


def _written(fused: Computation, shapes: Sequence[Shape]) -> float:
    """Bytes of results that a fusion writes: of one that changes a slice, the slice."""
    root = fused.root
    parts = [fused.by_name.get(name) for name in root.operands] if root.op == "tuple" else [root]
    total = 0.0
    for part, shape in zip(parts, shapes, strict=False):
        while part is not None and part.op == "bitcast":
            part = fused.operand(part, 0)
        if part is not None and part.op == "dynamic-update-slice":
            update = sum(s.bytes for s in _given(fused, part, 1))
            total += update if shape.space == 0 else 0
        else:
            total += _hbm([shape])
    return total


def flops_of(computation: Computation, one: Instruction) -> float:
    """Of a matrix product by itself: two for each product of numbers. 0: it is none."""
    if one.op not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.by_name[name].shapes[0] for name in one.operands[:2])
    if one.op == "dot":
        summed = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        inner = [left.dims[int(dim)] for dim in summed.split(",") if dim]
        return 2.0 * one.shapes[0].elements * float(np.prod(inner, dtype=np.float64))
    return 2.0 * _products(one, left, right)


def _products(one: Instruction, left: Shape, right: Shape) -> float:
    """Multiplications of a convolution, those with padding left out."""
    labels = one.attribute(r"dim_labels=(\w+_\w+->\w+)") or ""
    given, kernel, result = re.split(r"_|->", labels)
    out = one.shapes[0].dims
    window = one.attribute(r"window=\{([^}]*)\}") or ""
    rank = sum(letter.isdigit() for letter in kernel)
    sizes, strides, pads, holes, gaps = (
        _window(window, name, rank)
        for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    )
    valid = 1
    for dim in range(rank):
        label = str(dim)
        valid *= _pairs(
            left.dims[given.index(label)],
            out[result.index(label)],
            *(right.dims[kernel.index(label)], strides[dim][0], pads[dim][0]),
            *(holes[dim][0], gaps[dim][0]),
        )
        assert sizes[dim][0] == right.dims[kernel.index(label)], one.name
    features = int(one.attribute(r"feature_group_count=(\d+)") or 1)
    batches = int(one.attribute(r"batch_group_count=(\d+)") or 1)
    each = left.dims[given.index("f")] // features * out[result.index("f")]
    return float(each * (left.dims[given.index("b")] // batches) * valid)


def _window(text: str, name: str, rank: int) -> list[tuple[int, ...]]:
    """`pad=0_0x3_3` -> [(0, 0), (3, 3)]; of what is not said, what that means."""
    found = re.search(rf"(?:^| ){name}=(\S+)", text)
    if found is None:
        return [(0, 0) if name == "pad" else (1,)] * rank
    return [tuple(map(int, part.split("_"))) for part in found[1].split("x")]


@functools.lru_cache(maxsize=4096)
def _pairs(size: int, out: int, kernel: int, stride: int, pad: int, holes: int, gap: int) -> int:
    """(place of the result, place of the kernel) that meet a number of the input, of one dim."""
    if out * kernel > 2**26:  # a dim so long is no batch in disguise: all but the edge is valid
        return min(out * kernel, size * max(out, kernel))
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * gap
    return int(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())
