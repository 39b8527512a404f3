"""posttrain <job> [action] CONFIG.yaml [OVERLAY.yaml ...] [key.path=value ...]

A job is a module with `Config` and `run(cfg) -> int | None`, imported only when it is chosen.
It may also have
  ACTIONS  dict of action -> one line; then it is `run(cfg, action)`, and an action must be given;
  WORD     the key that a word alone sets;
  ACCEPTS  name of a job whose configs it takes too (it reads the sections both have) -> keys of
           its own that such a config means.
One that takes the configs of other jobs as they are has, in the place of these,
  OPTIONS  dict of flag -> (what follows it, "" for nothing; one line);
  run_any(files, overrides, {flag: value}).
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

JOBS = {
    "sft": ("posttrain.jobs.sft", "supervised fine-tuning on conversations"),
    "preference": ("posttrain.jobs.preference", "preference optimisation on pairs of answers"),
    "reward_model": ("posttrain.jobs.reward_model", "a model that scores answers, from pairs"),
    "rejection": ("posttrain.jobs.rejection", "many answers to each prompt; the best as data"),
    "rl": ("posttrain.jobs.rl", "learning online: a task's rewards, GRPO to PPO"),
    "evaluate": ("posttrain.jobs.evaluate", "how well a model does a task"),
    "plan": ("posttrain.jobs.plan", "compile a job for a TPU slice without one: does it fit"),
    "report": ("posttrain.jobs.report", "the answers of a run, with what they earned"),
    "score": ("posttrain.jobs.score", "rows of answers -> the same rows with their scores"),
    "data": ("posttrain.jobs.data", "prepare, preview or check training data"),
    "convert": ("posttrain.jobs.convert", "model folder or run -> Hugging Face model folder"),
    "chat": ("posttrain.jobs.chat", "talk to a model in the terminal"),
    "doctor": ("posttrain.jobs.doctor", "the first minute on new hardware: is it right, how fast"),
    "demo": ("posttrain.jobs.demo", "base model, SFT and DPO on generated text, in minutes"),
}
FLAGS = {
    "--help": "this text; after a job's name: every key of its config",
    "--show": "print the resolved config, run nothing",
    "--debug": "show the traceback of an error",
    "--version": "print the version",
}
USAGE_ERROR = 2  # also a config error: a launcher must not retry it
DATA_ERROR = 1
INTERRUPTED = 130
PREEMPTED = 75  # every process of a run leaves with it, together
PIPE_CLOSED = 141
EXIT_CODES = """exit codes:
  0    done
  1    wrong data or a failure; the message says which
  2    wrong config or command: do not retry
  70   hung (faults.watchdog); the stacks of all threads are in <run_dir>/stacks: start again
  75   preempted after saving: start the same command again
  130  interrupted from the keyboard"""


class UsageError(Exception):
    """A command line that cannot be understood."""


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in rows.items())


def _usage() -> str:
    jobs = _table({name: line for name, (_, line) in JOBS.items()})
    return (
        "usage: posttrain <job> [action] CONFIG.yaml [OVERLAY.yaml ...] [key.path=value ...]\n\n"
        "Files are merged left to right, key.path=value on top.\n\n"
        f"jobs:\n{jobs}\n\nflags:\n{_table(FLAGS)}\n\n{EXIT_CODES}"
    )


def _job_usage(name: str, job: ModuleType) -> str:
    from posttrain.config_help import help_text

    actions: dict[str, str] = getattr(job, "ACTIONS", {})
    action = f" {{{'|'.join(actions)}}}" if actions else ""
    action += f" {word.upper()}" if (word := getattr(job, "WORD", "")) else ""
    options = {f"{flag} {what}".strip(): line for flag, (what, line) in _options(job).items()}
    parts = [
        f"usage: posttrain {name}{action} CONFIG.yaml [OVERLAY.yaml ...] [key.path=value ...]",
        (job.__doc__ or JOBS[name][1]).strip(),
        f"actions:\n{_table(actions)}" if actions else "",
        f"flags:\n{_table(options | FLAGS)}",
        ""
        if options
        else f"config keys (* = runtime: does not change the result):\n{help_text(job.Config)}",
    ]
    return "\n\n".join(part for part in parts if part)


def _options(job: ModuleType) -> dict[str, tuple[str, str]]:
    return getattr(job, "OPTIONS", {})


def _options_of(arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of the job that the arguments name; it is loaded only where there are flags of its own."""
    name = next((a for a in arguments if not a.startswith("-")), "")
    own = any(a.startswith("-") and a not in (*FLAGS, "-h") for a in arguments)
    return _options(_import(name)) if own and name in JOBS else {}


def _split(
    arguments: Sequence[str],
) -> tuple[list[str], list[str], list[str], dict[str, str]]:
    """Arguments -> (flags, words and YAML files, key=value, a job's own flags with values)."""
    flags, words, overrides, given = [], [], [], {}
    options, rest = _options_of(arguments), list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            if flag in options:
                if options[flag][0] and not equals:
                    if not rest or rest[0].startswith("-"):
                        raise UsageError(f"{flag} needs {options[flag][0]}")
                    value = rest.pop(0)
                given[flag] = value
                continue
            flag = "--help" if argument == "-h" else argument
            if flag not in FLAGS:
                known = [*options, *FLAGS]
                raise UsageError(f"unknown flag {argument}{_suggest(argument, known)}")
            flags.append(flag)
        elif "=" in argument:
            overrides.append(argument)
        else:
            words.append(argument)
    return flags, words, overrides, given


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _import(name: str) -> ModuleType:
    """The job's module. ValueError: packages that it needs do not fit, whatever they raise."""
    try:
        return importlib.import_module(JOBS[name][0])
    except Exception as error:
        raise ValueError(
            f"posttrain {name} cannot be loaded: {type(error).__name__}: {error}. Do the packages "
            "fit each other? pip install -e . -c constraints.txt, in a fresh environment"
        ) from error


def _run(
    name: str, words: list[str], overrides: list[str], flags: list[str], given: dict[str, str]
) -> int:
    job = _import(name)
    if "--help" in flags:
        print(_job_usage(name, job))
        return 0
    actions: dict[str, str] = getattr(job, "ACTIONS", {})
    plain = [word for word in words if not _is_file(word)]
    if actions:
        if not plain or words[0] != plain[0]:
            raise UsageError(f"posttrain {name} needs an action: {', '.join(actions)}")
        if plain[0] not in actions:
            raise UsageError(f"unknown action {plain[0]!r}{_suggest(plain[0], list(actions))}")
    extra = plain[1:] if actions else plain
    if extra and (key := getattr(job, "WORD", None)):
        overrides = [f"{key}={extra.pop(0)}", *overrides]
    if extra:
        raise UsageError(f"{extra[0]!r} is neither a .yaml file nor key.path=value")

    from posttrain.config import load, resolved_yaml

    files = [word for word in words if _is_file(word)]
    if _options(job):
        return job.run_any(files, overrides, given)
    config = load(job.Config, files, overrides, accepts=getattr(job, "ACCEPTS", {}))
    if "--show" in flags:
        print(resolved_yaml(config), end="")
        return 0
    return (job.run(config, plain[0]) if actions else job.run(config)) or 0


def _dispatch(
    flags: list[str], words: list[str], overrides: list[str], given: dict[str, str]
) -> int:
    if "--version" in flags:
        from importlib.metadata import version

        print(version("posttrain"))
        return 0
    if not words:
        print(_usage(), file=sys.stdout if "--help" in flags else sys.stderr)
        return 0 if "--help" in flags else USAGE_ERROR
    name, *rest = words
    if name not in JOBS:
        raise UsageError(f"unknown job {name!r}{_suggest(name, list(JOBS))}")
    return _run(name, rest, overrides, flags, given)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its exit code (EXIT_CODES); errors of the user's go to stderr, short."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _dispatch(*_split(arguments))
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"posttrain: {error}\n(posttrain --help lists what there is)", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # the reader of our output has gone (`| head`): nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError, FloatingPointError) as error:  # data, a full disk, a loss of nan
        from posttrain.config import ConfigError

        if "--debug" in arguments:
            traceback.print_exc()
        wrong_config = isinstance(error, ConfigError)
        hint = "" if wrong_config or "--debug" in arguments else "\n(--debug shows the traceback)"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            # which of the folders that a run writes to, the system may not have said
            room = "posttrain doctor CONFIG.yaml 'checks=[disk]' shows the room in each folder"
            hint = f"\n({room}){hint}"
        print(f"posttrain: {error}{hint}", file=sys.stderr)
        return USAGE_ERROR if wrong_config else DATA_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def command() -> None:
    """What the installed command runs: main, then out with its exit code.

    One failed process of several leaves at once: jax's exit handler would hold it until all are
    done, and the others wait for it. They end when they notice that it has gone.
    """
    try:
        code = main()
    except Exception:  # ours to mend: the traceback is the message
        traceback.print_exc()
        code = DATA_ERROR
    jax = sys.modules.get("jax")
    if code not in (0, PREEMPTED) and jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
