"""plan/reckoned.py: configs of jobs as the analytic model takes them."""

from __future__ import annotations

import dataclasses

import pytest

from posttrain.config import ConfigError, load
from posttrain.jobs import preference, sft
from posttrain.plan.reckoned import step_of
from posttrain.train.config import ReferenceSync
from tests.plan.llama import LLAMA_8B

SOURCE = "data.sources={a: {path: a.jsonl}}"
KEYS = ["model.path=m", SOURCE, "data.seq_len=4096"]


def test_a_step_of_rows():
    cfg = load(
        sft.Config,
        [],
        [
            *(*KEYS, "batch.rows=64", "batch.accumulate=4", "model.param_dtype=bfloat16"),
            *("optim.moment_dtype=bfloat16", "model.remat=dots", "train.head_chunk=512"),
        ],
    )
    step = step_of(cfg, LLAMA_8B)
    assert (step.rows, step.length, step.accumulate) == (64, 4096, 4)
    assert (step.param_bytes, step.compute_bytes, step.moment_bytes) == (2, 2, 2)
    assert (step.remat, step.head_chunk, step.optimizer) == ("dots", 512, "adamw")
    assert step.reference_bytes == 0


def test_a_step_of_pairs_and_who_is_the_reference():
    cfg = load(preference.Config, [], [*KEYS, "batch.examples=32"])
    pairs = step_of(cfg, LLAMA_8B, kind="pairs", mode="cached")
    assert pairs.rows == 2 * 32, "both sides, a row each"
    assert pairs.reference_bytes == 0
    assert step_of(cfg, LLAMA_8B, kind="pairs", mode="cached", tokens=2048).rows == 32
    assert step_of(cfg, LLAMA_8B, kind="pairs", mode="live").reference_bytes == 2
    assert step_of(cfg, LLAMA_8B, kind="pairs", mode=ReferenceSync()).reference_bytes == 4
    free = load(preference.Config, [], [*KEYS, "batch.examples=32", "loss.type=simpo"])
    assert step_of(free, LLAMA_8B, kind="pairs", mode="live").reference_bytes == 0


def test_what_the_formulas_leave_out_is_refused():
    keys = [*KEYS, "batch.rows=64", "lora.rank=8", "train.frozen=[embedding]"]
    with pytest.raises(ConfigError) as refused:
        step_of(load(sft.Config, [], keys), LLAMA_8B)
    assert "lora: --search and --smallest reckon with all weights trained" in str(refused.value)
    assert "train.frozen" in str(refused.value)
    scored = dataclasses.replace(LLAMA_8B, head="score")
    step = step_of(load(sft.Config, [], [*KEYS, "batch.rows=64"]), scored)
    assert not any(weight.name == "head" for weight in step.weights)
