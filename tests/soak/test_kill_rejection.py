"""Rejection sampling killed again and again writes, in the end, the file of a run that was not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.jobs.runs import finish, start, wait_until

pytestmark = pytest.mark.soak

PROMPTS_A_ROUND = 12


def done_with(out: Path) -> int:
    beside = out.with_name(out.name + ".progress")
    return max(0, beside.read_bytes().count(b"\n") - 1) if beside.exists() else 0


def test_a_run_killed_at_random_moments_writes_the_same_bytes(
    tiny_model: Path, tmp_path: Path, soak_rounds: int
) -> None:
    count = PROMPTS_A_ROUND * (soak_rounds + 1)
    keys = [
        *(f"model.path={tiny_model}", "model.dtype=float32", "slots=4", "prompts_at_once=6"),
        *("task.type=arithmetic", f"prompts={count}", "n=2", "sampling.max_new_tokens=8"),
        *("keep.finished=false", "keep.most=2"),
    ]
    calm, hurt = tmp_path / "calm.jsonl", tmp_path / "hurt.jsonl"
    assert finish([start([*keys, f"out={calm}"], 1, "rejection")], 1200) == [0]
    rng, kills = random.Random(0), 0
    for k in range(soak_rounds):
        before = done_with(hurt)
        running = start([*keys, f"out={hurt}"], 1, "rejection")
        wait_until(lambda before=before: done_with(hurt) > before, running)
        time.sleep(rng.uniform(0, 0.1))
        kills += running.poll() is None
        running.kill()
        finish([running])
        print(f"round {k + 1}: {done_with(hurt)} of {count} prompts")
    assert kills >= soak_rounds - 1, "the run ended before it was killed often enough"
    assert finish([start([*keys, f"out={hurt}"], 1, "rejection")], 1200) == [0]
    assert hurt.read_bytes() == calm.read_bytes()
    assert hurt.read_bytes().count(b"\n") > count
