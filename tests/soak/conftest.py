"""The golden settings, as for the tests of jobs."""

from tests.jobs.conftest import golden_keys, golden_pairs, tiny_pairs

__all__ = ["golden_keys", "golden_pairs", "tiny_pairs"]
