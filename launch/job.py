"""The job inside a launch: its config as the hosts will read it, checked before anything is made.

The job's own Config class checks it here, so that a slip ends in this terminal and not, hours
later, on the pod. Relative run_dir and cache_dir are laid below the bucket; several hosts are told
how many they are.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import LaunchConfig
from posttrain import cli
from posttrain.config import ConfigError, load, plain_dict, resolved_yaml
from posttrain.config_errors import value_at
from posttrain.config_yaml import Problem, dotted, read_file

_FILE = re.compile(r"\.(jsonl?|parquet|gz|txt|array_?record|jinja|safetensors)$")
OUTPUTS = (("run_dir",), ("data", "cache_dir"))


@dataclass(frozen=True)
class Job:
    """`posttrain <name>` with its resolved config; `notes` is what was changed or looks odd."""

    name: str
    config: Any
    text: str
    notes: tuple[str, ...]


def _raise(found: list[Problem]) -> None:
    if found:
        raise ConfigError(found)


def job_name(cfg: LaunchConfig) -> str:
    """The job that the files name, the last of them deciding. Raises ConfigError if none does."""
    layers = [read_file(path) for path in cfg.run]
    _raise([problem for layer in layers for problem in layer.problems])
    named = [layer.tree["job"] for layer in layers if "job" in layer.tree]
    known = ", ".join(cli.JOBS)
    if not named:
        raise ConfigError(f"run: none of {', '.join(cfg.run)} names its job: add `job: NAME`")
    if named[-1] not in cli.JOBS:
        raise ConfigError(f"run: {named[-1]!r} is no job; known: {known}")
    return named[-1]


def _paths(tree: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every value whose key says that it is a path to read."""
    for key, value in tree.items():
        here = (*at, str(key))
        if isinstance(value, Mapping):
            yield from _paths(value, here)
        elif isinstance(value, str) and re.search(r"(^|_)path$|^init_from$", str(key)):
            yield dotted(here), value


def _not_there(config: Any, cfg: LaunchConfig) -> tuple[list[Problem], list[str]]:
    """What the job reads and the hosts do not have; a name like org/model may be of the hub."""
    problems, notes = [], []
    for key, value in _paths(plain_dict(config)):
        here = "://" not in value and Path(value).expanduser().exists()
        if "://" in value or not (here or _FILE.search(value) or key.endswith("init_from")):
            continue
        if Path(value).is_absolute() or value.startswith("~"):
            if here and not (cfg.mount and value.startswith(cfg.mount + "/")):
                notes.append(f"{key}: {value} is on this machine; will the hosts have it too?")
        elif not any(Path(value).is_relative_to(path) for path in cfg.code):
            message = (
                f"{value!r} does not travel to the hosts: put it in the bucket and name it there "
                f"({cfg.base}/...), or, if it is small and in the checkout, add it to `code`"
            )
            problems.append(Problem(f"run: {key}", "", message))
    return problems, notes


def _moved(config: Any, cfg: LaunchConfig) -> tuple[list[str], list[str]]:
    """Overrides that lay the job's output below the bucket, and what they say."""
    overrides, notes, tree = [], [], plain_dict(config)
    for path in OUTPUTS:
        value, key = value_at(tree, path), dotted(path)
        if not isinstance(value, str) or "://" in value:
            continue
        if not Path(value).is_absolute():  # a home is each host's own: what lies there is a cache
            below = f"{cfg.base}/{'cache' if value.startswith('~') else value}"
            overrides.append(f"{key}={below}")
            notes.append(f"{key}: {value} -> {below}")
        elif not (cfg.mount and value.startswith(cfg.mount + "/")):
            notes.append(f"{key}: {value} is not in the bucket; do all hosts see it?")
    return overrides, notes


def _mesh_problems(config: Any, chips: int, slices: int) -> list[Problem]:
    from posttrain.sharding import mesh_shape, sizes_of_a_slice

    try:
        sizes_of_a_slice(mesh_shape(config.mesh, chips * slices), slices)
    except ConfigError as error:
        return [Problem("run: mesh", "", p.message) for p in error.problems]
    return []


def read(cfg: LaunchConfig) -> Job:
    """The job of a description. Raises ConfigError with all that is wrong with its config."""
    name = job_name(cfg)
    module = importlib.import_module(cli.JOBS[name][0])
    hosts = cfg.slice.hosts * cfg.slices
    if getattr(module, "ACTIONS", None) or not {"run_dir", "mesh"} <= {*module.Config.model_fields}:
        raise ConfigError(f"run: `posttrain {name}` is not a job for a slice: run it where you are")
    accepts = getattr(module, "ACCEPTS", {})
    config = load(module.Config, cfg.run, cfg.set, accepts=accepts)
    added, notes = _moved(config, cfg)
    if hosts > 1:
        if "distributed" not in module.Config.model_fields:
            raise ConfigError(f"run: `posttrain {name}` is one process: take a slice of one host")
        if config.distributed.coordinator in ("", "auto"):
            added += ["distributed.coordinator=auto", f"distributed.processes={hosts}"]
            notes.append(f"distributed.processes: {hosts}, so that no host begins without others")
    problems, odd = _not_there(config, cfg)
    problems += _mesh_problems(config, cfg.slice.chips, cfg.slices)
    try:
        config = load(module.Config, cfg.run, [*cfg.set, *added], accepts=accepts)
    except ConfigError as error:
        problems += error.problems
    _raise(problems)
    return Job(name, config, resolved_yaml(config), (*notes, *odd))
