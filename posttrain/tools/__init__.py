"""Tools that a model may call while it answers. One file per tool, a line below.

`pkg.module:function` names a function of one's own: its type hints and docstring are the schema.
"""

from __future__ import annotations

from posttrain.tools.base import Answer, Tool, ToolError, call_tool, failure, tool_of

__all__ = ["Answer", "Tool", "ToolError", "call_tool", "failure", "tool_of"]
