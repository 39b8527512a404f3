"""Advantages: how much better each sampled token was than what was expected. Arrays in, arrays out.

An advantage is a Config class with
  needs_values: bool     whether it reads what a critic foretold (Signal.values)
  needs_group: bool      whether it sets an answer against others to its prompt
  __call__(signal: Signal of one round) -> Advantages
numpy on the host, float64 inside, float32 out; no JAX. What a token is credited with is a matter of
this folder, what the policy makes of it a matter of losses/. A new one is a file and a line below;
`pkg.module:Class` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.advantages.base import Advantage
from posttrain.advantages.gae import GAE
from posttrain.advantages.grpo import GRPO
from posttrain.advantages.reinforce import Reinforce
from posttrain.advantages.reinforce_pp import ReinforcePP
from posttrain.advantages.rloo import RLOO

ADVANTAGES: dict[str, type[Advantage]] = {
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce": Reinforce,
    "reinforce_pp": ReinforcePP,
    "gae": GAE,
}
