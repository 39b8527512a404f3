"""pydantic's errors -> every problem of a config, by dotted path, file, line and value found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from posttrain.config_fields import Config, Each, Shape, below, class_at, did_you_mean, shape_of
from posttrain.config_yaml import KeyPath, Layer, Problem


class ConfigError(ValueError):
    """Everything wrong with a config, at once. A job that meets it exits with 2: do not retry."""

    def __init__(self, problems: Sequence[Problem] | str):
        if isinstance(problems, str):
            problems = [Problem("", "", problems)]
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"the config has {count}:{lines}")


def value_at(tree: Any, path: KeyPath) -> Any:
    """The part of a tree of dicts and lists that a path leads to; None where it leads nowhere."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def _located(loc: Sequence[str | int], layer: Layer, cls: type[Config]) -> tuple[KeyPath, Shape]:
    """pydantic's location -> the path in the YAML (without its tags of union branches)."""
    path: KeyPath = ()
    shape, holder, tree = cls, None, layer.tree
    for part in loc:
        inside = part in tree if isinstance(tree, dict) else False
        if isinstance(tree, list):
            inside = isinstance(part, int) and part < len(tree)
        known = class_at(shape, tree)
        if inside or (known is not None and part in known.model_fields):
            holder, shape = shape, below(shape, part, tree)
            tree = value_at(tree, (part,)) if inside else None
            path = (*path, part)
    return path, holder


def where(path: KeyPath, layer: Layer) -> str:
    known = [
        layer.origins[path[:n]].where for n in range(len(path), 0, -1) if path[:n] in layer.origins
    ]
    # a section that only `section.key=value` named was written nowhere, but its keys were
    known += [origin.where for at, origin in layer.origins.items() if at[: len(path)] == path]
    return known[0] if known else ""


def _leaf_paths(shape: Shape, path: str = "") -> list[str]:
    cls = class_at(shape.inner if isinstance(shape, Each) else shape, None)
    out = [path] if path else []
    for name, info in cls.model_fields.items() if cls else ():
        inner = shape_of(info.annotation, info.metadata)
        step = f"{path}.{name}" if path else name
        out += _leaf_paths(inner, step + (".<name>" if isinstance(inner, Each) else ""))
    return out


def _unknown(path: KeyPath, holder: Shape, layer: Layer, cls: type[Config]) -> str:
    key = str(path[-1])
    near = class_at(holder, value_at(layer.tree, path[:-1]))
    hint = did_you_mean(key, list(near.model_fields) if near else [])
    if not hint:
        elsewhere = [p for p in _leaf_paths(cls) if p.rpartition(".")[2] == key]
        hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else ""
    if not hint and near:
        hint = f"; known here: {', '.join(near.model_fields)}"
    return f"unknown key{hint}"


def _found(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def problems(
    error: ValidationError, layer: Layer, cls: type[Config]
) -> Iterator[tuple[KeyPath, str, str]]:
    """Yields (path, kind, message) of each of pydantic's errors, those of variants included."""
    for item in error.errors(include_url=False):
        kind = item["type"]
        path, holder = _located(item["loc"], layer, cls)
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        if kind == "extra_forbidden":
            message = _unknown(path, holder, layer, cls)
        elif kind == "missing":
            owner = class_at(holder, value_at(layer.tree, path[:-1]))
            info = owner.model_fields.get(str(path[-1])) if owner else None
            message = f"required, and not given: {info.description if info else ''}"
        elif kind == "model_type":
            message = f"must be a section (key: value lines); found {_found(item['input'])}"
        elif not isinstance(item["input"], Config) and not isinstance(item["input"], dict):
            message = f"{message}; found {_found(item['input'])}"
        yield path, kind, message
