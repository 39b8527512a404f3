"""A run of the very step that a plan is of, on one CPU device: prints its peak in bytes.

What is measured is this process's resident memory at its fullest while the state is made and two
steps run, less what it had before (the step compiled, no array made).
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from posttrain.config import load
from posttrain.jobs import sft
from posttrain.plan.programs import offline


def peak() -> int:
    """The most that was resident since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM")


def forget() -> None:
    """Linux counts the most anew from here on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main() -> None:
    config, *keys = sys.argv[1:]
    cfg = load(sft.Config, [config], keys)
    job = offline(cfg, jax.devices("cpu")[:1], setup={})
    program = job.programs[0]
    with jax.set_mesh(job.mesh):
        step = program.function.lower(*program.arguments).compile()
        gc.collect()
        before = psutil.Process().memory_info().rss
        forget()
        state, batch, live, frozen = jax.tree.map(
            lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), program.arguments
        )
        for _ in range(2):
            state, metrics = step(state, batch, live, frozen)
        jax.block_until_ready((state, metrics))
    print(peak() - before)


if __name__ == "__main__":
    main()
