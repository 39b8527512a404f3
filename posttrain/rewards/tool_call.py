"""Calls of tools: the right ones, or at least ones that can be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from posttrain.config import semantic
from posttrain.json_schema import problems
from posttrain.rewards.base import Reward, expected
from posttrain.types import Rollout

Call = tuple[str, Any]


class ToolCall(Reward):
    """1 where the calls are as they should be, else 0.

    match answer: they are the ones that the prompt's answer lists, [{"name", "arguments"}, ...];
    an empty list: none is right. match schema: there is one at least, each of a tool that was
    offered, with arguments that its schema allows. Calls of all turns count. None: the prompt lists
    no calls; or offers no tools. ValueError: what it lists are no calls.
    """

    match: Literal["answer", "schema"] = semantic("answer", help="what calls are held against")
    key: str = semantic("", help="where the calls lie in the prompt's answer")
    ordered: bool = semantic(False, help="they must come in the order given")
    ignore_case: bool = semantic(False, help="texts in arguments match in either case")
    partial: bool = semantic(False, help="the share that is right, of those wanted or made")

    def __call__(self, rollout: Rollout) -> float | None:
        made = [_call(one) for message in rollout.messages for one in _calls_of(message)]
        if self.match == "schema":
            return self._allowed(made, rollout)
        listed = expected(rollout, self.key)
        if listed is None:
            return None
        listed = [listed] if isinstance(listed, Mapping) else listed
        if not isinstance(listed, list):
            raise ValueError(f"the right calls must be a list; found {str(listed)[:100]}")
        wanted = [_call(one) for one in listed]
        right = self._in_order(made, wanted) if self.ordered else self._anyhow(made, wanted)
        return self._value(right, max(len(made), len(wanted)))

    def _value(self, right: int, of: int) -> float:
        if self.partial and of:
            return right / of
        return float(right == of)

    def _allowed(self, made: list[Call], rollout: Rollout) -> float | None:
        offered = {
            tool["function"]["name"]: tool["function"].get("parameters", {})
            for tool in rollout.prompt.tools
        }
        if not offered:
            return None
        right = sum(n in offered and not problems(given, offered[n]) for n, given in made)
        return self._value(right, len(made)) if made else 0.0

    def _in_order(self, made: list[Call], wanted: list[Call]) -> int:
        return sum(self._same(a, b) for a, b in zip(made, wanted, strict=False))

    def _anyhow(self, made: list[Call], wanted: list[Call]) -> int:
        left, right = list(made), 0
        for one in wanted:
            at = next((k for k, other in enumerate(left) if self._same(one, other)), None)
            if at is not None:
                left.pop(at)
                right += 1
        return right

    def _same(self, a: Any, b: Any) -> bool:
        """Equal as JSON: 1 is 1.0, and true is not 1."""
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return a.keys() == b.keys() and all(self._same(a[name], b[name]) for name in a)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(self._same, a, b))
        if self.ignore_case and isinstance(a, str) and isinstance(b, str):
            return a.casefold() == b.casefold()
        return isinstance(a, bool) == isinstance(b, bool) and a == b


def _calls_of(message: Mapping[str, Any]) -> Any:
    return message.get("tool_calls") or () if message["role"] == "assistant" else ()


def _call(one: Any) -> Call:
    """(name, arguments) of {"name", "arguments"}, which may stand in a "function"."""
    inner = one.get("function", one) if isinstance(one, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f'a call must be {{"name", "arguments"}}; found {str(one)[:100]}')
    return inner["name"], inner.get("arguments", {})
