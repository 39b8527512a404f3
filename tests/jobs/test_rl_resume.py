"""A run that is stopped in a round, or while it samples one, makes the samples and the steps of one
that was not: with a critic, a reference, several steps on each round and replaced groups."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.sampling.request import Completion, OnDone, Request, RolloutEngine
from posttrain.train import loop, setup_online
from posttrain.train.loop import PREEMPTED
from tests.jobs.rl_task import HERE
from tests.jobs.runs import Finished, Runner

STEPS = 10  # rounds of 4 steps: 0-3, 4-7, and a part of a third
KEYS = [
    *("preset=ppo", "round.steps=2", "round.passes=2", "round.resample=2", f"train.steps={STEPS}"),
    *(f"rewards={{flat: {{type: '{HERE}:flat_or_not'}}}}", "rollouts.every=1", "export=true"),
    *("kl.coef=0.1", "critic.optim.lr=1e-2", "checkpoint.every=4", "round.mask_truncated=false"),
]


class Cut(Exception):
    """What ends a run in these tests."""


class Dying:
    """Our engine, of which the `calls`-th call ends after `answers` answers."""

    def __init__(self, inner: RolloutEngine, calls: int, answers: int):
        self._inner = inner
        self._calls, self._answers = calls, answers

    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        self._calls -= 1

        def counting(index: int, which: int, completion: Completion) -> Request | None:
            self._answers -= self._calls == 0
            if self._calls == 0 and self._answers <= 0:
                raise Cut
            return on_done(index, which, completion) if on_done else None

        return self._inner.generate(requests, counting)

    def update(self, params: Any) -> None:
        self._inner.update(params)


@pytest.fixture(scope="module")
def calm(run_rl: Runner) -> Finished:
    return run_rl(*KEYS)


def assert_same(run: Finished, calm: Finished) -> None:
    assert [line["step"] for line in run.metrics] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "critic/loss", "num_tokens", "epoch", "kl"):
        want = [line[name] for line in calm.metrics]
        assert [line[name] for line in run.metrics] == want, name
    for name, want in calm.weights.items():
        np.testing.assert_array_equal(run.weights[name], want, err_msg=name)
    files = sorted(p.name for p in (calm.folder / "rollouts").iterdir())
    assert files == ["1.jsonl", "5.jsonl", "9.jsonl"]
    for name in files:
        texts = [(r.folder / "rollouts" / name).read_text() for r in (run, calm)]
        assert texts[0] == texts[1], name


def test_groups_without_signal_are_replaced_and_counted(calm: Finished) -> None:
    """Half of the prompts are worth 0.5 whatever is answered."""
    rounds = [line for line in calm.metrics if "reward" in line]
    assert [line["step"] for line in rounds] == [1, 5, 9]
    assert sum(line["groups/resampled"] for line in rounds) > 0
    assert all(line["groups/without_signal"] <= 2 for line in rounds)
    assert all(line["answers"] == 16 for line in rounds)
    taken = [line["epoch"] * 64 for line in calm.metrics]
    assert taken[0] == 4 + rounds[0]["groups/resampled"]


def test_a_run_stopped_in_the_middle_of_a_round_goes_on_with_it_or_not_at_all(
    run_rl: Runner,
    calm: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        sampled = tmp_path / "rounds" / "1.npz"
        patched.setattr(loop.Preemption, "reached", lambda _: sampled.exists())
        assert run_rl(*KEYS, folder=tmp_path).code == PREEMPTED
    assert [p.name for p in (tmp_path / "rounds").iterdir()] == ["1.npz"]
    (tmp_path / "rounds" / "1.npz").rename(tmp_path / "1.npz")
    with pytest.raises(ValueError, match=r"rounds/1\.npz: the run stopped in the middle of a rou"):
        run_rl(*KEYS, folder=tmp_path)
    (tmp_path / "1.npz").rename(tmp_path / "rounds" / "1.npz")
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved)
    assert_same(run_rl(*KEYS, folder=tmp_path), calm)
    assert_alike(run_rl(*KEYS, folder=moved, devices=2), calm)


def assert_alike(run: Finished, calm: Finished) -> None:
    """On another mesh: the same prompts and answers, the same steps but for rounding."""
    for name in ("num_tokens", "epoch"):
        assert [line[name] for line in run.metrics] == [line[name] for line in calm.metrics], name
    for name in ("loss", "critic/loss", "kl"):
        a, b = ([line[name] for line in r.metrics] for r in (run, calm))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    texts = [
        [json.loads(line)["tokens"] for line in (r.folder / "rollouts" / "9.jsonl").open()]
        for r in (run, calm)
    ]
    assert texts[0] == texts[1]


def test_a_run_that_dies_while_it_samples_samples_the_same_again(
    run_rl: Runner,
    calm: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = setup_online.our_engine
    with monkeypatch.context() as patched:
        patched.setattr(setup_online, "our_engine", lambda parts: Dying(ours(parts), 4, 5))
        with pytest.raises(Cut):
            run_rl(*KEYS, folder=tmp_path)
    assert_same(run_rl(*KEYS, folder=tmp_path), calm)
