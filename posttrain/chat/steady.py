"""Templates whose path through the text depends on roles alone: traced once per structure.

Following a template (trace.py) costs several times what rendering it does. Where its conditions
read no more of a message than the role, and its output is literals and whole fields, then all
conversations with the same roles, the same keys and the same empty fields have the same sequence
of literals and fields: a trace of one of them, with the fields replaced, is the trace of another.
That the text put together so equals the rendered text is checked all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from posttrain.chat.trace import Trace
from posttrain.chat.traced import FIELD, ROLE, Runs, Tag

Structure = tuple[Any, ...]
_LOGIC = (nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)


def is_steady(tree: nodes.Template) -> bool:
    """Whether a parsed template is of this kind. False where in doubt."""
    return all(_statement(node, frozenset()) for node in tree.body)


def _statement(node: Any, messages: frozenset[str]) -> bool:
    """messages: the names that stand for one message here."""
    if isinstance(node, nodes.Output):
        return all(_written(item, messages) for item in node.nodes)
    if isinstance(node, nodes.If):
        branches = [*node.body, *node.elif_, *node.else_]
        return _asked(node.test, messages) and all(_statement(n, messages) for n in branches)
    if isinstance(node, nodes.For):
        target: Any = node.target
        plain = isinstance(target, nodes.Name) and not (node.test or node.recursive)
        if not plain or not isinstance(node.iter, nodes.Name) or node.iter.name != "messages":
            return False
        inner = messages | {target.name}
        return all(_statement(n, inner) for n in node.body)
    if isinstance(node, nodes.CallBlock):  # {% generation %}, the one such block there is
        bare = not (node.args or node.defaults)
        generation = isinstance(node.call.node, nodes.ExtensionAttribute)
        return bare and generation and all(_statement(n, messages) for n in node.body)
    return False


def _written(node: Any, messages: frozenset[str]) -> bool:
    """An output: literals, variables and whole fields, one after another."""
    if isinstance(node, (nodes.Add, nodes.Concat)):
        return all(_written(child, messages) for child in node.iter_child_nodes())
    if isinstance(node, (nodes.TemplateData, nodes.Const)):
        return True
    return _variable(node, messages) or _field(node, messages) is not None


def _asked(node: Any, messages: frozenset[str]) -> bool:
    """A condition that reads roles, variables and the place in the loop."""
    if isinstance(node, _LOGIC):
        return all(_asked(child, messages) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Const):
        return True
    if isinstance(node, nodes.Getattr):
        of: Any = node.node
        if isinstance(of, nodes.Name) and of.name == "loop":
            return node.attr in ("first", "last", "index", "index0", "length")
    return _variable(node, messages) or _field(node, messages) == "role"


def _variable(node: Any, messages: frozenset[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name not in messages | {"messages", "loop"}


def _field(node: Any, messages: frozenset[str]) -> str | None:
    """The key of `message['key']` or `message.key`."""
    if not isinstance(node, (nodes.Getitem, nodes.Getattr)):
        return None
    if not isinstance(node.node, nodes.Name) or node.node.name not in messages:
        return None
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def structure_of(messages: Sequence[Mapping[str, Any]]) -> Structure | None:
    """What two conversations must have in common; None for more than roles and texts."""
    out = []
    for message in messages:
        content = message.get("content")
        if message.keys() - {"role", "content", "weight"} or type(content) is not str:
            return None
        out.append((message["role"], content == ""))
    return tuple(out)


@dataclass(frozen=True)
class Known:
    """A traced conversation of some structure, its fields taken out."""

    pieces: tuple[tuple[str, Tag], ...]
    """In order: a literal or a role as it stands, or ("", the tag of a field)."""
    blocks: Mapping[int, int]

    @classmethod
    def of(cls, trace: Trace, messages: Sequence[Mapping[str, Any]]) -> Known | None:
        """None where a run of a field is not the whole field (written twice on end, say)."""
        pieces, at = [], 0
        for length, tag in trace.runs:
            text = trace.text[at : at + length]
            at += length
            if tag.kind == FIELD:
                if tag.field != "content" or text != messages[tag.owner]["content"]:
                    return None
                text = ""
            elif tag.kind == ROLE and text != messages[tag.owner]["role"]:
                return None
            pieces.append((text, tag))
        return cls(tuple(pieces), trace.blocks)

    def fill(self, messages: Sequence[Mapping[str, Any]], rendered: str) -> Trace | None:
        """The trace of another conversation of this structure; None if it is not `rendered`."""
        parts: list[str] = []
        runs: list[tuple[int, Tag]] = []
        for text, tag in self.pieces:
            if tag.kind == FIELD:
                text = messages[tag.owner]["content"]
                new = Tag(FIELD, tag.owner, tag.field, text)
                tag = new.inside(tag.block) if tag.block else new
            parts.append(text)
            runs.append((len(text), tag))
        if "".join(parts) != rendered:
            return None
        filled: Runs = tuple(runs)
        return Trace(rendered, filled, self.blocks)
