"""Rewards: plain Python, one file per reward; what they are compared with is in the prompt.

A reward is a Reward class (base.py): settings, and __call__(Rollout) -> float | None, where None
means that it does not apply. A plain function will do where there are no settings. What the parts
make together is in total.py; who asks them, and in which threads, in scorer.py.
A new one is a file and a line below; `pkg.module:name` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.rewards.base import Reward
from posttrain.rewards.code import Code
from posttrain.rewards.exact import Exact
from posttrain.rewards.ifeval import IFEval
from posttrain.rewards.json_schema import JSONForm
from posttrain.rewards.judge import Judge
from posttrain.rewards.judge_pairs import JudgePairs
from posttrain.rewards.length import Length, Overlong
from posttrain.rewards.math import Math
from posttrain.rewards.numeric import Numeric
from posttrain.rewards.regex import Regex
from posttrain.rewards.repetition import Repetition
from posttrain.rewards.reward_model import RewardModel
from posttrain.rewards.think import Think
from posttrain.rewards.tool_call import ToolCall

REWARDS: dict[str, type[Reward]] = {
    "exact": Exact,
    "numeric": Numeric,
    "math": Math,
    "think": Think,
    "regex": Regex,
    "json_schema": JSONForm,
    "tool_call": ToolCall,
    "ifeval": IFEval,
    "code": Code,
    "reward_model": RewardModel,
    "judge": Judge,
    "judge_pairs": JudgePairs,
    "length": Length,
    "overlong": Overlong,
    "repetition": Repetition,
}
