"""YAML files merged left to right + key.path=value -> one frozen pydantic tree.

A config class sits beside the code it configures; a job's Config is made of them. Every field is
*semantic* (it changes the result: part of the run's hash) or *runtime* (mesh, remat, logging,
paths). A field that takes one of several classes is `Annotated[Config, variant(REGISTRY)]`: its
`type:` names the class, and stating another type drops the keys that belonged to the old one.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from posttrain.config_errors import ConfigError, problems, value_at, where
from posttrain.config_fields import (
    Config,
    Each,
    Shape,
    Variant,
    below,
    did_you_mean,
    is_runtime,
    resolve,
    runtime,
    semantic,
    shape_of,
    variant,
)
from posttrain.config_yaml import (
    KeyPath,
    Layer,
    Problem,
    dotted,
    read_file,
    read_overrides,
    to_yaml,
)

__all__ = [
    "Config",
    "ConfigError",
    "did_you_mean",
    "diff",
    "load",
    "plain_dict",
    "resolve",
    "resolved_yaml",
    "runtime",
    "semantic",
    "semantic_dict",
    "semantic_hash",
    "variant",
    "versions",
]

ConfigT = TypeVar("ConfigT", bound=Config)
Accepted = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
_VERSIONED = (
    "posttrain",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
)


def _merge(base: Layer, over: Layer, shape: Shape) -> None:
    """Lays `over` on `base`, in place: mappings key by key, everything else replaced."""

    def forget(path: KeyPath) -> None:
        for known in [p for p in base.origins if p[: len(path)] == path]:
            del base.origins[known]

    def lay(old: dict[str, Any], new: Mapping[str, Any], shape: Shape, path: KeyPath) -> None:
        if isinstance(shape, Variant):
            was = old.get("type", shape.default)
            if new.get("type", was) != was:
                old.clear()
                forget(path)
        for key, value in new.items():
            at = (*path, key)
            if isinstance(value, Mapping) and isinstance(old.get(key), dict):
                lay(old[key], value, below(shape, key, old), at)
            else:
                forget(at)
                old[key] = value

    lay(base.tree, over.tree, shape, ())
    base.origins.update(over.origins)
    base.problems += over.problems
    base.whole &= over.whole


def _validate(cls: type[ConfigT], layer: Layer) -> ConfigT:
    """The config of a merged layer, or ConfigError with every problem there is."""
    try:
        config = cls.model_validate(layer.tree)
        errors: list[tuple[KeyPath, str, str]] = []
    except ValidationError as error:
        config, errors = None, list(problems(error, layer, cls))
    retry = False
    for path, kind, _ in errors:
        value, origin = value_at(layer.tree, path), layer.origins.get(path)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind in ("string_type", "literal_error") and number and origin and origin.text:
            # a name that looks like a number: the field wants the text as it was typed
            value_at(layer.tree, path[:-1])[path[-1]] = origin.text
            retry = True
    if retry:
        return _validate(cls, layer)
    said: dict[KeyPath, list[str]] = {}
    for path, kind, message in errors:
        outer = any(len(p) > len(path) and p[: len(path)] == path for p, _, _ in errors)
        if (outer and kind.endswith("_type")) or (kind == "missing" and not layer.whole):
            continue  # another branch of a union; a key that an unreadable file may hold
        messages = said.setdefault(path, [])
        if message not in messages:
            messages.append(message)
    found = [Problem(dotted(p), where(p, layer), " or ".join(m)) for p, m in said.items()]
    if layer.problems or found:
        raise ConfigError([*layer.problems, *found])
    assert config is not None
    return config


def load(
    config_cls: type[ConfigT],
    paths: Sequence[Any] = (),
    overrides: Sequence[str] = (),
    *,
    accepts: Mapping[str, Accepted] = MappingProxyType({}),
) -> ConfigT:
    """Reads, merges left to right, and checks: every problem in one ConfigError.

    If the class has a field `job`, some file must name that job. A config of a job in `accepts`
    is taken too: the sections both classes have are read, its other ones are passed over, and the
    keys that stand with the job in `accepts`, or that are made there of the files, are set.
    """
    layer, known = Layer(), config_cls.model_fields
    for path in paths:
        _merge(layer, read_file(path), config_cls)
    job = known["job"].default if "job" in known else None
    if job and (means := accepts.get(layer.tree.get("job", ""))) is not None:
        means = means(layer.tree) if callable(means) else means
        layer.tree = {k: v for k, v in layer.tree.items() if k in known} | {"job": job, **means}
    if job and not paths:
        layer.tree["job"] = job
    _merge(layer, read_overrides(overrides), config_cls)
    if job and (named := layer.tree.get("job")) != job:
        if named is not None:
            message = f"this is a config of {named!r}, not of {job!r}: run `posttrain {named}`"
            layer.problems.append(Problem("job", where(("job",), layer), message))
        elif layer.whole:
            layer.problems.append(Problem("job", "", f"no file names its job: add `job: {job}`"))
        layer.tree["job"] = job
    return _validate(config_cls, layer)


def _plain(value: Any, keep_runtime: bool, field_shape: Shape = None) -> Any:
    if isinstance(value, Config):
        fields = type(value).model_fields
        out = {"type": field_shape.name_of(value)} if isinstance(field_shape, Variant) else {}
        for name, info in fields.items():
            if keep_runtime or not is_runtime(info):
                inner = shape_of(info.annotation, info.metadata)
                out[name] = _plain(getattr(value, name), keep_runtime, inner)
        return out
    inner = field_shape.inner if isinstance(field_shape, Each) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, keep_runtime, inner) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(v, keep_runtime, inner) for v in items]
    if isinstance(value, Enum):
        return _plain(value.value, keep_runtime)
    return str(value) if isinstance(value, PurePath) else value


def plain_dict(config: Config) -> dict[str, Any]:
    """Every field as plain YAML values; `load` gives the same config from it."""
    return _plain(config, True)


def semantic_dict(config: Config) -> dict[str, Any]:
    """The fields that change the result, as plain values; sections that hold none are left out."""
    return {k: v for k, v in _plain(config, False).items() if v != {}}


def semantic_hash(config: Config) -> str:
    """16 hex digits that change when, and only when, a semantic value does."""
    text = json.dumps(semantic_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(tree: Any, path: KeyPath = ()) -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {dotted(path): tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, (*path, key)).items()}


def diff(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> dict[str, tuple]:
    """Dotted key -> (value in a, value in b) of the semantic keys that differ; absent is None.

    Either side may be the `semantic_dict` of a config that was written earlier.
    """
    flat_a, flat_b = (_flat(semantic_dict(c) if isinstance(c, Config) else c) for c in (a, b))
    keys = [*flat_a, *(k for k in flat_b if k not in flat_a)]
    pairs = {k: (flat_a.get(k), flat_b.get(k)) for k in keys}
    return {k: (x, y) for k, (x, y) in pairs.items() if x != y}


def _git(*arguments: str) -> str:
    """What git says of the checkout this package runs from; "" where there is none."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _distribution(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the git revision (`-dirty`: with changes)."""
    out = {"python": platform.python_version()}
    out |= {name: _distribution(name) for name in _VERSIONED}
    revision = _git("rev-parse", "HEAD")
    if revision and _git("ls-files", "config.py"):
        changed = _git("status", "--porcelain", "--untracked-files=no")
        out["git"] = revision + ("-dirty" if changed else "")
    elif (stamp := Path(__file__).with_name("REVISION")).exists():  # a launch left it
        out["git"] = stamp.read_text(encoding="utf-8").strip()
    return out


def resolved_yaml(config: Config) -> str:
    """The whole config as YAML; `load` of it gives the same config. Versions are its comments."""
    head = [f"# {name}: {value}" for name, value in versions().items()]
    head.append(f"# semantic hash: {semantic_hash(config)}")
    return "\n".join(head) + "\n" + to_yaml(plain_dict(config))
