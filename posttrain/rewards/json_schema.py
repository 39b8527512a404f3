"""An answer that is JSON of a given form."""

from __future__ import annotations

import json
import re
from typing import Any

from posttrain.config import semantic
from posttrain.json_schema import problems
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.types import Rollout

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class JSONForm(Reward):
    """1 where the answer is JSON, alone or in one fenced block, that a JSON Schema allows; else 0.

    The schema is `form`, or the prompt's answer. None: there is neither. ValueError: the schema is
    itself wrong. Which of its words are known: posttrain/json_schema.py.
    """

    form: dict[str, Any] | None = semantic(
        None, help="the JSON Schema; null: it is the prompt's answer"
    )
    key: str = semantic("", help="where the schema lies in the prompt's answer")

    def __call__(self, rollout: Rollout) -> float | None:
        schema = self.form if self.form is not None else expected(rollout, self.key)
        if schema is None:
            return None
        text = answer_text(rollout)
        blocks = _FENCED.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text)
        except (ValueError, RecursionError):
            return 0.0
        wrong = problems(value, schema)
        if broken := [problem for problem in wrong if ": the schema" in problem]:
            raise ValueError(broken[0])
        return float(not wrong)
