"""Losses: arrays in, Terms out; none of them sees a model. One file per family.

A loss is a Config class with
  needs: frozenset[str]  what it reads of "logps", "entropy", "correct", "log_sum_sq" (TokenOutputs;
                         a reward model's has "scores" alone, a critic's "values") and
                         "reference_logps" (Batch: cached, or made by a live reference)
  __call__(outputs: TokenOutputs, batch: Batch of one micro-batch) -> Terms
A preference loss is a PreferenceLoss (base.py); one on pairs a PairLoss with a `per_pair`. One that
couples the examples of a step makes a `statistic` of each micro-batch and is handed their sum as a
third argument (train/step.py). A policy loss is a PolicyLoss (policy_loss.py) with a `per_token`.
A new one is a file and a line below; `pkg.module:Class` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.config import Config
from posttrain.losses.aot import AOT, AOTUnpaired
from posttrain.losses.apo import APODown, APOZero, APOZeroUnpaired
from posttrain.losses.bco import BCO, BCOPair
from posttrain.losses.bradley_terry import BradleyTerry
from posttrain.losses.cispo import CISPO
from posttrain.losses.clip import Clip
from posttrain.losses.cpo import CPO
from posttrain.losses.dpo import DPO, DiscoPOP, RobustDPO, SigmoidNorm
from posttrain.losses.exo import EXOPair
from posttrain.losses.hinge import Hinge
from posttrain.losses.ipo import IPO, SPPOHard
from posttrain.losses.kto import KTO
from posttrain.losses.nca import NCAPair
from posttrain.losses.nll import NLL
from posttrain.losses.orpo import ORPO
from posttrain.losses.pair_loss import PairLoss
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.reinforce import Reinforce
from posttrain.losses.simpo import SimPO
from posttrain.losses.unpaired import UnpairedLoss
from posttrain.losses.value import SquaredError

LOSSES: dict[str, type[Config]] = {
    "nll": NLL,
}

PAIR_LOSSES: dict[str, type[PairLoss]] = {
    "dpo": DPO,
    "robust": RobustDPO,
    "sigmoid_norm": SigmoidNorm,
    "hinge": Hinge,
    "ipo": IPO,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "discopop": DiscoPOP,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
}

UNPAIRED_LOSSES: dict[str, type[UnpairedLoss]] = {
    "kto": KTO,
    "bco": BCO,
    "apo_zero_unpaired": APOZeroUnpaired,
}

REWARD_LOSSES: dict[str, type[Config]] = {
    "bradley_terry": BradleyTerry,
}

POLICY_LOSSES: dict[str, type[PolicyLoss]] = {
    "clip": Clip,
    "cispo": CISPO,
    "reinforce": Reinforce,
}

VALUE_LOSSES: dict[str, type[Config]] = {
    "squared": SquaredError,
}
