"""docs/launch.md: every command runs as written, every manifest fits its schema; the commands of
docs/scale.md that launch run too."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from launch import __main__ as command
from posttrain.cli import PREEMPTED, USAGE_ERROR
from tests.launch.fakes import ROOT
from tests.launch.schemas import faults

TEXT = (ROOT / "docs" / "launch.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASH = "".join(body for kind, body in BLOCK.findall(TEXT) if kind == "bash")
SCALE = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [*BASH.splitlines(), *re.findall(r"^python -m launch .*", SCALE, re.MULTILINE)]
CONFIGS = sorted((ROOT / "configs" / "launch").glob("*.yaml"))
HEADER = re.compile(r"^# (command|hardware|time|score) {2,}(\S.*)$", re.MULTILINE)


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "launch"]
    code = command.main(words[3:])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out, said.err


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_runs(line, checkout, engines, capsys):
    out, _ = run(line, capsys)
    assert ("--dry-run" in line) == bool(out)


def test_what_the_page_shows_is_what_is_said(checkout, capsys):
    _, err = run(COMMANDS[0], capsys)
    shown = [line for line in TEXT.splitlines() if line.startswith("launch: ")]
    assert len(shown) == 3
    assert {*shown} <= {*err.splitlines()}


def test_the_queue_of_the_page_fits_its_schemas(data_dir):
    (block,) = [body for kind, body in BLOCK.findall(TEXT) if kind == "yaml"]
    documents = list(yaml.safe_load_all(block))
    assert [d["kind"] for d in documents] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    assert [fault for d in documents for fault in faults(data_dir, d)] == []


def test_the_page_has_the_exit_codes():
    rows = re.findall(r"^\| (\d+), ", TEXT, re.MULTILINE)
    assert {*map(int, rows)} == {USAGE_ERROR, PREEMPTED}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_description_of_ours_launches_by_its_header(path, checkout, capsys):
    header = dict(HEADER.findall(path.read_text()))
    assert set(header) == {"command", "hardware", "time", "score"}
    assert str(path.relative_to(ROOT)) in header["command"]
    assert run(header["command"], capsys)[0]
