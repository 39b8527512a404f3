"""Llama 3's shapes, and a step of one row of 8192 for each of 256 devices."""

from __future__ import annotations

import dataclasses

from posttrain.models.spec import Rope, Spec
from posttrain.plan.analytic import Step, weights_of
from posttrain.plan.network import AXES

ONE = dict.fromkeys(AXES, 1)
LLAMA_8B = Spec(
    family="llama",
    vocab_size=128256,
    vocab_rows=128256,
    embed=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14336,
    max_positions=8192,
    rms_eps=1e-5,
    rope=Rope(5e5),
    tied=False,
)
LLAMA_70B = dataclasses.replace(LLAMA_8B, embed=8192, layers=80, heads=64, mlp=28672)


def step(spec: Spec = LLAMA_8B, **changes) -> Step:
    known = {"rows": 256, "length": 8192} | changes
    return Step(spec=spec, weights=weights_of(spec), **known)
