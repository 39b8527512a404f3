"""A compiled program's text: its instructions, and how often each of them runs.

XLA's own counts take a loop's body once. Here the trip count of each loop is read from its
condition, its first value and its step; of a loop that ends by a number which the device alone
knows, the caller says the most it can be (Bounds).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_NUMBER = re.compile(r"(?:s|u|f|bf)(\d+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_PLAIN = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "optimization-barrier",
)
"""Operations that hand on a scalar as it is."""


@dataclass(frozen=True)
class Shape:
    """One array: space is the memory it lies in, 0 HBM (a TPU's 1 is the memory on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In memory, padding of tiles left out."""
        return -(-self.elements * _bits(self.dtype) // 8)


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    found = _NUMBER.match(dtype)
    return int(found[1]) if found else 8  # f8e4m3fn and its like have their 8 in the name


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. attributes: the rest of it, as it is written."""

    name: str
    op: str
    shapes: tuple[Shape, ...]  # of each array of the result
    operands: tuple[str, ...]
    arguments: str  # what stands in the brackets, of a constant its value
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """What it was in the program that was traced, as jit(step)/jvp(head)/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations it calls."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        if branches:
            named = re.findall(r"%?([\w.\-]+)", branches[1])
        return (*_CALLS.findall(self.attributes), *named)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """Its instructions by name, in the order they run."""

    name: str
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.by_name.values()) if one.root)

    @property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        found = (one for one in self.by_name.values() if one.op == "parameter")
        return {int(one.arguments): one for one in found}

    def operand(self, of: Instruction, number: int) -> Instruction | None:
        """None: it is no instruction of this computation."""
        if number >= len(of.operands):
            return None
        return self.by_name.get(of.operands[number])


@dataclass(frozen=True)
class Module:
    """A program: all its computations."""

    computations: dict[str, Computation]
    entry: str


@dataclass(frozen=True)
class Bounds:
    """The most turns of loops that end by a number known to the device alone.

    head: of those of the vocabulary head; None: as many as the chunks that the loop holds.
    other: of those outside it (micro-batches of which the last may be empty, tokens that are
    decoded).
    """

    head: int | None = None
    other: int = 1


@dataclass(frozen=True)
class Visit:
    """An instruction and how often it runs. dynamic: inside a loop whose turns are a bound."""

    instruction: Instruction
    computation: Computation
    times: int
    dynamic: bool


def parse(text: str) -> Module:
    """The text of compiled.as_text()."""
    computations: dict[str, Computation] = {}
    now, entry, lines = None, "", list[str]()
    for line in text.splitlines():
        if now is None:
            if line.endswith("{") and (found := _HEAD.match(line)):
                now, lines = Computation(found[1]), []
                if line.startswith("ENTRY"):
                    entry = found[1]
        elif line.startswith("}") and not line.startswith("}}"):
            for whole in lines:
                one = _instruction(whole)
                now.by_name[one.name] = one
            computations[now.name] = now
            now = None
        elif _LINE.match(line):
            lines.append(line)
        elif lines:  # of kernels' attributes, which hold line ends
            lines[-1] += line
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head = _LINE.match(line)
    assert head is not None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.find(" ", at)
    shape, opening = line[at:end], line.find("(", end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    return Instruction(
        name=head[2],
        op=line[end:opening].strip(),
        shapes=read_shapes(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        arguments=inside,
        attributes=line[closing + 1 :],
        root=bool(head[1]),
    )


def _closing(line: str, opening: int) -> int:
    """Where the bracket that opens there is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(line) - 1


def read_shapes(text: str) -> tuple[Shape, ...]:
    """`f32[2,3]{1,0:T(8,128)S(1)}`, or several in a tuple."""
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


@functools.lru_cache(maxsize=4096)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def walk(module: Module, bounds: Bounds, weigh: Callable[[Visit], float]) -> Iterator[Visit]:
    """Every instruction that runs, those of fusions left out.

    weigh: what of two branches the larger one is told by; it is walked, the other is not.
    """

    def visits(name: str, times: int, dynamic: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for one in computation.by_name.values():
            yield Visit(one, computation, times, dynamic)
            if one.op == "while":
                turns, known = trip_count(module, computation, one, bounds)
                body = one.attribute(r"body=%?([\w.\-]+)")
                assert body is not None
                yield from visits(body, times * turns, dynamic or not known)
            elif one.op == "conditional":
                found = [list(visits(branch, times, dynamic)) for branch in one.called]
                yield from max(found, key=lambda branch: sum(map(weigh, branch)))
            elif one.op in ("call", "async-start"):
                for called in one.called:
                    yield from visits(called, times, dynamic)

    yield from visits(module.entry, 1, False)


def inside(module: Module, one: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The instructions of a fusion, those of fusions in it too."""
    for name in one.called if one.op == "fusion" else ():
        computation = module.computations[name]
        for inner in computation.by_name.values():
            yield computation, inner
            yield from inside(module, inner)


def trip_count(
    module: Module, computation: Computation, loop: Instruction, bounds: Bounds
) -> tuple[int, bool]:
    """(turns of a while, whether they are known: if not, it is the bound)."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known), True
    names = {key: loop.attribute(rf"{key}=%?([\w.\-]+)") or "" for key in ("condition", "body")}
    condition, body = (module.computations[names[key]] for key in ("condition", "body"))
    start = computation.operand(loop, 0)
    counter = _compared(module, condition)
    if counter is not None and start is not None:
        which, limit, inclusive = counter
        if isinstance(limit, _Element):
            limit = _value(computation, computation.operand(start, limit.number))
        if limit is not None:
            first = _value(computation, computation.operand(start, which)) or 0
            step = _step(module, body, which)
            return max(0, -(-(limit + inclusive - first) // step)), True
    if "head)" in loop.op_name or "/head/" in loop.op_name:
        return bounds.head or _chunks(loop), False
    return bounds.other, False


def _chunks(loop: Instruction) -> int:
    """Of the head: it holds the positions that it walks, int32 [chunks, c]."""
    found = [s.dims[0] for s in loop.shapes if s.dtype == "s32" and len(s.dims) == 2]
    return max(found, default=1)


@dataclass(frozen=True)
class _Element:
    """Of the tuple that a loop carries."""

    number: int


def _compared(
    module: Module, condition: Computation
) -> tuple[int, int | _Element | None, int] | None:
    """(which element is counted, what it is compared with, 1 where up to that number) or None."""
    root = condition.root
    sides = [_leaf(condition, condition.operand(root, i)) for i in range(len(root.operands))]
    if root.op == "fusion":
        fused = module.computations[root.called[0]]
        given, root = sides, fused.root
        numbers = {one.name: number for number, one in fused.parameters.items()}
        sides = [
            given[numbers[name]] if name in numbers else _leaf(fused, fused.by_name.get(name))
            for name in root.operands
        ]
    direction = root.attribute(r"direction=(\w+)")
    if root.op != "compare" or len(sides) != 2 or direction is None:
        return None
    if direction in ("GT", "GE"):
        sides.reverse()
    counted, limit = sides
    if not isinstance(counted, _Element) or direction not in ("LT", "GT", "LE", "GE"):
        return None
    return counted.number, limit, int(direction in ("LE", "GE"))


def _leaf(computation: Computation, one: Instruction | None) -> int | _Element | None:
    """A number, or an element of what the computation is given."""
    one = _handed(computation, one)
    if one is None:
        return None
    if one.op == "get-tuple-element":
        source = computation.operand(one, 0)
        index = one.attribute(r"index=(\d+)")
        return _Element(int(index or 0)) if source and source.op == "parameter" else None
    return _constant(one)


def _handed(computation: Computation, one: Instruction | None) -> Instruction | None:
    """What a scalar was before it was copied about."""
    while one is not None and one.op in _PLAIN:
        one = computation.operand(one, 0)
    return one


def _constant(one: Instruction) -> int | None:
    found = re.fullmatch(r"-?\d+", one.arguments) if one.op == "constant" else None
    return int(found[0]) if found else None


def _value(computation: Computation, one: Instruction | None) -> int | None:
    """The number that an instruction gives, where it is one."""
    one = _handed(computation, one)
    return None if one is None else _constant(one)


def _step(module: Module, body: Computation, which: int) -> int:
    """What a turn adds to the counter: 2 in XLA's windowed loops, elsewhere mostly 1."""
    one = _handed(body, body.operand(body.root, which))
    where = body
    if one is not None and one.op == "fusion":
        where = module.computations[one.called[0]]
        one = where.root
    if one is not None and one.op == "add":
        added = [_value(where, where.operand(one, i)) for i in range(2)]
        return next((n for n in added if n), 1)
    return 1
