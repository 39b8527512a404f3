"""Each task's own rewards tell its right answers from wrong ones, as a run would ask them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Config, load, semantic
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.total import RewardParts
from posttrain.tasks import TASKS
from tests.rewards.rollouts import rollout

FILES = {
    "gsm8k": {"path": "gsm8k/train.jsonl"},
    "math": {"path": "math/math_test_minus_math500.jsonl"},
    "svamp": {"path": "math/svamp_test.jsonl"},
    "aqua": {"path": "aqua/dev.jsonl"},
    "truthfulqa": {"path": "truthfulqa/truthfulqa_shared.jsonl"},
    "ifeval": {"path": "ifeval/input_data_shared.jsonl"},
    "arithmetic": {},
}
COUNT = 20  # prompts of each


class Job(Config):
    rewards: RewardParts = semantic(help="name -> {type, weight, ...}")


def parts_of(name: str) -> Mapping[str, Any]:
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        pytest.skip("needs the extra `math`")
    section = {part: dict(keys) for part, keys in TASKS[name].rewards.items()}
    return Job.model_validate({"rewards": section}).rewards


@pytest.mark.parametrize("name", list(FILES))
def test_the_reward_of_a_right_answer_is_1_and_of_a_wrong_one_less(name: str, data_dir: Path):
    paths = {key: str(data_dir / "data" / path) for key, path in FILES[name].items()}
    prompts = TASKS[name](**paths).prompts("train")[:COUNT]
    said = []
    for prompt in prompts:
        right, wrong = prompt.answer, "Z" if name in ("aqua", "truthfulqa") else "-0.123"
        texts = [f"I think so.\n\\boxed{{{right}}}", f"{right}? No: \\boxed{{{wrong}}}"]
        # only a wrong answer tells nothing of ifeval; of math it would wake a process of its own
        texts = {"ifeval": texts[1:], "math": texts[:1]}.get(name, texts)
        said += [rollout(text, right, source=name, id=prompt.id) for text in texts]
    with Scorer(parts_of(name)) as scorer:
        values = [scored.rewards["correct" if name != "ifeval" else "followed"]
                  for scored in scorer(said)]  # fmt: skip
    if name == "ifeval":
        known = [value for value in values if value is not None]
        assert len(known) >= COUNT - 2, "nearly every kind of instruction can be checked"
        assert sum(known) / len(known) < 0.5
    else:
        assert values == [1.0, 0.0][: len(said) // COUNT] * COUNT


def test_rewards_of_a_config_are_those_of_the_task(tmp_path: Path):
    from posttrain.jobs.evaluate import Config as Evaluate

    cfg = load(Evaluate, [], ["model.path=m", "task.type=countdown", "n=2"])
    assert list(cfg.rewards) == ["correct"]
    assert (cfg.right_part, cfg.split) == ("correct", "held_out")
    own = load(
        Evaluate,
        [],
        ["model.path=m", "task.type=countdown", "rewards.short.type=length", "rewards.short.per=9"],
    )
    assert (list(own.rewards), own.right_part) == (["short"], "")
