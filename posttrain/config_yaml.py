"""YAML text -> plain values that remember where each was written; and back to text.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: `1e-6` is a number, `no` and
`2024-07-26` are strings, `010` is ten, `1:30` is not ninety. A duplicate key is a problem, never a
silent last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `file.yaml:12` or `command line`, and its text if a scalar."""

    where: str
    text: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: its dotted path ("" = the whole), where, and what."""

    path: str
    where: str
    message: str

    def __str__(self) -> str:
        head = f"{self.path or 'config'} ({self.where})" if self.where else self.path or "config"
        return f"{head}: {self.message}"


@dataclass
class Layer:
    """One YAML file, or all overrides of a command line: a tree and where its parts come from."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    whole: bool = True
    """False: the text could not be read, so keys that seem missing may be in it."""


_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own name)


class _Dumper(yaml.SafeDumper):
    """Quotes what either schema, 1.1 or 1.2, would take for something other than a string."""


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if re.match(r"0[ox]", text) else int(text)
        case "float":
            return float(re.sub(r"\.(?=[inIN])", "", text))
        case "str":
            return text
    raise yaml.MarkedYAMLError(None, None, f"unknown tag {node.tag}", node.start_mark)


class _Reader:
    def __init__(self, layer: Layer, name: str, numbered: bool):
        self.layer, self.name, self.numbered = layer, name, numbered

    def where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name

    def build(self, node: yaml.Node, path: KeyPath, loader: _Loader) -> Any:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.layer.origins[path] = Origin(self.where(node), text)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(n, (*path, i), loader) for i, n in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        written: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
            if key.value in written and key.value != "<<":
                first = written[key.value].start_mark.line + 1
                self.layer.problems.append(
                    Problem(
                        dotted((*path, key.value)),
                        self.where(key),
                        f"duplicate key, first on line {first}: remove one",
                    )
                )
            written[key.value] = key
        loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        for key, value in node.value:
            out[key.value] = self.build(value, (*path, key.value), loader)
            inner = self.layer.origins[(*path, key.value)]
            self.layer.origins[(*path, key.value)] = Origin(self.where(key), inner.text)
        return out


def _parse(text: str, name: str, layer: Layer, path: KeyPath, numbered: bool) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            layer.origins[path] = Origin(name, "")
            return None
        return _Reader(layer, name, numbered).build(node, path, loader)
    finally:
        loader.dispose()


def read_file(path: str | Path) -> Layer:
    """One YAML file. What is wrong with it lands in `problems`; nothing is raised."""
    name, layer = str(path), Layer()
    try:
        if "://" in name:
            from etils import epath

            text = epath.Path(name).read_text()
        else:
            text = Path(name).read_text(encoding="utf-8")
        tree = _parse(text, name, layer, (), numbered=True)
    except FileNotFoundError:
        message = "no such file"
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
    except RecursionError:
        message = "an alias contains itself"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        name = f"{name}:{mark.line + 1}" if mark else name
        message = f"not YAML: {error.problem}"
    except yaml.YAMLError as error:
        message = f"not YAML: {error}"
    else:
        if isinstance(tree, dict):
            layer.tree = tree
            return layer
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        message = f"the top of a config must be a mapping (key: value); found {found}"
    return Layer(problems=[*layer.problems, Problem("", name, message)], whole=False)


def read_overrides(arguments: Sequence[str]) -> Layer:
    """`key.path=value` arguments as one layer; a later one wins over an earlier one."""
    layer = Layer()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(part.strip() == part and part for part in path):
            layer.problems.append(
                Problem("", "command line", f"expected key.path=value, found {argument!r}")
            )
            continue
        for known in [p for p in layer.origins if p[: len(path)] == path]:
            del layer.origins[known]
        try:
            value = _parse(text, "command line", layer, path, numbered=False)
        except (yaml.YAMLError, RecursionError) as error:
            what = getattr(error, "problem", None) or str(error)
            layer.problems.append(
                Problem(key, "command line", f"the value {text!r} is not YAML: {what}")
            )
            continue
        at = layer.tree
        for part in path[:-1]:
            below = at.get(part)
            at[part] = below if isinstance(below, dict) else {}
            at = at[part]
        at[path[-1]] = value
    return layer


def dotted(path: KeyPath) -> str:
    """("eval", "held_out", 0) -> "eval.held_out.0"."""
    return ".".join(str(part) for part in path)


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_file` reads back to the same values."""
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
