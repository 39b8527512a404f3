"""Parameters as nested dicts: walked, cut in two, joined, named by patterns.

A parameter's path is its names with slashes between, as `layers/0/attention/q`. What is no dict is
a leaf, a quantised array too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

Rule = Callable[[str], bool]
"""Whether the parameter at a path is taken."""


def flat(params: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a nested dict of parameters."""
    for name, value in params.items():
        path = f"{at}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{path}/")
        else:
            yield path, value


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The nested dict of (path, leaf)."""
    out: dict[str, Any] = {}
    for path, leaf in leaves:
        *at, name = path.split("/")
        inner = out
        for key in at:
            inner = inner.setdefault(key, {})
        inner[name] = leaf
    return out


def split(params: Any, rule: Rule, at: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(those the rule takes, the rest): two nested dicts, without empty ones in them."""
    taken: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{at}{name}"
        if isinstance(value, dict):
            for side, part in zip((taken, rest), split(value, rule, f"{path}/"), strict=True):
                if part:
                    side[name] = part
        else:
            (taken if rule(path) else rest)[name] = value
    return taken, rest


def join(params: Any, others: Any) -> Any:
    """The whole that `split` made two of. No array is copied."""
    if not others:
        return params
    whole = dict(params)
    for name, value in others.items():
        whole[name] = join(whole[name], value) if name in whole else value
    return whole


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern (with *, ?, [...]) is a parameter's path, or its end after a slash."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")
