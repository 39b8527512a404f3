"""A checkout to launch from, a way to launch, and engines on PATH that only write down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import __main__ as command
from launch import code
from tests.launch.fakes import BASE, ROOT, STAND_IN, Said, make_checkout


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """`make_checkout`, taken for the launcher's own; the working folder is the real one."""
    root = make_checkout(tmp_path / "checkout")
    monkeypatch.setattr(code, "checkout", lambda: root)
    monkeypatch.chdir(ROOT)
    return root


Launched = Callable[..., Said]


@pytest.fixture
def launched(checkout, tmp_path, capsys) -> Launched:
    """Runs `python -m launch BACKEND [ACTION] JOB.yaml ...`: (backend, changes to BASE, words)."""

    def run(backend: str, *words: str, **changes: Any) -> Said:
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps({k: v for k, v in (BASE | changes).items() if v is not None}))
        actions = [w for w in words if w in command.ACTIONS]
        rest = [w for w in words if w not in command.ACTIONS]
        exit_code = command.main([backend, *actions, str(path), *rest])
        said = capsys.readouterr()
        return Said(exit_code, said.out, said.err)

    return run


@pytest.fixture
def engines(tmp_path, monkeypatch) -> Callable[[], list[Any]]:
    """kubectl, gcloud and sky that write down (name, words, stdin, {file: bytes in hex})."""
    folder, record = tmp_path / "bin", tmp_path / "record"
    folder.mkdir()
    for name in ("kubectl", "gcloud", "sky"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]
