"""This machine's own float32 matmul rate: `python -m tests.benchmarks.side_peak OUT`.

The best of jax and of numpy's BLAS, both with all cores, over large square matrices. A step of OUT
is one multiplication; its GFLOPs are 2 n^3 / 10^9.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.benchmarks.clock import Clock

SIZES = (2048, 4096)
REPEATS = 5


def main() -> int:
    clock = Clock()
    import jax
    import numpy as np

    multiply = jax.jit(lambda a, b: a @ b)
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "jax": lambda a: multiply(a, a).block_until_ready(),
        "numpy": lambda a: a @ a,
    }
    rng = np.random.default_rng(0)
    for n in SIZES:
        matrix = rng.standard_normal((n, n), np.float32)
        for name, way in ways.items():
            operand = jax.device_put(matrix) if name == "jax" else matrix
            way(operand)  # compiles, starts threads
            clock.mark(f"{name} {n}", gflop=0.0)
            for _ in range(REPEATS):
                way(operand)
                clock.mark(f"{name} {n}", gflop=2 * n**3 / 1e9)
    clock.write(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
