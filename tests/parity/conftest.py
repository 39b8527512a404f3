"""The golden settings, as for the tests of jobs."""

from tests.jobs.conftest import (
    golden_keys,
    golden_pairs,
    golden_reward,
    run_preference,
    run_reward_model,
    run_sft,
)

__all__ = [
    "golden_keys",
    "golden_pairs",
    "golden_reward",
    "run_preference",
    "run_reward_model",
    "run_sft",
]
