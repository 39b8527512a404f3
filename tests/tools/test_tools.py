"""Tools: schemas from functions, arguments held to them, and failures that are told, not raised."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest

from posttrain import sandbox
from posttrain.config import Config
from posttrain.tools import ToolsConfig, call_tool, open_tools, tool_of
from posttrain.tools.base import MAX_ANSWER, Tool, ToolError
from posttrain.tools.calculator import Calculator
from posttrain.tools.python import Python


def look_up(word: str, limit: int = 3, kinds: list[Literal["noun", "verb"]] | None = None) -> Any:
    """Looks a word
    up.

    More about it.

    Args:
        word: The word, as it is spelled.
        limit (int): Most entries.
    """
    return {"word": word, "limit": limit, "kinds": kinds}


def endless(text: str) -> str:
    """Sleeps."""
    time.sleep(3)
    return text


def test_a_schema_comes_from_hints_and_docstring():
    tool = tool_of(look_up)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "The word, as it is spelled."},
                    "limit": {"type": "integer", "description": "Most entries."},
                    "kinds": {
                        "anyOf": [
                            {"type": "array", "items": {"enum": ["noun", "verb"]}},
                            {"type": "null"},
                        ]
                    },
                },
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
    told = call_tool({"look_up": tool}, "look_up", {"word": "quince", "kinds": ["noun"]})
    assert told.text == '{"word": "quince", "limit": 3, "kinds": ["noun"]}'
    assert not told.failed


def test_what_cannot_be_a_tool_is_told_at_once():
    def bad(a, b: set[int], *c: int) -> None: ...

    with pytest.raises(ValueError, match="bad cannot be a tool") as error:
        tool_of(bad)
    for reason in (
        "a: no type hint",
        "b: JSON has no word for",
        "c: arguments are",
        "no docstring",
    ):
        assert reason in str(error.value)


def failing(text: str) -> str:
    """Fails."""
    raise KeyError(text)


def picky(text: str) -> str:
    """Is picky."""
    raise ToolError("not that one")


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("failing", {"text": "x"}, "error: failing raised KeyError: 'x'"),
        ("picky", {"text": "x"}, "error: not that one"),
        ("picky", {}, "error: wrong arguments for picky: text: missing"),
        ("picky", {"text": 3}, "error: wrong arguments for picky: text: expected string; found 3"),
        ("other", {}, "error: there is no tool named 'other'; there are: failing, picky, endless"),
        ("endless", {"text": "x"}, "error: endless took more than 0.1 s"),
    ],
)
def test_failures_are_told(name: str, arguments: dict[str, Any], told: str):
    late = tool_of(endless)
    late = Tool(late.name, late.schema, late.function, seconds=0.1)
    tools = {"failing": tool_of(failing), "picky": tool_of(picky), "endless": late}
    answer = call_tool(tools, name, arguments)
    assert (answer.text, answer.failed) == (told, True)


def test_long_answers_are_cut_and_that_is_said():
    tool = Tool("long", {"function": {}}, lambda _: "a" * (MAX_ANSWER + 5), quick=True)
    answer = call_tool({"long": tool}, "long", {})
    assert answer.text == "a" * MAX_ANSWER + "\n[5 more characters cut off]"


class Shouting(Config):
    """A tool of a user's own."""

    def tool(self) -> Tool:
        return Tool("shout", {"function": {"name": "shout"}}, str)


READY = Calculator().tool()


def test_tools_are_opened_by_name():
    here = __name__
    names = ("calculator", f"{here}:look_up", f"{here}:Shouting")
    assert list(open_tools(ToolsConfig(use=names))) == ["calculator", "look_up", "shout"]
    assert list(open_tools(ToolsConfig(), ("calculator",))) == ["calculator"], "the task's"
    assert open_tools(ToolsConfig(use=()), ("calculator",)) == {}, "none, whatever the task says"
    wrong = ("calculater", f"{here}:READY", "calculator", "os:sep", "no.such:thing")
    with pytest.raises(ValueError, match=r"tools\.use") as error:
        open_tools(ToolsConfig(use=wrong))
    lines = str(error.value).splitlines()
    assert "did you mean 'calculator'" in lines[0]
    assert "two tools are named 'calculator'" in lines[1]
    assert "'os:sep' is no function, no Tool" in lines[2]
    assert "cannot be imported" in lines[3]
    assert len(lines) == 4


@pytest.fixture(scope="module")
def python() -> dict[str, Tool]:
    limits = sandbox.Limits(seconds=1, output_kb=4)
    return open_tools(ToolsConfig(use=("python",), python=Python(limits=limits)))


@pytest.mark.parametrize(
    ("code", "told", "failed"),
    [
        ("print('a')\n6 * 7", "a\n42\n", False),
        ("x = 3", "", False),
        ("", "", False),
        ("1 / 0", "ZeroDivisionError: division by zero", True),
        ("def f(", "SyntaxError", True),
        ("while True: pass", "error: out of time", True),
        ("print('x' * 10**6)", "error: it prints too much", True),
        (
            "import sys; print('half'); sys.exit(3)",
            "error: it ended with code 3\nprinted: half",
            True,
        ),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "Network is unreach", True),
    ],
)
def test_python(python: dict[str, Tool], code: str, told: str, failed: bool):
    answer = call_tool(python, "python", {"code": code})
    assert answer.failed == failed
    assert told in answer.text if failed else told == answer.text


def test_python_is_refused_where_programs_cannot_be_kept_apart(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise sandbox.SandboxError("no namespaces here")

    monkeypatch.setattr("posttrain.tools.python.run_python", refuse)
    with pytest.raises(ValueError, match="the tool python: no namespaces here"):
        open_tools(ToolsConfig(use=("python",)))
