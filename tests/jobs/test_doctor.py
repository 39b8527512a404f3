"""`posttrain doctor`: the whole command, its exit codes, several processes, what it leaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli, doctor
from posttrain.config import load
from posttrain.doctor.base import Finding, Findings, Level, Subject
from posttrain.jobs import doctor as job
from tests.jobs.runs import finish

CONFIGS = Path(__file__).parents[2] / "configs"


def quick(tmp_path: Path, *keys: str) -> list[str]:
    folders = [f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    return ["doctor", *folders, *keys]


def start(tmp_path: Path, *keys: str, devices: int) -> subprocess.Popen[str]:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "posttrain.cli", *quick(tmp_path, *keys)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def test_the_whole_command_finds_this_machine_well(tmp_path: Path) -> None:
    """Warnings there may be (other work, little room): they do not fail."""
    running = start(tmp_path, f"json={tmp_path / 'all.json'}", "mesh.data=2", devices=4)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "all is well" in said
    assert "\x1b" not in said, "plain where it is no terminal"
    report = json.loads((tmp_path / "all.json").read_text())
    assert [check["check"] for check in report["checks"]] == list(doctor.CHECKS)
    assert all(check["findings"] for check in report["checks"])
    assert report["exit_code"] == 0
    lines = said.splitlines()
    for name, check in doctor.CHECKS.items():
        assert f"{name}: {(check.__doc__ or '').splitlines()[0]}" in lines
    assert sum("over data (2)" in line for line in lines) == 4
    assert sum("over fsdp (2)" in line for line in lines) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"], "nothing else is left"


def test_two_processes_report_once_and_leave_with_one_code(tmp_path: Path) -> None:
    """The second one's cache_dir is a file: it is process 0 that says so, and both fail."""
    (tmp_path / "file").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [f"distributed.coordinator=127.0.0.1:{port}", "distributed.processes=2"]
    meet += ["checks=[disk, collectives]", f"json={tmp_path / 'all.json'}"]
    running = [
        start(tmp_path, *meet, "distributed.process_id=0", devices=1),
        start(
            tmp_path,
            *meet,
            "distributed.process_id=1",
            f"data.cache_dir={tmp_path / 'file'}",
            devices=1,
        ),
    ]
    assert finish(running) == [1, 1]
    report = json.loads((tmp_path / "all.json").read_text())
    found = {
        (check["process"], f["what"]): f["level"]
        for check in report["checks"]
        for f in check["findings"]
    }
    assert {key for key, level in found.items() if level >= Level.PROBLEM} == {
        (1, "data.cache_dir"),
        (0, "data.cache_dir, shared"),
        (1, "data.cache_dir, shared"),
    }
    assert found[1, "all-reduce over fsdp (2)"] == Level.OK


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Checks of the test's own in place of the real ones."""
    own: dict[str, Any] = {}
    monkeypatch.setattr(doctor, "CHECKS", own)
    return own


def finds(*findings: Finding) -> Any:
    def check(on: Subject) -> Findings:
        """says what it was told to say"""
        yield from findings

    return check


def test_problems_are_listed_last_the_worst_first_and_fail(
    checks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks["one"] = finds(Finding("a", "fine"), Finding("b", "so so", Level.WARNING, "look at b"))
    assert cli.main(quick(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "all is well, 1 warning" in said
    checks["two"] = finds(
        Finding("c", "does not go", Level.PROBLEM, "mend c"),
        Finding("d", "other numbers", Level.WRONG, "stop"),
    )
    assert cli.main(quick(tmp_path)) == 1
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1].startswith("2 problems, 1 warning; ")
    listed = said.split("to do, the worst first:")[1].splitlines()[1:-1]
    assert [" ".join(line.split()) for line in listed] == [
        "WRONG two d: other numbers",
        "-> stop",
        "FAIL two c: does not go",
        "-> mend c",
        "warn one b: so so",
        "-> look at b",
    ]


def test_a_check_that_crashes_fails_alone(
    checks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crashes(on: Subject) -> Findings:
        """falls over"""
        raise IndexError("list index out of range")
        yield

    checks.update(broken=crashes, fine=finds(Finding("a", "looked at")))
    assert cli.main(quick(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "failed: IndexError: list index out of range" in said
    assert "looked at" in said


def test_a_check_that_hangs_is_told_and_the_command_ends(
    checks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever, codes = threading.Event(), []

    def waits(on: Subject) -> Findings:
        """for somebody who does not come"""
        forever.wait(60)
        yield from ()

    checks["links"] = waits
    monkeypatch.setattr(os, "_exit", codes.append)
    assert cli.main(quick(tmp_path, "time_limit=0.2", f"json={tmp_path / 'a.json'}")) == 1
    assert codes == [1], "what hangs would hold up the end of the process"
    (check,) = json.loads((tmp_path / "a.json").read_text())["checks"]
    assert check["findings"][0]["said"] == "no end after 0.2 s"
    forever.set()


def test_processes_that_do_not_meet_are_a_problem_and_the_host_is_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def apart(cfg: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(job, "init_distributed", apart)
    assert cli.main(quick(tmp_path, "checks=[host, matmul]")) == 1
    said = capsys.readouterr().out
    assert "they do not find each other: RuntimeError: DEADLINE_EXCEEDED" in said
    assert "cores" in said
    assert "not run: the processes have not met" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["checks=[disks]"], "did you mean 'disk'?"),
        (["json=/no/such/folder/a.json"], "no such folder"),
        (["run_dir=gs://bucket/runs"], "run_dir: gs://bucket/runs: folders are examined"),
        (["data.cache_dir=gs://bucket/cache"], "gs://bucket/cache: folders are examined"),
        (["distributed.coordinator=localhost:1"], "set distributed.processes"),
    ],
)
def test_wrong_keys_exit_with_2(
    tmp_path: Path, keys: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(quick(tmp_path, *keys)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("run", [p for folder in ("sft", "preference", "reward_model", "rl")
                                 for p in sorted((CONFIGS / folder).glob("*.yaml"))],
                         ids=lambda path: path.stem)  # fmt: skip
def test_a_runs_config_is_taken_as_it_is(run: Path) -> None:
    files = [run, CONFIGS / "overlays/v5e_16.yaml"]
    cfg = load(job.Config, files, ["log.peak_tflops=197"], accepts=job.ACCEPTS)
    assert cfg.run_dir.name.endswith(run.stem)
    assert cfg.log.peak_tflops == 197


def test_the_help_names_every_check() -> None:
    named = (job.__doc__ or "").split("checks: ")[1].split("\n")[0]
    assert named.split(", ") == list(doctor.CHECKS)
