"""launch/planned.py: a plan comes before a launch, stops what does not fit, and nothing else."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from launch import planned


def said_by(monkeypatch, code: int, out: str = "", err: str = "") -> list[list[str]]:
    """A stand-in for posttrain plan; the words that it is called with."""
    calls: list[list[str]] = []

    def run(words, **_):
        calls.append(words)
        return subprocess.CompletedProcess(words, code, out, err)

    monkeypatch.setattr(planned.subprocess, "run", run)
    monkeypatch.setattr(planned.importlib.util, "find_spec", lambda name: name)
    return calls


@pytest.fixture
def launch(tmp_path) -> SimpleNamespace:
    (tmp_path / "config.json").write_text("{}")
    config = SimpleNamespace(model=SimpleNamespace(path=str(tmp_path)))
    job = SimpleNamespace(name="sft", config=config, text="job: sft\n")
    return SimpleNamespace(job=job, cfg=SimpleNamespace(slices=2, topology="v6e:4x4"))


def test_what_fits_is_told(launch, monkeypatch):
    out = "  peak   4.6 GiB of 31.25 GiB\n  floors: compute 1 s\n  matmuls 3\n"
    calls = said_by(monkeypatch, 0, out)
    notes, problems = planned.plan(launch)
    assert notes == ["plan: peak   4.6 GiB of 31.25 GiB", "plan: floors: compute 1 s"]
    assert not problems
    assert calls[0][-2:] == ["--topology", "2xv6e:4x4"]


def test_what_does_not_fit_is_refused(launch, monkeypatch):
    said_by(monkeypatch, 1, "train step does not fit: a device needs 56 GiB, and has 31 GiB.\n")
    notes, (problem,) = planned.plan(launch)
    assert not notes
    assert "does not fit" in problem.message
    assert "--no-plan" in problem.message


def test_what_stands_in_the_way_stops_nothing(launch, monkeypatch, tmp_path):
    calls = said_by(monkeypatch, 2, err="posttrain: a wrong key\nmore")
    assert planned.plan(launch) == (["plan: not made: posttrain: a wrong key"], [])
    (tmp_path / "config.json").unlink()
    assert "config.json is not here" in planned.plan(launch)[0][0]
    launch.job.name = "rejection"
    assert "not rejection" in planned.plan(launch)[0][0]
    launch.job.name = "sft"
    monkeypatch.setattr(planned.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'posttrain[tpu]'" in planned.plan(launch)[0][0]
    assert len(calls) == 1


def test_no_plan_leaves_it_out(launched):
    assert "plan: not made" in launched("gke", "--dry-run").err
    said = launched("gke", "--dry-run", "--no-plan")
    assert said.exit_code == 0
    assert "plan:" not in said.err
