"""Losses: arrays in, (Mean, metrics) out; none of them sees a model. One file per family.

A loss is a Config class with
  needs: ClassVar[frozenset[str]]  the fields of TokenOutputs that it reads
  __call__(outputs: TokenOutputs, batch: Batch of one micro-batch) -> (Mean, dict[str, Mean])
A new one is a file and a line in LOSSES; `pkg.module:Class` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.config import Config
from posttrain.losses.nll import NLL

LOSSES: dict[str, type[Config]] = {
    "nll": NLL,
}
