"""Plain values -> YAML that every parser reads alike, whatever version of YAML it follows.

Kubernetes' and SkyPilot's parsers take other plain words for numbers and truths than PyYAML does
(1e-6, 0o17, y), so text is quoted unless it is beyond doubt. Scripts are written as blocks.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z~/][A-Za-z0-9./_ -]{2,}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    block = "\n" in value.rstrip("\n")
    style = "|" if block else None if _PLAIN.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(document: dict[str, Any]) -> str:
    """One document, keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100_000, allow_unicode=True)
