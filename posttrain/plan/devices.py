"""The devices that programs are compiled for: those of a TPU slice elsewhere, or those at hand."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

from posttrain.config import ConfigError
from posttrain.plan.topology import Slice, parse

HERE = ("cpu", "gpu")
"""Topologies that mean the devices of this machine."""

# libtpu looks for the machine it runs on, and holds a lock against a second process that does: here
# it compiles only, on a machine that may be none of its own.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "4",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def read_topology(name: str) -> Slice | None:
    """A slice by its name; None: the devices of this machine. ConfigError: there is no such."""
    if name in HERE:
        return None
    try:
        return parse(name)
    except ValueError as error:
        raise ConfigError(f"--topology: {error}; or {' or '.join(HERE)}, what is here") from error


def can_compile(one: Slice | None) -> bool:
    """Whether the compiler for it is installed."""
    return one is None or importlib.util.find_spec("libtpu") is not None


def devices_of(name: str) -> list[Any]:
    """The devices of a topology. ConfigError: it does not exist, or its compiler is not installed.

    Call it before any device is used: a TPU that is here is left alone.
    """
    one = read_topology(name)
    if not can_compile(one):
        raise ConfigError(
            f"--topology {name}: compiling for TPUs takes libtpu: pip install 'posttrain[tpu]'"
        )
    for key, value in _QUIET.items() if one else ():
        os.environ.setdefault(key, value)
    import jax

    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if one is None:
        try:
            return jax.devices(name)
        except RuntimeError as error:
            raise ConfigError(f"--topology {name}: none here ({error})") from error
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc(platform="tpu", **one.described).devices)


def places(devices: list[Any]) -> np.ndarray | None:
    """Where each lies in the torus, [devices, (x, y, z, slice)]; None: in none."""
    if not hasattr(devices[0], "coords"):
        return None
    return np.array(
        [(*device.coords, getattr(device, "slice_index", 0) or 0) for device in devices]
    )
