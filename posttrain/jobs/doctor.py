"""The first minute on new hardware: what is there, does it compute rightly, and how fast.

Looks at the host, the versions, the folders a run writes to, the devices, the precision of matrix
products, attention kernels, collectives over the mesh, speeds, and compiling; needs no model and no
data, and leaves nothing behind. A run's config may be given: its mesh, folders and processes are
then what is examined. Exits with 1 if something would fail or compute wrongly, with what to do.

checks: host, versions, disk, devices, precision, attention, collectives, matmul, transfer, compile

    posttrain doctor                  # on several hosts: the same command on each, as for a run
    posttrain doctor configs/sft/qwen3_gsm8k.yaml configs/overlays/v5e_16.yaml
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

from posttrain.checkpoint import RunDir
from posttrain.config import Config as Section
from posttrain.config import ConfigError, did_you_mean, runtime, semantic
from posttrain.data.config import DataConfig, Sources
from posttrain.hosts import DistributedConfig, init_distributed
from posttrain.metrics import LogConfig
from posttrain.mirror import is_url
from posttrain.sharding import MeshConfig

ACCEPTS = {"sft": {}, "preference": {}, "reward_model": {}, "rl": {}}
# pydantic's own `json` is a name it has given up: here it is a key of the config
warnings.filterwarnings("ignore", 'Field name "json" in "Config" shadows', UserWarning)


MARKS = (("ok", "green"), ("warn", "yellow"), ("FAIL", "bold red"), ("WRONG", "bold red"))
"""By base.Level: a word, and its colour on a terminal."""


class DataFolder(DataConfig):
    """A run's data section, of which the folder alone is examined."""

    sources: Sources = semantic({}, help="not read")


class Config(Section):
    """What is examined, and how."""

    job: Literal["doctor"] = semantic("doctor", help="names the job")
    run_dir: RunDir = runtime(Path("runs"), help="the folder that runs will write to")
    data: DataFolder = runtime(DataFolder(), help="its cache_dir is examined")
    mesh: MeshConfig = runtime(MeshConfig(), help="the axes that collectives are tried over")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")
    log: LogConfig = runtime(LogConfig(), help="its peak_tflops is compared with the speed")
    checks: tuple[str, ...] = runtime((), help="only these, by name; empty: all")
    time_limit: float = runtime(120.0, gt=0, help="seconds after which a check is said to hang")
    json: Path | None = runtime(  # pyright: ignore
        None, help="file for every finding and its figures, of all processes"
    )


def run(cfg: Config) -> int:
    """Exit code: 0, or 1 where a problem was found."""
    from posttrain.agree import Channel
    from posttrain.doctor import CHECKS
    from posttrain.doctor.base import Result, Subject, examine

    _refuse_wrong_keys(cfg, list(CHECKS))
    began = time.monotonic()
    failure = _meet(cfg)
    channel = Channel(cfg.time_limit)
    subject = Subject(
        run_dir=cfg.run_dir,
        cache_dir=Path(cfg.data.cache_dir),
        mesh=cfg.mesh,
        peak_tflops=cfg.log.peak_tflops,
        channel=channel,
        lost="the processes have not met" if failure else "",
    )
    results = [Result("processes", 0, 0.0, [failure])] if failure else []
    printer = Printer(quiet=channel.process > 0)
    hangs = False
    for name, check in CHECKS.items():
        if not cfg.checks or name in cfg.checks:
            printer.begin(name, (check.__doc__ or "").splitlines()[0])
            result, hung = examine(name, check, subject, cfg.time_limit)
            printer.end(result)
            results.append(result)
            hangs |= hung
    code = _conclude(cfg, channel, results, printer, began)
    if hangs:  # what hangs would also hold up the end of this process
        sys.stdout.flush()
        os._exit(code)
    return code


def _refuse_wrong_keys(cfg: Config, known: list[str]) -> None:
    for name in cfg.checks:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"checks: there is no {name!r}{hint}")
    for key, value in (("run_dir", cfg.run_dir), ("data.cache_dir", cfg.data.cache_dir)):
        if is_url(value):
            raise ConfigError(f"{key}: {value}: folders are examined: name a local or mounted one")
    if cfg.json and not cfg.json.expanduser().absolute().parent.is_dir():
        raise ConfigError(f"json: {cfg.json}: no such folder")


def _meet(cfg: Config) -> Any:
    """Joins the processes; the Finding of why that failed, or None."""
    from posttrain.doctor.base import Finding, Level

    try:
        init_distributed(cfg.distributed)
    except ConfigError:
        raise
    except Exception as error:  # of the network, of the cluster, of jaxlib: types vary
        todo = (
            "start the same command on every host at once, let the coordinator's port through, and "
            "see that distributed.processes counts them all"
        )
        said = f"they do not find each other: {type(error).__name__}: {error}"
        return Finding("processes", said, Level.PROBLEM, todo)
    return None


def _conclude(cfg: Config, channel: Any, results: list[Any], printer: Printer, began: float) -> int:
    """Process 0 gathers what all found, prints and writes it; all leave with its exit code."""
    from posttrain.doctor.base import Level, Result

    if channel.process:
        channel.tell("results", json.dumps([result.to_json() for result in results]))
        slowest = cfg.time_limit * (len(results) + channel.processes)
        verdict = channel.hear("verdict", 0, slowest)
        channel.tell("end", "")
        return int(verdict) if verdict else 1
    for process in range(1, channel.processes):
        word = channel.hear("results", process)
        found = [Result.from_json(x) for x in json.loads(word)] if word else []
        results += found or [_silent(process, cfg.time_limit)]
    bad = any(f.level >= Level.PROBLEM for result in results for f in result.findings)
    code, seconds = int(bad), time.monotonic() - began
    printer.conclude(results, seconds)
    if cfg.json:
        tree = {
            "exit_code": code,
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "processes": channel.processes,
            "checks": [result.to_json() for result in results],
        }
        cfg.json.expanduser().write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    channel.tell("verdict", str(code))
    for process in range(1, channel.processes):
        channel.hear("end", process, 10)  # the words go through this process: it leaves last
    return code


def _silent(process: int, seconds: float) -> Any:
    from posttrain.doctor.base import Finding, Level, Result

    todo = "look at what that process printed, and at its host"
    said = f"process {process} has not said what it found within {seconds:g} s"
    return Result("processes", process, 0.0, [Finding("processes", said, Level.PROBLEM, todo)])


class Printer:
    """Aligned text on stdout: in colour on a terminal, elsewhere a line a finding, however long."""

    def __init__(self, quiet: bool):
        from rich.console import Console

        self._quiet, self._status = quiet, None
        self._console = Console(highlight=False, markup=False)

    def begin(self, name: str, line: str) -> None:
        """The line that says what is looked at now."""
        if self._quiet:
            return
        self._line(f"{name}: {line}")
        if self._console.is_terminal:
            self._status = self._console.status("looking")
            self._status.start()

    def end(self, result: Any) -> None:
        """What was found, a row each."""
        if self._status:
            self._status.stop()
            self._status = None
        rows = [(_mark(f), f.what, f.said) for f in result.findings]
        self._rows(rows, 30)

    def conclude(self, results: list[Any], seconds: float) -> None:
        """All that is not well, the worst first, each with what to do."""
        bad: dict[tuple[str, str, str, str], tuple[Any, list[int]]] = {}
        for result in results:
            for f in result.findings:
                if f.level > 0:  # hosts are often alike: what they all found is told once
                    key = (result.check, f.what, f.said, f.todo)
                    bad.setdefault(key, (f, []))[1].append(result.process)
        several = len({result.process for result in results}) > 1
        rows = []
        for (check, *_), (f, processes) in sorted(bad.items(), key=lambda item: -item[1][0].level):
            what = "" if f.what == check else f"{f.what}: "
            who = f"process {_some(processes)}: " if several else ""
            rows.append((_mark(f), check, f"{who}{what}{f.said}"))
            rows.append(("", "", f"-> {f.todo}"))
        if rows:
            self._line("")
            self._line("to do, the worst first:")
            self._rows(rows, 12)
        problems = sum(f.level >= 2 for f, _ in bad.values())
        warned = len(bad) - problems
        said = _count(problems, "problem") if problems else "all is well"
        said += f", {_count(warned, 'warning')}" if warned else ""
        self._line(f"{said}; {seconds:.0f} s")

    def _line(self, text: str) -> None:
        self._console.print(text, style="bold", soft_wrap=True)
        sys.stdout.flush()

    def _rows(self, rows: list[tuple[str, str, str]], width: int) -> None:
        """(mark, name, text); the name's column is at least so wide."""
        if self._quiet:
            return
        if not self._console.is_terminal:
            for mark, name, text in rows:
                print(f"  {mark:<5} {name:<{width}} {text}", flush=True)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for least in (1, 5, width):
            table.add_column(min_width=least)
        table.add_column(overflow="fold")
        colours = dict(MARKS)
        for mark, name, text in rows:
            table.add_row("", Text(mark, colours.get(mark, "")), name, text)
        self._console.print(table)


def _mark(finding: Any) -> str:
    return MARKS[finding.level][0]


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"
