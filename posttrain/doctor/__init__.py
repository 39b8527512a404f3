"""What `posttrain doctor` looks at: name -> check, in the order they run. See base.py for both."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.doctor.base import Check
from posttrain.doctor.compiling import compile_cache
from posttrain.doctor.kernels import attention
from posttrain.doctor.links import collectives, transfer
from posttrain.doctor.machine import devices, host
from posttrain.doctor.matmul import peak, precision
from posttrain.doctor.packages import versions
from posttrain.doctor.storage import disk

# what needs no device comes first: a device that hangs must not hide what the rest would say
CHECKS: Mapping[str, Check] = {
    "host": host,
    "versions": versions,
    "disk": disk,
    "devices": devices,
    "precision": precision,
    "attention": attention,
    "collectives": collectives,
    "matmul": peak,
    "transfer": transfer,
    "compile": compile_cache,
}
