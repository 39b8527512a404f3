"""The files of configs/: each resolves, with each overlay, by the very command its header gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from posttrain import cli

ROOT = Path(__file__).parents[1]
NO_JOBS = ("overlays", "launch")
JOB_CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name not in NO_JOBS)
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
HEADER = re.compile(r"^# (command|hardware|time|score) {2,}(\S.*)$", re.MULTILINE)


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def show(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = cli.main([*arguments, "--show"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_there_are_configs():
    assert len(JOB_CONFIGS) >= 3
    assert len(OVERLAYS) >= 2


@pytest.mark.parametrize("path", [*JOB_CONFIGS, *OVERLAYS], ids=name)
def test_a_header_gives_command_hardware_time_and_score(path, capsys, monkeypatch):
    header = dict(HEADER.findall(path.read_text()))
    assert set(header) == {"command", "hardware", "time", "score"}
    monkeypatch.chdir(ROOT)
    command, _, _ = header["command"].partition(" (")
    words = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
    assert words[0] == "posttrain"
    assert str(path.relative_to(ROOT)) in words
    assert "semantic hash" in show(words[1:], capsys)


def test_configs_that_code_and_pages_name_are_there():
    code = [path for folder in ("posttrain", "launch") for path in (ROOT / folder).rglob("*.py")]
    files = [*code, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {path for f in files for path in re.findall(r"configs/[\w/]+\.yaml", f.read_text())}
    assert len(named) >= 5, "the search itself is broken"
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
@pytest.mark.parametrize("path", JOB_CONFIGS, ids=name)
def test_every_config_takes_every_overlay(path, overlay, capsys):
    plain = show([path.parent.name, str(path)], capsys)
    laid = show([path.parent.name, str(path), str(overlay)], capsys)
    assert laid != plain
    hashes = [re.search(r"semantic hash: (\w+)", text) for text in (plain, laid)]
    assert len({found and found[1] for found in hashes}) == 1, "an overlay changes no result"
