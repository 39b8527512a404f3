"""The parameters of a run's checkpoint, whole: what the run trained, over what it left frozen.

A checkpoint holds the trained parameters alone. <run_dir>/frozen.json has a fingerprint of the
others, so that a run goes on, or another starts from it, over the same ones or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain import checkpoint
from posttrain.checkpoint import is_primary
from posttrain.config import ConfigError
from posttrain.config_yaml import read_file
from posttrain.models.lora import is_adapter
from posttrain.models.nested import flat, join, split
from posttrain.train.reference_store import fingerprint

_FILE = "frozen.json"


def keep_frozen(run_dir: Path, frozen: Any) -> None:
    """Writes down what is frozen, or compares: ValueError where the run had other parameters."""
    if not frozen:
        return
    file, found = run_dir / _FILE, fingerprint(frozen)
    if file.exists() and checkpoint.saved_steps(run_dir):
        if json.loads(file.read_text())["weights"] != found:
            raise ValueError(
                f"{run_dir}: the run trains a part of the parameters, and those that it left "
                "frozen are others now (model.path, checkpoint.init_from): put them back, or "
                "start a new run in another run_dir"
            )
    elif is_primary():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"weights": found}) + "\n")
        temporary.replace(file)


def restored(source: str, layout: Any, base: Callable[[], Any]) -> Any:
    """The parameters of a checkpoint (as find_checkpoint takes it), laid out as `layout` says.

    layout: abstract parameters of the whole model. base: loads the model of model.path, which is
    asked for adapters that the run had not, and for what it left frozen (that is taken from the run
    that it started from itself, if it did). Raises ValueError where that is not what the run had.
    """
    saved = checkpoint.saved_params(source)
    run_dir = checkpoint.find_checkpoint(source).parents[1]
    if (lost := saved - {path for path, _ in flat(layout)}) and all(map(is_adapter, lost)):
        raise ConfigError(
            f"{source}: the run trained adapters ({min(lost)}, ...) that this one has not: give it "
            f"that run's section lora, or start from model.path={run_dir}/export"
        )
    trained, rest = split(layout, saved.__contains__)
    fresh: dict[str, Any] = {}
    if not any(map(is_adapter, saved)):  # the run had none: they begin here
        fresh, rest = split(rest, is_adapter)
    if rest and not (run_dir / _FILE).exists():
        trained, rest = join(trained, rest), {}  # which is refused, by name
    found = checkpoint.restore_params(source, trained)
    if rest:
        began = read_file(run_dir / "resolved.yaml").tree["checkpoint"]["init_from"]
        frozen = _like(rest, restored(began, layout, base) if began else base())
        if fingerprint(frozen) != json.loads((run_dir / _FILE).read_text())["weights"]:
            raise ValueError(
                f"{source}: the run trained a part of the parameters, and {began or 'model.path'} "
                "does not hold the others as it had them: model.path must name what that run "
                "started from"
            )
        found = join(found, frozen)
    return join(found, _like(fresh, base())) if fresh else found


def _like(part: Any, whole: Any) -> Any:
    """The parameters of `whole` whose paths `part` has."""
    paths = {path for path, _ in flat(part)}
    return split(whole, paths.__contains__)[0]
