"""One MLP, forward and backward: `python -m tests.benchmarks.side_moe OUT (mixture|dense|ragged)`.

mixture: 8 experts, 2 of them for each token; dense: an MLP as wide as those 2; ragged: the mixture
by jax.lax.ragged_dot, whatever the platform. float32, all cores. A step of OUT is one gradient.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from tests.benchmarks.clock import Clock

TOKENS, EMBED, WIDTH, EXPERTS, CHOSEN = 4096, 512, 768, 8, 2
STEPS = 12


def main() -> int:
    clock = Clock()
    import jax
    import jax.numpy as jnp

    from posttrain.models import moe
    from posttrain.models.grouped_matmul import grouped_matmul
    from posttrain.models.layers import project

    out, side = sys.argv[1:]
    if side == "ragged":
        moe.grouped_matmul = functools.partial(grouped_matmul, implementation="ragged")
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    x = draw(8, TOKENS // 8, EMBED)
    real = jnp.ones(x.shape[:2], bool)

    def dense(x: Any, gate: Any, up: Any, down: Any) -> jax.Array:
        return project(jax.nn.silu(project(x, gate)) * project(x, up), down)

    def mixture(x: Any, *weights: Any) -> jax.Array:
        return moe.moe_mlp(x, real, *weights, chosen=CHOSEN, normalised=True)[0]

    wide = CHOSEN * WIDTH
    run, weights = {
        "dense": lambda: (dense, [draw(EMBED, wide), draw(EMBED, wide), draw(wide, EMBED)]),
        "mixture": lambda: (
            mixture,
            [
                draw(EMBED, EXPERTS),
                *(draw(EXPERTS, EMBED, WIDTH) for _ in range(2)),
                draw(EXPERTS, WIDTH, EMBED),
            ],
        ),
    }["dense" if side == "dense" else "mixture"]()
    step = jax.jit(jax.grad(lambda x, *w: jnp.sin(run(x, *w)).sum(), range(1 + len(weights))))
    for _ in range(STEPS):
        jax.block_until_ready(step(x, *weights))
        clock.step(tokens=TOKENS)
    clock.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
