"""TPU slices in the words of each API. What they are is posttrain/plan/topology.py's to say.

GKE      cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, topologies, machine
         types), xpk's core/system_characteristics.py
Cloud    cloud.google.com/tpu/docs/{v5e,v5p,v6e} (accelerator types), .../tpu/docs/runtimes (images)
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.config import did_you_mean
from posttrain.plan import topology
from posttrain.plan.topology import Slice


@dataclass(frozen=True)
class Words:
    """Of one generation: GKE's label of its nodes, and the image of its TPU VMs."""

    gke_accelerator: str
    runtime: str


GENERATIONS = {
    "v5e": Words("tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v5p": Words("tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v6e": Words("tpu-v6e-slice", "v2-alpha-tpuv6e"),
}


def words_of(one: Slice) -> Words:
    """Of a slice that `parse` made."""
    return GENERATIONS[one.chip.name]


def parse(text: str, chips_per_host: int | None = None) -> Slice:
    """`v6e:16x16` or `v5p-128` -> Slice. ValueError says what is wrong and what there is."""
    one = topology.parse(text, chips_per_host)
    if one.slices > 1:
        raise ValueError(
            f"{text!r}: of one slice ({one.chip.name}:{one.topology}); how many is `slices`"
        )
    if one.chip.name not in GENERATIONS:
        hint = did_you_mean(one.chip.name, list(GENERATIONS))
        raise ValueError(
            f"{one.chip.name} slices are not launched from here{hint}; those that are: "
            f"{', '.join(GENERATIONS)}"
        )
    return one
