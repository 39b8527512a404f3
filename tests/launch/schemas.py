"""The schemas of JobSet and Kueue as validators that refuse unknown fields."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml


def closed(node: Any) -> Any:
    """A schema in which every object with listed properties has no others."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: closed(value) for key, value in node.items()}
    free = "additionalProperties" in out or out.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(out.get("properties"), dict) and not free:
        out["additionalProperties"] = False
    return out


@functools.cache
def _schema(path: Path, version: str) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(path.read_text(), loader)["spec"]["versions"]
    return closed(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == version))


def faults(data_dir: Path, document: dict[str, Any]) -> list[str]:
    """What the schema of a document's kind and version says against it.

    These schemas leave metadata open: Kubernetes' own of another kind reads it.
    """
    bare = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    kubernetes_validate.validate(bare, "1.37", strict=True)
    group, _, version = document["apiVersion"].partition("/")
    path = data_dir / "schemas" / f"{group}_{document['kind'].lower()}s.yaml"
    errors = jsonschema.Draft202012Validator(_schema(path, version)).iter_errors(document)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors]
