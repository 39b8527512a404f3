"""Which collectives does a compiled program hold, and which of them run inside its loops?"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"

_CALLS = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"


@dataclass(frozen=True)
class Collective:
    op: str
    line: str
    in_loop: bool

    def groups(self) -> list[list[int]]:
        """Device groups, from `{{0,1},{2,3}}` or `[4,2]<=[2,4]T(1,0)`."""
        if found := re.search(r"replica_groups=\{\{([\d,{}]*)\}\}", self.line):
            return [[int(x) for x in g.split(",")] for g in found.group(1).split("},{")]
        found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.line)
        assert found, self.line
        shape, dims = ([int(x) for x in found.group(i).split(",")] for i in (1, 2))
        ids = np.arange(np.prod(dims)).reshape(dims)
        if found.group(3):
            ids = ids.transpose([int(x) for x in found.group(3).split(",")])
        return ids.reshape(shape).tolist()


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
