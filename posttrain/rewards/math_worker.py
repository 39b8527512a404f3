"""Compares mathematical answers; math_pool.py runs this file as a script.

A line in: the JSON list [right answer, text of the answer, seconds]. A line out: 1 equal, 0 not,
- the right answer cannot be read.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from typing import Any

_MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    """Reads lines until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        out.write(_compare(parse, verify, *json.loads(line)) + "\n")
        out.flush()


def _compare(parse: Any, verify: Any, gold: str, answer: str, timeout: int) -> str:
    try:
        right = parse(f"${gold}$", parsing_timeout=timeout)
        if not right:
            return "-"
        found = parse(answer, parsing_timeout=timeout)
        return str(int(verify(right, found, timeout_seconds=timeout)))
    except (Exception, RecursionError, MemoryError):
        return "0"  # an answer that no parser takes


if __name__ == "__main__":
    main()
