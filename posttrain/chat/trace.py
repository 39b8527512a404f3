"""A template rendered so that every character of the text knows who wrote it.

The template's syntax tree is compiled a second time: its literals (and bos_token, eos_token)
become tagged strings that belong to the message whose loop iteration they are met in, the
messages' fields become strings tagged with the message and the field. The traced text must equal
the plain one; the caller refuses the template otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.visitor import NodeTransformer

from posttrain.chat.jinja import ChatEnvironment, compile_template, to_json
from posttrain.chat.traced import (
    FIELD,
    LITERAL,
    NOBODY,
    ROLE,
    Runs,
    Tag,
    Traced,
    concat,
    mark_safe,
    runs_of,
    tagged,
    traced,
)

_PLAIN_FIRST_ARGUMENT = {"get", "split", "rsplit", "startswith", "endswith", "strip"}
_PLAIN_FIRST_ARGUMENT |= {"lstrip", "rstrip"}
_PLAIN_FILTERS = {"selectattr", "rejectattr", "map", "select", "reject"}


class Record(dict):
    """A dict of a conversation: `_tag` where it came from, `_message` its index if a message."""

    __slots__ = ("_message", "_tag")
    _message: int
    _tag: Tag


class Messages(list):
    """The list of messages; `messages[i]` inside a loop over i enters message i."""

    __slots__ = ("_environment",)

    def __getitem__(self, key: Any) -> Any:
        item = super().__getitem__(key)
        if type(key) is int and self._environment.index == key:
            self._environment.own(item._message)
        return item


@dataclass(frozen=True)
class Trace:
    """A rendered text and where its characters came from; `blocks` maps a generation block's
    number to the message it was met in."""

    text: str
    runs: Runs
    blocks: Mapping[int, int]


def wrap_messages(
    messages: Sequence[Mapping[str, Any]], environment: TracedEnvironment
) -> Messages:
    """The messages with every string tagged by its message and top-level field."""
    out = Messages(
        _record({k: _wrap(v, i, k, k == "role") for k, v in message.items()}, i, "", i)
        for i, message in enumerate(messages)
    )
    out._environment = environment  # pyright: ignore[reportAttributeAccessIssue]
    return out


def wrap_tools(tools: Any) -> Any:
    """Tool schemas, tagged as the field "tools" of nobody."""
    return _wrap(tools, NOBODY, "tools")


def _wrap(value: Any, owner: int, field: str, role: bool = False) -> Any:
    if isinstance(value, str):
        return tagged(value, Tag(ROLE if role else FIELD, owner, field, value))
    if isinstance(value, Mapping):
        items = {_wrap(k, owner, field): _wrap(v, owner, field) for k, v in value.items()}
        return _record(items, owner, field, NOBODY)
    if isinstance(value, (list, tuple)):
        return [_wrap(item, owner, field) for item in value]
    return value


def _record(items: dict[Any, Any], owner: int, field: str, message: int) -> Record:
    record = Record(items)
    record._tag = Tag(FIELD, owner, field)
    record._message = message
    return record


def _leaves(value: Any) -> list[Tag]:
    """The tags of every string (and tagged dict) inside a value."""
    if isinstance(value, Traced):
        return [tag for _, tag in value._runs if tag.kind == FIELD]
    if isinstance(value, Mapping):
        own = [value._tag] if isinstance(value, Record) else []
        return own + [tag for pair in value.items() for part in pair for tag in _leaves(part)]
    if isinstance(value, (list, tuple)):
        return [tag for item in value for tag in _leaves(item)]
    return []


def _whole(text: str, value: Any) -> str:
    """Text made from a whole value (JSON, str(dict)): one run, of the value's sources."""
    leaves = _leaves(value)
    if not leaves or not text:
        return text
    first = leaves[0]
    return tagged(text, Tag(FIELD, first.owner, first.field, parts=tuple(leaves)))


def _traced_json(value: Any, *args: Any, **kwargs: Any) -> str:
    return _whole(to_json(value, *args, **kwargs), value)


def _traced_text(value: Any) -> str:
    return value if isinstance(value, str) else _whole(str(value), value)


def _traced_join(value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise ValueError("chat template: join(attribute=...) is not followed; use map first")
    return tagged("", Tag(LITERAL)).join([_traced_text(d)]).join(map(_traced_text, value))


def _traced_indent(
    text: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    """Jinja's `indent` filter on a Traced string."""
    indention = width if isinstance(width, str) else " " * width
    newline = tagged("\n", Tag(LITERAL))
    lines = (text + newline).splitlines()
    rest = [indention + line if line or blank else line for line in lines[1:]]
    out = newline.join(lines[:1] + rest)
    return indention + out if first else out


class _Follow(NodeTransformer):
    """Every loop says which item it is at; special tokens named in the template are literals."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self.tokens = tokens

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        """push; for x in ...: enter(x); ...; pop."""
        self.generic_visit(node)
        if isinstance(node.target, nodes.Name):
            item = nodes.Name(node.target.name, "load")
            node.body.insert(0, self._call("enter", item, node.lineno))
        return [self._call("push", None, node.lineno), node, self._call("pop", None, node.lineno)]

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.ctx == "load" and node.name in self.tokens:
            return nodes.Const(self.tokens[node.name]).set_lineno(node.lineno)
        return node

    def _call(self, name: str, argument: nodes.Expr | None, line: int) -> nodes.Node:
        target = nodes.EnvironmentAttribute(name)
        call = nodes.Call(target, [argument] if argument else [], [], None, None)
        return nodes.ExprStmt(call).set_lineno(line)


class _TracedCode(CodeGenerator):
    """Python whose string literals are looked up in `environment.literals`, the current
    message's table. Literals that only compare or name a key stay plain, for speed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # by id; the nodes are kept, or a new one could take a dead one's id
        self.keep_plain: dict[int, nodes.Node] = {}

    def _plain(self, *children: nodes.Node) -> None:
        self.keep_plain |= {id(c): c for c in children if isinstance(c, nodes.Const)}

    def _literal(self, text: str) -> None:
        self.write(f"environment.literals[{self.environment.literal(text)}]")  # pyright: ignore

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str) and id(node) not in self.keep_plain:
            self._literal(value)
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Any) -> None:
        self._literal(node.data)

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self._plain(node.expr, *(operand.expr for operand in node.ops))
        super().visit_Compare(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        self._plain(node.arg)
        super().visit_Getitem(node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Any) -> None:
        if node.name in _PLAIN_FILTERS:
            self._plain(*node.args, *(keyword.value for keyword in node.kwargs))
        super().visit_Filter(node, frame)

    def visit_Test(self, node: nodes.Test, frame: Any) -> None:
        self._plain(*node.args)
        super().visit_Test(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Any, **kwargs: Any) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.write(f"environment.{node.node.name}(")
            for argument in node.args:
                self.visit(argument, frame)
            self.write(")")
            return
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _PLAIN_FIRST_ARGUMENT:
            self._plain(*node.args[:1])
        super().visit_Call(node, frame, **kwargs)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.text(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        raise nodes.Impossible()

    def _output_child_pre(self, node: Any, frame: Any, finalize: Any) -> None:
        literal = isinstance(node, (nodes.TemplateData, nodes.Const))
        self.write("(" if literal and isinstance(node.as_const(), str) else "environment.text(")

    def _output_child_post(self, node: Any, frame: Any, finalize: Any) -> None:
        self.write(")")


class TracedEnvironment(ChatEnvironment):
    """Compiles and renders ONE template with its sources. Holds the state of a rendering (the
    current message), so one thread at a time may use it."""

    code_generator_class = _TracedCode
    concat = staticmethod(concat)  # pyright: ignore[reportAssignmentType]
    text = staticmethod(_traced_text)

    def __init__(self, source: str, date: str, tokens: Mapping[str, str]) -> None:
        super().__init__(date)
        self.texts: list[str] = []
        self._indices: dict[str, int] = {}
        self._tables: dict[int, list[Traced]] = {}
        self._tokens = tokens
        self.filters.update(
            tojson=_traced_json,
            string=_traced_text,
            join=_traced_join,
            safe=lambda value: mark_safe(_traced_text(value)),
            indent=_traced_indent,
            title=lambda value: _traced_text(value).title(),
        )
        self.template = compile_template(self, source)
        self._reset()

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        assigned = {n.name for n in source.find_all(nodes.Name) if n.ctx != "load"}
        tokens = {k: v for k, v in self._tokens.items() if k not in assigned}
        return super()._generate(_Follow(tokens).visit(source), *args, **kwargs)

    def literal(self, text: str) -> int:
        """The index of a literal in every message's table (asked while compiling)."""
        if text not in self._indices:
            self._indices[text] = len(self.texts)
            self.texts.append(text)
        return self._indices[text]

    def _reset(self) -> None:
        self.index: int | None = None
        self._stack: list[tuple[int, int | None]] = []
        self._blocks: dict[int, int] = {}
        self.own(NOBODY)

    def own(self, owner: int) -> None:
        """From here on, literals belong to this message."""
        self.owner = owner
        table = self._tables.get(owner)
        if table is None:
            tag = Tag(LITERAL, owner)
            table = self._tables[owner] = [tagged(text, tag) for text in self.texts]
        self.literals = table

    def push(self) -> None:
        """A loop begins."""
        self._stack.append((self.owner, self.index))

    def pop(self) -> None:
        """A loop has ended: back to the message around it."""
        owner, self.index = self._stack.pop()
        self.own(owner)

    def enter(self, item: Any) -> None:
        """A loop is at this item: a message, a dict rebuilt from one, or an index."""
        if type(item) is Record:
            if item._message != NOBODY:
                self.own(item._message)
        elif type(item) is dict and "role" in item:
            runs = runs_of(item["role"]) if isinstance(item["role"], str) else ()
            if runs and runs[0][1].owner != NOBODY:
                self.own(runs[0][1].owner)
        elif type(item) is int:
            self.index = item

    def mark_generation(self, caller: Any) -> str:
        """Note what a `{% generation %}` block wrote, and for which message."""
        text = caller()
        block = len(self._blocks) + 1
        self._blocks[block] = self.owner
        return traced(text, tuple((n, tag.inside(block)) for n, tag in runs_of(text)))

    def trace(self, variables: Mapping[str, Any]) -> Trace:
        """Render. `messages` and `tools` among the variables must be wrapped."""
        self._reset()
        pieces = self.template.pieces(variables)
        out = concat(pieces)
        return Trace("".join(pieces), out._runs, self._blocks)
