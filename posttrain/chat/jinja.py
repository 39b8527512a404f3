"""The sandbox a chat template runs in: what transformers offers a template, less three things.

A template is code from a stranger. It runs in Jinja's immutable sandbox with the settings, the
filters and the globals of transformers' `apply_chat_template`, so that the text is the same
character by character. Left out, since no template needs them: `str.format`, `dict()`, `do`.
`strftime_now` says a date from the config: the same data give the same tokens on any day.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from posttrain.config import ConfigError


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (the name and form that Jinja asks for)

    def parse(self, parser: Any) -> nodes.Node:
        """A call block, as in transformers: what is set inside stays inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return call.set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return self.environment.mark_generation(caller)  # pyright: ignore[reportAttributeAccessIssue]


class TemplateNamespace(Namespace):
    """`namespace(...)` that stores no underscored name, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace stores no underscored name: {name!r}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter of chat templates: json.dumps, without Jinja's HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The plain environment: renders text and remembers nothing about it."""

    def __init__(self, date: str) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        today = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())

        def raise_exception(message: Any) -> None:
            raise jinja2.exceptions.TemplateError(str(message))

        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = lambda form: today.strftime(form)
        self.globals["namespace"] = TemplateNamespace
        for name in ("dict", "lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)

    def wrap_str_format(self, value: Any) -> None:
        """No `.format`, not even Jinja's guarded one: its text could not be followed."""
        if super().wrap_str_format(value) is not None:
            raise jinja2.exceptions.SecurityError("a chat template may not call str.format")

    def mark_generation(self, caller: Any) -> str:
        """What a `{% generation %}` block gives; the traced environment notes where it is."""
        return caller()


class CompiledTemplate:
    """A template with its globals at hand: Jinja's own `render` gathers them at every call,
    which costs more than rendering a short conversation."""

    def __init__(self, template: jinja2.Template) -> None:
        self._template = template
        self._globals = dict(template.globals)
        self._environment = template.environment

    def pieces(self, variables: Mapping[str, Any]) -> list[str]:
        """The pieces of the text, in order."""
        context = self._environment.context_class(
            self._environment,
            {**self._globals, **variables},
            self._template.name,
            self._template.blocks,
        )
        return list(self._template.root_render_func(context))

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text."""
        return "".join(self.pieces(variables))


def compile_template(environment: ChatEnvironment, source: str) -> CompiledTemplate:
    """A compiled template. ValueError with the line where the source is no Jinja."""
    try:
        return CompiledTemplate(environment.from_string(source))
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
