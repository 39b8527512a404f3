"""A run's folder: its resolved config, its checkpoints, and what may continue in it.

<run_dir>/resolved.yaml    the config, as `posttrain sft <run_dir>/resolved.yaml` would take it
          semantic.json    the part of it that decides the result
          checkpoints/<k>  Orbax: `state` after k updates, the resolved config as its metadata
          frozen.json      what it does not train, where it does not train all: a fingerprint
          data.json        which tokens the run is trained on: a hash of the prepared data
          metrics.jsonl  tensorboard/  samples/  export/
          faults.jsonl  goodput.json  stacks/  trace/      docs/faults.md
          lock             held by the process that trains in the folder

A run_dir gs://BUCKET/.. is worked in as posttrain/mirror.py says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import jax
from pydantic import PlainValidator

from posttrain import config, mirror
from posttrain.config import Config, ConfigError, runtime, semantic
from posttrain.folder import make_folder
from posttrain.saving import Saver, first_line

EXTENDABLE = ("train.steps", "train.epochs")
"""Semantic keys that a later start of the run may raise: a finished run can be extended."""
CHANGEABLE = "faults."
"""Those that it may change: a run that stopped at a fault goes on with another answer to it."""
_WHOLE = "commit_success.txt"  # orbax's
_SOURCE = "source of batches"
"""Where it stands, among a checkpoint's metadata: no key of a config has spaces."""
_NOTES = "notes of the loop"
"""Likewise, what the loop goes on from."""


def _folder(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError("must be a folder, or gs://BUCKET/FOLDER")
    if mirror.is_url(value):
        from etils import epath

        if not str(value).startswith("gs://"):
            raise ValueError("must be a folder that all hosts have mounted, or gs://BUCKET/FOLDER")
        return epath.Path(str(value))
    return Path(value).expanduser()


RunDir = Annotated[Path, PlainValidator(_folder)]
"""A run's folder in a job's config."""


class CheckpointConfig(Config):
    """When to save, what to keep, where to start from."""

    every: int = runtime(500, gt=0, help="optimiser steps between checkpoints (and at the end)")
    keep: int = runtime(2, gt=0, help="how many of the latest checkpoints stay")
    keep_every: int | None = runtime(None, gt=0, help="checkpoints at multiples of this stay too")
    resume: Literal["auto", "must", "never"] = runtime(
        "auto", help="auto: continue if run_dir has a checkpoint; must: or fail; never: or refuse"
    )
    retries: int = runtime(
        3, ge=0, help="how often a failed save is tried again, after 2, 4, 8 .. s, before the end"
    )
    init_from: str | None = semantic(
        None, help="run folder (or <folder>@<step>) whose weights this new run starts from"
    )


def is_primary() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def open_run(run_dir: Path, cfg: Config, resume: str) -> bool:
    """Makes or re-opens a run's folder; True if it holds a checkpoint to continue from.

    Raises ConfigError if another semantic config lives there (naming the keys that differ), if
    resume is "must" and there is no checkpoint, or "never" and there is one.
    """
    if is_primary():
        make_folder(run_dir)
    steps = saved_steps(run_dir)
    if resume == "must" and not steps:
        raise ConfigError(f"checkpoint.resume=must, and {run_dir} holds no checkpoint")
    if resume == "never" and steps:
        raise ConfigError(
            f"checkpoint.resume=never, and {run_dir} holds checkpoints (the last: {steps[-1]}): "
            "choose another run_dir"
        )
    marker = run_dir / "semantic.json"
    if marker.exists():
        grown = _refuse_another_config(run_dir, json.loads(marker.read_text()), cfg, bool(steps))
        for key, was, now in grown if is_primary() else ():
            print(
                f"{key} grows from {was} to {now}: the learning rate follows the schedule of the "
                "new length from here on, unless optim.schedule_steps fixes it",
                flush=True,
            )
    if is_primary():
        text = config.resolved_yaml(mirror.as_given(cfg))
        (run_dir / "resolved.yaml").write_text(text, encoding="utf-8")
        temporary = run_dir / "semantic.json.tmp"
        temporary.write_text(json.dumps(config.semantic_dict(cfg), indent=1))
        temporary.replace(marker)
    return bool(steps)


def _refuse_another_config(
    run_dir: Path, old: dict[str, Any], cfg: Config, begun: bool
) -> list[tuple[str, Any, Any]]:
    """(key, was, now) of the lengths that grow; ConfigError for every other semantic difference."""
    if not begun:
        return []  # nothing was trained yet: the folder may take any config
    problems, grown = [], []
    for key, (was, now) in config.diff(old, cfg).items():
        if key.startswith(CHANGEABLE):
            continue
        if was is not None and now is not None and key in EXTENDABLE and now >= was:
            grown.append((key, was, now))
        else:
            problems.append(f"{key}: the run has {was!r}, this config {now!r}")
    if problems:
        raise ConfigError(
            f"{run_dir} holds a run of another config; give back the values, or choose another "
            "run_dir:\n    " + "\n    ".join(problems)
        )
    return grown


def same_data(run_dir: Path, content: str, resuming: bool) -> None:
    """Writes down what the run is trained on (`content`: a hash of all its tokens and weights).

    Raises ValueError where a resumed run finds other data: its steps would be other steps.
    """
    file = run_dir / "data.json"
    if resuming and file.exists():
        if json.loads(file.read_text())["content"] != content:
            raise ValueError(
                f"{run_dir}: the prepared data are not those that the run began with: a file of "
                "data.sources, the template, the tokenizer or a library's version has changed. "
                "Put it back, or go on from the run's weights in another run_dir "
                f"(checkpoint.init_from={run_dir})"
            )
    elif is_primary():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"content": content}) + "\n")
        temporary.replace(file)


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending."""
    folder = mirror.home_of(run_dir) / "checkpoints"
    if mirror.is_url(folder):
        mirror.refresh(folder)
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if mirror.is_url(folder):  # which cannot rename what is whole: a file says so
        found = [p for p in found if (p / _WHOLE).exists()]
    return sorted(int(p.name) for p in found)


class Checkpoints:
    """Saves and restores the training state by the number of updates made; saving is asynchronous.

    The state's step is the position in the data and, with the seed of the config, the state of all
    randomness. `record` (the resolved config) is written beside each state, for people to read.
    """

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, record: dict[str, Any] | None = None):
        from orbax.checkpoint import v1 as ocp

        # typed Any: orbax's own policies do not fit its protocols' annotations
        keep: Any = ocp.training.preservation_policies
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        policies: list[Any] = [keep.LatestN(cfg.keep)]
        if cfg.keep_every:
            policies.append(keep.EveryNSteps(cfg.keep_every))
        self._run_dir, self._every, self._record = run_dir, cfg.every, record
        folder = mirror.home_of(run_dir.absolute()) / "checkpoints"

        def open_() -> Any:
            return ocp.training.Checkpointer(
                str(folder),
                save_decision_policy=always,
                preservation_policy=keep.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            )

        self._saver = Saver(folder, open_, cfg.retries)

    @property
    def _orbax(self) -> Any:
        return self._saver.orbax

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def due(self, step: int) -> bool:
        """Whether `checkpoint.every` asks for one after this many updates."""
        return step % self._every == 0

    def save(
        self,
        step: int,
        state: Any,
        source: Mapping[str, Any] = MappingProxyType({}),
        notes: Mapping[str, Any] = MappingProxyType({}),
        *,
        wait: bool = False,
    ) -> None:
        """Copies the arrays, writes in the background: the caller may donate them at once.

        source, notes: what the source of batches and the loop go on from, where the step does not
        say it (JSON). wait: until it is written. A save that fails is tried again, then OSError
        (posttrain/saving.py); all processes decide the same.
        """
        parts = {_SOURCE: dict(source), _NOTES: dict(notes)}
        record = {**(self._record or {}), **{k: v for k, v in parts.items() if v}}
        mirror.push(self._run_dir)  # what belongs to the steps up to here is there before it
        self._saver.save(step, state, record or None, wait=wait)

    def settle(self) -> None:
        """Waits for what is being written; a save that fails now is told, and not tried again."""
        self._saver.settle()

    def source(self, step: int) -> dict[str, Any]:
        """What was saved with the state of a step for the source of batches."""
        return self._saved_with(step).get(_SOURCE, {})

    def notes(self, step: int) -> dict[str, Any]:
        """Likewise for the loop."""
        return self._saved_with(step).get(_NOTES, {})

    def _saved_with(self, step: int) -> dict[str, Any]:
        return self._orbax.metadata(step).custom_metadata or {}

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """The state of a step (the latest), laid out as abstract_state says, on any mesh."""
        step = self.latest() if step is None else step
        try:
            return self._orbax.load(step, abstract_state)
        except Exception as error:  # orbax and tensorstore each have their own for a missing file
            raise ValueError(
                f"{self._orbax.directory}/{step}: the checkpoint cannot be read "
                f"({first_line(error)}). If it is damaged, delete its folder: the run goes on "
                "from the one before"
            ) from error

    def close(self) -> None:
        """Waits for what is being written. A save that failed is told, and is no error."""
        self._saver.close()


def find_checkpoint(source: str) -> Path:
    """The folder of one checkpoint; source is a run's folder (its latest) or <folder>@<step>.

    Raises ConfigError if there is none, with the steps that there are.
    """
    open_: Any = mirror.at if mirror.is_url(source) else lambda path: Path(path).expanduser()
    folder, step = open_(source), None
    if not folder.is_dir() and "@" in source:
        before, _, step = source.rpartition("@")
        folder = open_(before)
    steps = saved_steps(folder)
    if not steps or step not in (None, *map(str, steps)):
        have = f"the run has steps {steps}" if steps else f"{folder} is no run with checkpoints"
        raise ConfigError(
            f"{source!r}: no such checkpoint; {have}. Name a run's folder, or <folder>@<step> (a "
            "Hugging Face folder goes into model.path)"
        )
    folder = folder if mirror.is_url(folder) else folder.absolute()
    return folder / "checkpoints" / (step or str(steps[-1]))


def saved_params(source: str) -> set[str]:
    """The paths, as `layers/attention/q`, of the parameters that a checkpoint holds."""
    from orbax.checkpoint import v1 as ocp

    saved: Any = ocp.metadata(str(find_checkpoint(source)), checkpointable_name="state").metadata
    return set(_shapes(saved["params"], "/"))


def restore_params(source: str, abstract_params: Any) -> Any:
    """The parameters alone of a checkpoint; source as find_checkpoint takes it."""
    from orbax.checkpoint import v1 as ocp

    path = find_checkpoint(source)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        try:
            saved: Any = ocp.metadata(str(path), checkpointable_name="state").metadata
            _refuse_other_shapes(saved["params"], abstract_params)
            found = ocp.load(str(path), {"params": abstract_params}, checkpointable_name="state")
        except Exception as error:  # orbax and tensorstore each have their own for a missing file
            raise ValueError(
                f"{path}: the parameters cannot be taken ({first_line(error)}). model.path and "
                "model.new_tokens must name the model that the run trained"
            ) from error
    return found["params"]


def _refuse_other_shapes(saved: Any, wanted: Any) -> None:
    """Orbax passes over what only one side has, and so would train on weights never read."""
    has, asked = _shapes(saved, "."), _shapes(wanted, ".")
    for name in sorted(has.keys() | asked.keys()):
        if has.get(name) != asked.get(name):
            raise ValueError(f"{name}: {has.get(name)} there, {asked.get(name)} in the model")


def _shapes(tree: Any, separator: str) -> dict[str, tuple[int, ...]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(at, simple=True, separator=separator): x.shape for at, x in paths}
