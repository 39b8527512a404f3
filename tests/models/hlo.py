"""Which collectives does a compiled program hold, and which of them run inside its loops?"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"

_CALLS = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"

_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclass(frozen=True)
class Collective:
    op: str
    line: str
    in_loop: bool

    def groups(self) -> list[list[int]]:
        """Device groups, from any of the three ways in which they are written."""
        if found := re.search(r"replica_groups=\{\{([\d,{}]*)\}\}", self.line):
            return [_ints(group) for group in found.group(1).split("},{")]
        if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", self.line):
            return _iota(found.group(2), found.group(3)).reshape(_ints(found.group(1))).tolist()
        device_ids = rf"(?:, device_ids=\({_IOTA}\))?"
        found = re.search(rf"replica_groups=mesh\[([^\]]*)\]{device_ids} \{{([^}}]*)\}}", self.line)
        assert found, self.line
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        sizes = [int(size) for size in axes.values()]
        ids = _iota(found.group(2) or str(int(np.prod(sizes))), found.group(3)).reshape(sizes)
        named = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found.group(4))]
        ids = np.moveaxis(ids, named, range(-len(named), 0))
        return ids.reshape(-1, int(np.prod([sizes[i] for i in named]))).tolist()


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised HLO module."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if (start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            name = start.group(1)
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies.setdefault(name, []).append(line)
    calls = {
        computation: set(
            re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", "\n".join(lines))
        )
        for computation, lines in bodies.items()
    }
    loops = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    inside, queue = set(), list(loops)
    while queue:
        computation = queue.pop()
        if computation not in inside:
            inside.add(computation)
            queue.extend(calls.get(computation, ()))
    found = []
    for computation, lines in bodies.items():
        for line in lines:
            if op := re.search(rf" ({_OPS})(?:-start)?\(", line):
                found.append(Collective(op.group(1), line, computation in inside))
    return found
