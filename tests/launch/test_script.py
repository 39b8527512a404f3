"""launch/script.py, run: what a host does with exit codes and with SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import code, script
from tests.launch.fakes import git, make_checkout

# exits with the codes of $CODES, one a start; notes each start, and what it was told
JOB = """
import os, pathlib, signal, sys, time
log = pathlib.Path(os.environ["LOG"])
def told(*_):
    log.write_text(log.read_text() + "told ")
    sys.exit(int(os.environ.get("TOLD", "75")))
signal.signal(signal.SIGTERM, told)
log.write_text((log.read_text() if log.exists() else "") + " ".join(sys.argv[1:2]) + " ")
codes = os.environ["CODES"].split()
if codes == ["wait"]:
    time.sleep(20)
sys.exit(int(codes[log.read_text().split().count("sft") - 1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What travels, of a checkout whose command line is JOB."""
    root = make_checkout(tmp_path_factory.mktemp("script") / "checkout")
    (root / "posttrain" / "cli.py").write_text(JOB)
    git(root, "commit", "--quiet", "--all", "--message", "job")
    out = root.parent / "files"
    out.mkdir()
    (out / script.ARCHIVE).write_bytes(code.read(root, [], allow_dirty=False).archive)
    (out / "job.yaml").write_text("job: sft\n")
    (out / "run.sh").write_text(script.RUN)
    return out


def start(folder: Path, work: Path, **env: str) -> subprocess.Popen[str]:
    more = {"WORK": str(work / "work"), "LOG": str(work / "log"), "PAUSE": "0", **env}
    return subprocess.Popen(
        ["bash", str(folder / "run.sh"), "sft"],
        env=os.environ | more,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(work: Path) -> list[str]:
    path = work / "log"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(
    ("codes", "env", "exit_code"),
    [
        ("0", {}, 0),
        ("1", {}, 1),
        ("2", {"RETRIES": "3"}, 2),
        ("1 134 0", {"RETRIES": "2"}, 0),
        ("1 1 7", {"RETRIES": "2"}, 7),
        ("75", {"RETRIES": "3"}, 75),
        ("75 75 1 0", {"RETRIES": "1", "FREE": "1"}, 0),
        ("1 2", {"RETRIES": "5"}, 2),
    ],
)
def test_exit_codes_and_retries(codes, env, exit_code, folder, tmp_path):
    done = start(folder, tmp_path, CODES=codes, **env)
    said = done.communicate(timeout=60)[1]
    assert done.returncode == exit_code, said
    assert log(tmp_path) == ["sft"] * len(codes.split())


def wait_for(work: Path, word: str) -> None:
    until = time.monotonic() + 30
    while word not in log(work) and time.monotonic() < until:
        time.sleep(0.02)
    assert word in log(work)


@pytest.mark.parametrize("told", ["75", "0"])
def test_sigterm_reaches_the_job_and_its_code_is_the_end(told, folder, tmp_path):
    done = start(folder, tmp_path, CODES="wait", RETRIES="3", FREE="1", TOLD=told)
    wait_for(tmp_path, "sft")
    done.send_signal(signal.SIGTERM)
    done.communicate(timeout=60)
    assert done.returncode == int(told)
    assert log(tmp_path) == ["sft", "told"]


@pytest.fixture
def with_setup(folder, tmp_path):
    """What travels, with a set-up script."""

    def make(text: str) -> Path:
        out = tmp_path / "files"
        out.mkdir()
        for path in folder.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        (out / "setup.sh").write_text(text)
        return out

    return make


def test_a_set_up_that_fails_is_no_config_error(with_setup, tmp_path):
    done = start(with_setup("exit 2"), tmp_path, CODES="0")
    said = done.communicate(timeout=60)[1]
    assert done.returncode == 1, "2 would end the job for good"
    assert "the set-up failed with exit code 2" in said
    assert log(tmp_path) == []


def test_a_set_up_stands_in_the_code_and_may_bring_its_python(with_setup, tmp_path):
    text = """set -e
    grep -q jax constraints.txt
    mkdir -p $WORK/venv/bin
    printf '#!/bin/sh\necho venv >> "$LOG"\n' > $WORK/venv/bin/python
    chmod +x $WORK/venv/bin/python"""
    done = start(with_setup(text), tmp_path, CODES="1")
    said = done.communicate(timeout=60)[1]
    assert done.returncode == 0, said
    assert log(tmp_path) == ["venv"]


def test_sigterm_during_the_set_up_is_a_preemption(with_setup, tmp_path):
    out = with_setup('printf "setup " > "$LOG"; exec sleep 20')
    done = start(out, tmp_path, CODES="0", RETRIES="3")
    wait_for(tmp_path, "setup")
    done.send_signal(signal.SIGTERM)
    done.communicate(timeout=60)
    assert done.returncode == 75
    assert log(tmp_path) == ["setup"]


def test_variables_are_data_whatever_is_in_them():
    value = "a'b\"c $(echo no) `no` \\ \n;exit 3"
    text = script.exports({"A": value, "B": "-n"}) + 'printf "%s|%s" "$A" "$B"'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout == f"{value}|-n"


def test_the_set_up_of_machines_is_bash():
    assert subprocess.run(["bash", "-n", "-c", script.SETUP]).returncode == 0
