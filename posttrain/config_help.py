"""A config class -> the rows of `posttrain <job> --help`: key, type, default, one line."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from posttrain.config_fields import Config, Each, Shape, Variant, is_runtime, shape_of


@dataclass(frozen=True)
class Row:
    """One key of a config. `kind` is semantic or runtime; `default` is text, "required" if none."""

    key: str
    type: str
    default: str
    help: str
    kind: str


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML thinks of it: `a | b`, `[text, ...]`, `{name: number}`."""
    if annotation in (NoneType, None):
        return "null"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, UnionType):
        return " | ".join(type_name(arg) for arg in args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{name: {type_name(args[1])}}}"
    if isinstance(origin, type) and issubclass(origin, list | tuple):
        fixed = origin is tuple and Ellipsis not in args
        return f"[{', '.join(map(type_name, args)) if fixed else type_name(args[0]) + ', ...'}]"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section"
    return getattr(annotation, "__name__", str(annotation)).replace("Path", "path")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Config):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str):
        return value or '""'
    return str(value)


def _section(shape: Shape, path: str, kind: str) -> Iterator[Row]:
    if isinstance(shape, Each):
        yield from _section(shape.inner, f"{path}.<name>", kind)
    elif isinstance(shape, Variant):
        names = " | ".join([*shape.registry, "pkg.module:Class"])
        default = shape.default or "required"
        yield Row(f"{path}.type", names, default, "which of these; each has its own keys", kind)
        for name in shape.registry:
            for row in _rows(shape.config_class(name), path, kind):
                yield Row(row.key, row.type, row.default, f"(type {name}) {row.help}", row.kind)
    elif shape is not None:
        yield from _rows(shape, path, kind)


def _rows(cls: type[Config], path: str, outer: str) -> Iterator[Row]:
    for name, info in cls.model_fields.items():
        key = f"{path}.{name}" if path else name
        kind = "runtime" if outer == "runtime" or is_runtime(info) else "semantic"
        shape = shape_of(info.annotation, info.metadata)
        text = type_name(info.annotation)
        yield Row(key, text, _default(info), info.description or "", kind)
        yield from _section(shape, key, kind)


def describe(config_cls: type[Config]) -> list[Row]:
    """Every key of a config, those of its sections and of each variant of a section included."""
    return list(_rows(config_cls, "", "semantic"))


def help_text(config_cls: type[Config], width: int | None = None) -> str:
    """The rows as text: a line `key  type = default`, and its help below; `*` marks runtime."""
    width = width or max(60, min(shutil.get_terminal_size().columns, 100))
    lines: list[str] = []
    section = None
    for row in describe(config_cls):
        top = row.key.split(".")[0] if "." in row.key or row.type == "section" else ""
        if top != section:
            section = top
            lines.append("")
        default = "" if row.default in ("required", "") else f" = {row.default}"
        mark = "*" if row.kind == "runtime" else " "
        need = " (required)" if row.default == "required" else ""
        lines.append(f" {mark}{row.key}: {row.type}{default}{need}")
        indent = " " * 6
        lines += textwrap.wrap(
            row.help, width, initial_indent=indent, subsequent_indent=indent
        ) or [f"{indent}(no help)"]
    return "\n".join(lines).lstrip("\n")
