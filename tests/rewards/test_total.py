"""The sum: weights, gates, z-scores, cosine; against figures of CONFORMANCE.md and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.config import Config, ConfigError, load, plain_dict, semantic
from posttrain.rewards.base import Cosine, Gate
from posttrain.rewards.regex import Regex
from posttrain.rewards.total import (
    RewardParts,
    Shaping,
    combine,
    cosine_scaled,
    deviation,
    zscore,
)
from posttrain.types import Rollout
from tests.rewards.rollouts import rollout


class Job(Config):
    rewards: RewardParts = semantic({}, help="the parts")
    shaping: Shaping = semantic(Shaping(), help="the sum")


def part(**settings: object) -> Regex:
    return Regex.model_validate({"pattern": ".", **settings})


def rewards_of(
    made: dict[str, Regex], values: list[dict[str, float | None]], groups=None, **shaping: object
) -> list[float]:
    groups = groups or [0] * len(values)
    given = [rollout("x", group=g, rewards=v) for g, v in zip(groups, values, strict=True)]
    return [r.reward for r in combine(made, Shaping.model_validate(shaping), given)]


def shouted(answer: Rollout) -> float | None:
    """A user's own reward, named in a config as module:function."""
    return float(answer.text.isupper()) if answer.text else None


class Never(Config):
    """A Config that is no reward."""


def test_weights_of_seven_tenths_and_three_on_one_and_nothing():
    parts = {"a": part(weight=0.7), "b": part(weight=0.3)}
    assert rewards_of(parts, [{"a": 1.0, "b": 0.0}]) == pytest.approx([0.7])


def test_deviation_is_over_n_less_one_and_passes_over_what_is_missing():
    assert deviation(np.array([1.0, 2.0, 3.0, np.nan])) == 1.0
    assert deviation(np.array([0.1, 0.1, 0.1])) == 0.0, "not the rounding of its mean"
    assert deviation(np.array([5.0, np.nan])) == 0.0


def test_a_part_that_does_not_apply_is_left_out_of_the_sum():
    parts = {"a": part(), "b": part(weight=2.0)}
    values = [{"a": 1.0, "b": None}, {"a": 1.0, "b": 3.0}, {"a": None, "b": None}]
    given = [rollout("x", rewards=v) for v in values]
    scored = combine(parts, Shaping(), given)
    assert [r.reward for r in scored[:2]] == [1.0, 7.0]
    assert math.isnan(scored[2].reward), "nothing is known of it"


def test_an_answer_of_which_only_what_is_logged_alone_is_known_has_no_reward():
    parts = {"correct": part(), "length": part(weight=0)}
    found = rewards_of(parts, [{"correct": 0.0, "length": 5.0}, {"correct": None, "length": 5.0}])
    assert found[0] == 0.0
    assert math.isnan(found[1]), "0 would be that of a wrong answer"


def test_correct_counts_only_if_the_format_holds():
    parts = {"correct": part(gate=Gate(part="format")), "format": part(weight=0.5)}
    values: list[dict[str, float | None]] = [
        {"correct": 1.0, "format": 1.0},
        {"correct": 1.0, "format": 0.0},
        {"correct": 1.0, "format": None},
    ]
    assert rewards_of(parts, values) == [1.5, 0.0, 1.0]


def test_a_gate_looks_at_the_value_as_it_was_given():
    parts = {
        "correct": part(gate=Gate(part="format", at_least=0.5, otherwise=-1.0)),
        "format": part(scale=0.1, zscore="batch", weight=0.0),
    }
    values: list[dict[str, float | None]] = [
        {"correct": 1.0, "format": 0.5},
        {"correct": 1.0, "format": 0.4},
    ]
    assert rewards_of(parts, values) == [1.0, -1.0]


def test_scale_zscore_and_clip_in_that_order():
    parts = {"a": part(scale=10.0, zscore="group", clip=(-0.5, 0.5), weight=2.0)}
    assert rewards_of(parts, [{"a": 0.0}, {"a": 1.0}]) == [-1.0, 1.0]
    assert rewards_of({"a": part(scale=10.0, clip=(0, 4))}, [{"a": 1.0}]) == [4.0]
    assert rewards_of({"a": part()}, [{"a": 5.0}], clip=(-1, 1)) == [1.0]


def test_zscores_of_groups_and_of_the_batch():
    values, groups = np.array([1.0, 2.0, 3.0, 10.0, 10.0, np.nan]), np.array([0, 0, 0, 4, 4, 4])
    got = zscore(values, groups, "group")
    assert got[:5] == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0])
    assert np.isnan(got[5])
    known = values[:5]
    expected = (known - known.mean()) / (known.std(ddof=1) + 1e-4)
    assert zscore(values, groups, "batch")[:5] == pytest.approx(expected)


def test_normalised_before_the_sum_and_after_it():
    """GDPO's point: parts of other scales count alike, and two ways to a sum stay two."""
    parts = {"a": part(), "b": part()}
    values: list[dict[str, float | None]] = [
        {"a": 1.0, "b": 0.0},
        {"a": 0.0, "b": 100.0},
        {"a": 0.0, "b": 0.0},
    ]
    a = zscore(np.array([1.0, 0, 0]), np.zeros(3), "batch")
    b = zscore(np.array([0, 100.0, 0]), np.zeros(3), "batch")
    assert rewards_of(parts, values, parts="group") == pytest.approx(list(a + b))
    both = zscore(a + b, np.zeros(3), "batch")
    assert rewards_of(parts, values, parts="group", total="batch") == pytest.approx(list(both))
    after = zscore(np.array([1.0, 100.0, 0.0]), np.zeros(3), "batch")
    assert rewards_of(parts, values, total="group") == pytest.approx(list(after))
    own = {"a": part(zscore="none"), "b": part()}
    assert rewards_of(own, values, parts="group") == pytest.approx([1 + b[0], b[1], b[2]])


def test_cosine_length_scaling():
    cfg = Cosine(max_length=100)
    assert cosine_scaled(cfg, 1.0, 25) == pytest.approx(0.92678, abs=5e-6)
    assert cosine_scaled(cfg, 1.0, 75) == pytest.approx(0.57322, abs=5e-6)
    assert cosine_scaled(cfg, 0.0, 50) == pytest.approx(-0.75)
    assert cosine_scaled(cfg, 0.0, 0) == -1.0
    assert cosine_scaled(cfg, 1.0, 250) == pytest.approx(0.5), "no way back up beyond the end"
    parts = {"correct": part(cosine=cfg)}
    given = [rollout("x", length=25, rewards={"correct": 1.0})]
    scored = combine(parts, Shaping(), given)[0]
    assert scored.reward == pytest.approx(0.92678, abs=5e-6)
    assert scored.rewards == {"correct": 1.0}, "the part stays as it was given"


def test_a_config_names_rewards_by_type_and_functions_by_where_they_are():
    text = "rewards={short: {type: overlong, max_length: 9, cache: 2, weight: 0.5}}"
    own = f"rewards.loud.type={__name__}:shouted"
    job = load(Job, overrides=[text, own, "rewards.loud.weight=2", "shaping.parts=group"])
    assert plain_dict(job)["rewards"]["loud"]["type"] == f"{__name__}:shouted"
    assert job == Job.model_validate(plain_dict(job)), "what was resolved reads back"
    assert job.rewards["loud"](rollout("AHA")) == 1.0
    assert job.rewards["loud"](rollout("aha")) == 0.0
    with pytest.raises(ConfigError, match=r"no Reward: derive it from posttrain\.rewards\.base"):
        load(Job, overrides=[f"rewards.x.type={__name__}:Never"])
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        load(Job, overrides=["rewards.x.type=exac"])
    with pytest.raises(ConfigError, match=r"rewards\.x\.wieght"):
        load(Job, overrides=["rewards.x={type: exact, wieght: 1}"])
