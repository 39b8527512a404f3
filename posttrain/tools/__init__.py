"""Tools that a model may call while it answers. One file per tool, and a line below.

`pkg.module:function` is a tool, too: its type hints and its docstring are the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.config import Config, resolve, semantic
from posttrain.tools.base import Answer, Tool, ToolError, call_tool, failure, tool_of
from posttrain.tools.calculator import Calculator
from posttrain.tools.python import Python

__all__ = [
    "TOOLS",
    "Answer",
    "Tool",
    "ToolError",
    "ToolsConfig",
    "call_tool",
    "failure",
    "open_tools",
    "tool_of",
]

TOOLS: dict[str, type[Config]] = {
    "calculator": Calculator,
    "python": Python,
}


class ToolsConfig(Config):
    """The tools that a model may call, and how often."""

    use: tuple[str, ...] | None = semantic(
        None,
        help="tools by name (calculator, python), or functions of your own as pkg.module:function; "
        "none = those that the task offers",
    )
    max_turns: int = semantic(
        8, ge=1, help="answers of the model in one rollout; a call in the last is not run"
    )
    python: Python = semantic(Python(), help="what programs of the tool python may do")


def open_tools(cfg: ToolsConfig, offered: Sequence[str] = ()) -> dict[str, Tool]:
    """The tools that a config names, by the name that the model sees. offered: the task's.

    ValueError with all names that are no tools, or two tools of one name.
    """
    wrong: list[str] = []
    tools: dict[str, Tool] = {}
    for name in offered if cfg.use is None else cfg.use:
        try:
            tool = cfg.python.tool() if name == "python" else _open(name)
            if tool.name in tools:
                raise ValueError(f"two tools are named {tool.name!r}")
        except ValueError as error:
            wrong.append(f"tools.use: {error}")
        else:
            tools[tool.name] = tool
    if wrong:
        raise ValueError("\n".join(wrong))
    return tools


def _open(name: str) -> Tool:
    found: Any = resolve(TOOLS, name)
    if isinstance(found, Tool):
        return found
    if isinstance(found, type) and issubclass(found, Config):
        found = getattr(found(), "tool", None)
        if found is not None:
            return found()
    elif callable(found):
        return tool_of(found)
    raise ValueError(f"{name!r} is no function, no Tool and no Config with a method `tool`")
