"""YAML files merged left to right + key.path=value -> one frozen pydantic tree."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of every config. A field's docstring-like `description` is what --help prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def semantic(default: Any = ..., *, help: str, **kwargs: Any) -> Any:
    """A field that changes the result: it is in the run's hash."""
    return Field(default, description=help, **kwargs)


def runtime(default: Any = ..., *, help: str, **kwargs: Any) -> Any:
    """A field that does not change the result (mesh, remat, logging, paths)."""
    return Field(default, description=help, json_schema_extra={"runtime": True}, **kwargs)
