"""python -m launch BACKEND [status|logs|stop] JOB.yaml [OVERLAY.yaml ...] [key.path=value ...]

A job of a description (docs/launch.md) on a cluster: checked here, then handed to kubectl, gcloud
or sky. Without an action it is created; --dry-run prints what would be, and needs none of them.
    python -m launch gke configs/launch/qwen3_v6e.yaml --dry-run
A job whose model's config.json is here is compiled for the slices first (docs/plan.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import BACKENDS, code, job, planned
from launch.base import Backend, Launch, Steps, execute, show
from launch.config import LaunchConfig
from posttrain.cli import DATA_ERROR, INTERRUPTED, USAGE_ERROR
from posttrain.config import ConfigError, did_you_mean, load
from posttrain.config_yaml import KeyPath, Problem, read_file, read_overrides

ACTIONS = {
    "status": "what the engine says of the job",
    "logs": "what its first host prints, followed",
    "stop": "tells it to save and end, and gives the machines back",
}
FLAGS = ("--dry-run", "--no-plan", "--show", "--help")


class UsageError(Exception):
    """A command line that cannot be understood."""


def usage() -> str:
    """What --help prints."""
    from posttrain.config_help import help_text

    actions = "\n".join(f"  {name:<7} {line}" for name, line in ACTIONS.items())
    keys = f"\n{help_text(LaunchConfig)}".replace("\n *", "\n  ")
    return (
        f"usage: {(__doc__ or '').strip()}\n\nbackends: {', '.join(BACKENDS)}\n\n"
        f"actions:\n{actions}\n\nflags:\n  --dry-run  print it, do nothing\n"
        "  --no-plan  do not compile the job for the slices first (posttrain plan)\n"
        f"  --show     print the resolved description\n\nkeys of a description:{keys}"
    )


def _where(paths: Sequence[str], overrides: Sequence[str]) -> dict[KeyPath, str]:
    layers = [*(read_file(path) for path in paths), read_overrides(overrides)]
    return {at: o.where for layer in layers for at, o in layer.origins.items()}


def rules(cfg: LaunchConfig, backend: Backend) -> list[tuple[str, str]]:
    """(dotted key, what is wrong) of a description, of what its fields mean together."""
    found = []
    if cfg.spot and cfg.reservation:
        found.append(("spot", "spot or a reservation, not both: a reservation is not taken back"))
    if both := {*cfg.env} & {*cfg.secrets}:
        found.append(("secrets", f"{', '.join(sorted(both))}: in `env` too; keep one"))
    if cfg.grace < cfg.save_seconds:
        message = f"{cfg.grace} s from SIGTERM to SIGKILL, and a save takes {cfg.save_seconds:g} s"
        found.append(("grace_seconds", message))
    return [*found, *backend.problems(cfg)]


def prepare(cfg: LaunchConfig) -> tuple[Launch | None, list[Problem]]:
    """The job and the code of a description, or all that is wrong with them."""
    problems: list[Problem] = []
    the_job = the_code = None
    try:
        the_job = job.read(cfg)
    except ConfigError as error:
        problems += error.problems
    try:
        the_code = code.read(code.checkout(), cfg.code, cfg.allow_dirty)
    except ConfigError as error:
        problems += error.problems
    launch = Launch(cfg, the_job, the_code) if the_job and the_code else None
    return launch, problems


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _create(
    cfg: LaunchConfig, backend: Backend, problems: list[Problem], *, plans: bool = True
) -> Steps:
    launch, found = prepare(cfg)
    if problems + found:
        raise ConfigError([*problems, *found])
    assert launch is not None
    notes, found = planned.plan(launch) if plans else ([], [])
    if found:
        raise ConfigError(found)
    steps = backend.create(launch)
    one, said, changed = cfg.slice, launch.code.revision[:12], launch.code.changed
    if changed:
        said += f", with {len(changed)} changed: {', '.join(changed)}"
    times = f"{cfg.slices} x " if cfg.slices > 1 else ""
    size = f"{_count(one.chips, 'chip')}, {_count(one.hosts, 'host')} of {one.chips_per_host}"
    head = (f"{times}{cfg.topology}: {size}", f"code: {said}")
    for note in (*head, *launch.job.notes, *steps.notes, *notes):
        print(f"launch: {note}", file=sys.stderr)
    return steps


def _run(flags: Sequence[str], words: Sequence[str], overrides: Sequence[str]) -> int:
    if "--help" in flags or not words:
        print(usage(), file=sys.stdout if "--help" in flags else sys.stderr)
        return 0 if "--help" in flags else USAGE_ERROR
    name, *rest = words
    if name not in BACKENDS:
        hint = did_you_mean(name, list(BACKENDS)) or f"; known: {', '.join(BACKENDS)}"
        raise UsageError(f"unknown backend {name!r}{hint}")
    action = rest.pop(0) if rest and rest[0] in ACTIONS else "create"
    for word in rest:
        if not word.endswith((".yaml", ".yml")):
            hint = did_you_mean(word, list(ACTIONS))
            raise UsageError(f"{word!r} is neither an action nor a .yaml file nor key=value{hint}")
    cfg = load(LaunchConfig, rest, overrides)
    if "--show" in flags:
        from posttrain.config import plain_dict
        from posttrain.config_yaml import to_yaml

        print(to_yaml(plain_dict(cfg)), end="")
        return 0
    backend, where = BACKENDS[name], _where(rest, overrides)
    problems = [
        Problem(key, where.get(tuple(key.split(".")), ""), message)
        for key, message in rules(cfg, backend)
    ]
    if action == "create":
        steps = _create(cfg, backend, problems, plans="--no-plan" not in flags)
    elif problems:
        raise ConfigError(problems)
    else:
        steps = {"status": backend.status, "logs": backend.logs, "stop": backend.stop}[action](cfg)
    if "--dry-run" in flags:
        print(show(steps), end="")
        return 0
    return execute(backend, steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its exit code: 2 for a wrong description, else the engine's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = ["--help" if a == "-h" else a for a in arguments if a.startswith("-")]
    rest = [a for a in arguments if not a.startswith("-")]
    try:
        if unknown := [flag for flag in flags if flag not in FLAGS]:
            raise UsageError(f"unknown flag {unknown[0]}; known: {', '.join(FLAGS)}")
        words = [a for a in rest if "=" not in a]
        code = _run(flags, words, [a for a in rest if "=" in a])
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"launch: {error}\n(python -m launch --help lists all)", file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ConfigError) else DATA_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
