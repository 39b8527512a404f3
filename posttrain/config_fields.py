"""What a config is made of: Config, semantic and runtime fields, fields of several types.

Used through posttrain.config, which exports all of it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import core_schema


class Config(BaseModel):
    """Base of every config. A field's docstring-like `description` is what --help prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def semantic(default: Any = ..., *, help: str, **kwargs: Any) -> Any:
    """A field that changes the result: it is in the run's hash."""
    return Field(default, description=help, **kwargs)


def runtime(default: Any = ..., *, help: str, **kwargs: Any) -> Any:
    """A field that does not change the result (mesh, remat, logging, paths)."""
    return Field(default, description=help, json_schema_extra={"runtime": True}, **kwargs)


def is_runtime(info: Any) -> bool:
    """Whether a pydantic field was declared by `runtime`."""
    return bool((info.json_schema_extra or {}).get("runtime"))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve(registry: Mapping[str, Any], name: str) -> Any:
    """The registry's value for a name; `pkg.module:attribute` reaches outside of it.

    Raises ValueError that lists the names for an unknown one.
    """
    entry = registry.get(name, name)
    if not isinstance(entry, str):
        return entry
    module, colon, attribute = entry.partition(":")
    if not colon:
        hint = did_you_mean(name, list(registry)) or f"; known: {', '.join(registry)}"
        raise ValueError(f"unknown {name!r}{hint} (pkg.module:Name reaches outside the list)")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{entry!r} cannot be imported: {error}") from error


@dataclass(frozen=True, eq=False)  # typing hashes what stands in an annotation
class Variant:
    """What `variant` returns: reads {type: name, **fields} and writes it back."""

    registry: Mapping[str, Any]
    default: str | None

    def config_class(self, name: Any) -> type[Config]:
        if not isinstance(name, str):
            raise ValueError(f"`type` must be one of {', '.join(self.registry)}; found {name!r}")
        found = resolve(self.registry, name)
        if not (isinstance(found, type) and issubclass(found, Config)):
            raise ValueError(f"type {name!r} is not a Config class")
        return found

    def name_of(self, value: Config) -> str:
        for name in self.registry:
            if resolve(self.registry, name) is type(value):
                return name
        return f"{type(value).__module__}:{type(value).__qualname__}"

    def validate(self, value: Any, base: type[Config] = Config) -> Config:
        """The config of its `type`. ValueError: that is no `base`, or its fields are wrong."""
        if isinstance(value, base):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a mapping with a `type`")
        fields = dict(value)
        name = fields.pop("type", self.default)
        if name is None:
            raise ValueError(f"needs a `type`: one of {', '.join(self.registry)}")
        found = self.config_class(name)
        if not issubclass(found, base):
            where = f"{base.__module__}.{base.__name__}"
            raise ValueError(f"type {name!r} is no {base.__name__}: derive it from {where}")
        return found.model_validate(fields)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda v: self.validate(v, source))


def variant(registry: Mapping[str, Any], default: str | None = None) -> Variant:
    """For `Annotated[Config, variant(REGISTRY)]`: a dict literal of name -> Config class.

    A value of the registry may be text, "pkg.module:Class", imported when it is chosen.
    """
    return Variant(registry, default)


@dataclass(frozen=True)
class Each:
    """A dict or list whose every value has the one shape."""

    inner: type[Config] | Variant


Shape = type[Config] | Variant | Each | None


def shape_of(annotation: Any, metadata: Sequence[Any] = ()) -> Shape:
    """The config inside an annotation: a Config class, a Variant, Each of one, or None."""
    for item in metadata:
        if isinstance(item, Variant):
            return item
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shape_of(args[0], args[1:])
    if origin in (Union, UnionType):
        return next((found for a in args if (found := shape_of(a)) is not None), None)
    if isinstance(origin, type) and issubclass(origin, Mapping | list | tuple) and args:
        inner = shape_of(args[1] if issubclass(origin, Mapping) else args[0])
        return inner if inner is None or isinstance(inner, Each) else Each(inner)
    return None


def class_at(shape: Shape, tree: Any) -> type[Config] | None:
    if not isinstance(shape, Variant):
        return shape if isinstance(shape, type) else None
    try:
        return shape.config_class(tree.get("type", shape.default) if tree else shape.default)
    except ValueError:
        return None


def below(shape: Shape, key: str | int, tree: Any) -> Shape:
    if isinstance(shape, Each):
        return shape.inner
    cls = class_at(shape, tree if isinstance(tree, dict) else None)
    info = cls.model_fields.get(str(key)) if cls else None
    return shape_of(info.annotation, info.metadata) if info else None
