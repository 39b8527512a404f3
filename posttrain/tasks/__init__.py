"""Tasks: prompts, what their answers are scored by, the tools that they offer. One file per task.

A task is a Config class (base.py: Task, Generated; files.py: FileTask) with
  prompts(split)  the prompts of "train" or "held_out", indexable, the same in every run
  rewards         a section `rewards`, for runs that name none
  tools           names of the tools that a model may call
A new one is a file and a line below; `pkg.module:Class` in a config reaches outside the tree.
"""

from __future__ import annotations

from posttrain.tasks.arithmetic import Arithmetic
from posttrain.tasks.base import Task
from posttrain.tasks.countdown import Countdown
from posttrain.tasks.function_calling import BFCL
from posttrain.tasks.gsm8k import GSM8K
from posttrain.tasks.ifeval import IFEval
from posttrain.tasks.jsonl import JSONL
from posttrain.tasks.math import MATH
from posttrain.tasks.multiple_choice import AQuA, TruthfulQA
from posttrain.tasks.word_problems import MAWPS, SVAMP

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "gsm8k": GSM8K,
    "math": MATH,
    "svamp": SVAMP,
    "mawps": MAWPS,
    "aqua": AQuA,
    "truthfulqa": TruthfulQA,
    "ifeval": IFEval,
    "bfcl": BFCL,
    "jsonl": JSONL,
}
