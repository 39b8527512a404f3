"""Python that a model writes, run in the sandbox: no network, no files, limits on all else."""

from __future__ import annotations

from typing import Any

from posttrain.config import Config, semantic
from posttrain.sandbox import Limits, Ran, SandboxError, run_python
from posttrain.tools.base import Tool, ToolError, function_schema

# as a prompt of Python would: what stands alone in the last line is printed
_SHELL = """\
import ast
tree = ast.parse({source!r})
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
names = {{"__name__": "__main__"}}
exec(compile(tree, "program", "exec"), names)
if last is not None:
    value = eval(compile(ast.Expression(last.value), "program", "eval"), names)
    if value is not None:
        print(repr(value))
"""
_ERROR_LINES = 12  # of what a program that failed wrote to standard error
_REASONS = {"time": "out of time", "memory": "out of memory", "output": "it prints too much"}


class Python(Config):
    """`python(code)`: what a program prints. Each call is a process of its own: nothing is kept."""

    limits: Limits = semantic(Limits(), help="what each program may use")
    allow_network: bool = semantic(
        False, help="where programs cannot be cut off from network and files: run them all the same"
    )

    def tool(self) -> Tool:
        """Runs an empty program first: ValueError where programs cannot be kept apart."""
        try:
            run_python("", limits=self.limits, allow_network=self.allow_network)
        except SandboxError as error:
            raise ValueError(f"the tool python: {error}") from error
        about = "Runs a Python program and returns what it prints, and its last line's value"
        schema = function_schema("python", about, {"code": {"type": "string"}}, ["code"])
        # the sandbox has its own limit of time, and says so: this one is for when it does not
        return Tool("python", schema, self._run, seconds=self.limits.seconds + 30)

    def _run(self, arguments: dict[str, Any]) -> str:
        program = _SHELL.format(source=arguments["code"])
        ran = run_python(program, limits=self.limits, allow_network=self.allow_network)
        if ran.ok:
            return ran.stdout
        raise ToolError(_what_went_wrong(ran))


def _what_went_wrong(ran: Ran) -> str:
    how = _REASONS.get(ran.reason, f"it ended with code {ran.exit}")
    lines = ran.stderr.rstrip().splitlines()[-_ERROR_LINES:]
    return "\n".join([how, *lines, *([f"printed: {ran.stdout}"] if ran.stdout else [])])
