"""The golden settings, as for the tests of jobs."""

from tests.jobs.conftest import golden_keys, golden_pairs, run_preference, run_sft

__all__ = ["golden_keys", "golden_pairs", "run_preference", "run_sft"]
