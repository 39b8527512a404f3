"""Losses: arrays in, Terms out; none of them sees a model. One file per family.

A loss is a Config class with
  needs: ClassVar[frozenset[str]]  what it reads of "logps", "entropy", "correct" (TokenOutputs) and
                                   "reference_logps" (Batch: cached, or made by a live reference)
  __call__(outputs: TokenOutputs, batch: Batch of one micro-batch) -> Terms
A new one is a file and a line below; `pkg.module:Class` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.config import Config
from posttrain.losses.dpo import DPO
from posttrain.losses.nll import NLL

LOSSES: dict[str, type[Config]] = {
    "nll": NLL,
}

PAIR_LOSSES: dict[str, type[Config]] = {
    "dpo": DPO,
}
