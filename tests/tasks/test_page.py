"""docs/tasks.md: every task is in its table, its commands resolve, its code runs."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.sampling.select import SELECTIONS
from posttrain.tasks import TASKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TABLE = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(PAGE) if name == language]


COMMANDS = [
    line
    for body in blocks("bash")
    for line in body.replace("\\\n", " ").splitlines()
    if line.startswith("posttrain ")
]


def test_the_tables_have_every_task_and_selection_with_its_reward():
    rows = dict(TABLE)
    assert rows.keys() >= TASKS.keys() | SELECTIONS.keys()
    for name, task in TASKS.items():
        for part in task.rewards.values():
            told = "its own" if ":" in part["type"] else f"`{part['type']}`"
            assert rows[name].rstrip().endswith(told), name


@pytest.fixture
def reverse(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's own task, as a module that can be imported."""
    (body,) = blocks("python")
    module = types.ModuleType("mytasks")
    monkeypatch.setitem(sys.modules, "mytasks", module)
    module.__dict__["__name__"] = "mytasks"
    exec(compile(body, "mytasks.py", "exec"), module.__dict__)
    return module


def test_there_are_commands():
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_resolves(command, reverse, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = cli.main([*shlex.split(command)[1:], "--show"])
    assert code == 0, capsys.readouterr().err


def test_the_task_of_the_page_makes_problems(reverse):
    prompt = reverse.Reverse(letters=3).prompts("held_out")[5]
    word = re.fullmatch(r"Write (\w{3}) backwards\.", prompt.messages[-1]["content"])
    assert word is not None
    assert prompt.answer == word[1][::-1]
    assert prompt.id == "reverse/held_out/5"
