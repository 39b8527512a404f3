"""Benchmarks as ratios: two sides in turn (A B A B ...), medians, spread, a JSON file and a table.

A side is a process of its own, so that its peak memory, its CPU seconds and its start are its own.
A figure is the ratio of the two sides within a round; what is reported is the median over rounds
and the smallest and largest. What other processes used of the CPUs meanwhile is recorded too.

    python -m tests.benchmarks.harness       rewrites the tables of docs/performance.md
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "bench"
DOCUMENT = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Run:
    """What a measured process said of itself (clock.Clock), and how the machine was meanwhile."""

    steps: list[dict[str, float]]
    marks: dict[str, list[dict[str, float]]]
    peak_bytes: int
    others: float
    """CPU seconds that other processes used meanwhile, as a share of all there were."""

    def per_second(
        self, count: str, *, clock: Literal["cpu", "wall"] = "cpu", warm: int = 1
    ) -> float:
        """`count` per second of the process's CPU time, or by the wall, after `warm` steps."""
        done = sum(step[count] for step in self.steps[warm:])
        return done / (self.steps[-1][clock] - self.steps[warm - 1][clock])

    @property
    def first_step(self) -> float:
        """Wall seconds from the start of the process to the end of its first optimiser step."""
        return self.steps[0]["wall"]


def measure(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Run:
    """`python -m module OUT arguments ...`, a process of its own. RuntimeError with what it said.

    BENCH_PREFIX is a command that starts it, where one is wished (`taskset -c 0-3`, `nice -n -20`).
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = FOLDER / f"side.{os.getpid()}.json"
    out.unlink(missing_ok=True)
    prefix = shlex.split(os.environ.get("BENCH_PREFIX", ""))
    command = [*prefix, python, "-m", module, str(out), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=_clean_environment() | dict(env or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or not out.exists():
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}")
    found = json.loads(out.read_text())
    out.unlink()
    return Run(**found)


def _clean_environment() -> dict[str, str]:
    """Without what the process of pytest was given for tests: devices, threads, compile cache."""
    mine = ("JAX_", "XLA_", "PYTEST_", "OMP_", "NPROC")
    return {k: v for k, v in os.environ.items() if not k.startswith(mine)}


def in_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, say: Callable[[str], None] = print
) -> dict[str, list[Any]]:
    """Each side's results, one per round; the sides of a round run one after the other."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for k in range(rounds):
        for name, side in sides.items():
            began = time.monotonic()
            found[name].append(side())
            others = getattr(found[name][-1], "others", 0.0)
            say(
                f"round {k + 1}/{rounds} {name}: {time.monotonic() - began:.0f} s, "
                f"others used {others:.0%} of the CPUs"
            )
    return found


@dataclass(frozen=True)
class Figure:
    """One comparison: ours over the peer's, round by round.

    goal: what the ratio should be at least (`better` is "more") or at most ("less").
    """

    name: str
    unit: str
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    peer_name: str
    goal: float | None = None
    better: Literal["more", "less"] = "more"

    @property
    def ratios(self) -> list[float]:
        """One per round."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without one."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.better == "more" else self.ratio <= self.goal

    def row(self) -> list[str]:
        """Cells of COLUMNS."""
        sign = "≥" if self.better == "more" else "≤"
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        spread = spread if len(self.ratios) > 1 else "one round"
        goal = "" if self.goal is None else f"{sign} {self.goal:g}"
        return [
            self.name,
            self.peer_name,
            f"{number(statistics.median(self.ours))} {self.unit}".strip(),
            f"{number(statistics.median(self.peer))} {self.unit}".strip(),
            f"{self.ratio:.2f} ({spread})",
            goal + {True: " reached", False: " **not reached**", None: ""}[self.reached],
        ]


COLUMNS = ["figure", "against", "ours", "the other", "ratio (spread)", "goal"]


def best_of(sides: Mapping[str, Sequence[float]]) -> tuple[str, tuple[float, ...]]:
    """The side with the highest median, with its values."""
    name = max(sides, key=lambda side: statistics.median(sides[side]))
    return name, tuple(sides[name])


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(name: str, figures: Sequence[Figure], notes: Sequence[str] = (), **more: Any) -> Path:
    """Prints the table, writes .cache/bench/<name>.json; `more` is what else was measured."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    found = {
        "machine": machine(),
        "versions": versions(),
        "notes": list(notes),
        "figures": [asdict(figure) | {"ratio": figure.ratio} for figure in figures],
        "table": table(COLUMNS, [figure.row() for figure in figures]) if figures else "",
        **more,
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{found['table']}", *notes, f"written to {path}", sep="\n", flush=True)
    return path


def machine() -> str:
    """In general words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        model = names[0].strip() if names else model
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores ({model}), {memory:.0f} GiB"


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("jax", "flax", "numpy", "torch", "transformers", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fill_in(document: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The document with the text between `<!-- bench:NAME -->` and `<!-- end -->` made anew.

    A name without results keeps its text: not every machine has every peer.
    """

    def anew(match: re.Match[str]) -> str:
        name = match[1]
        if name not in results:
            return match[0]
        found = results[name]
        packages = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        said = [f"On {found['machine']}; {packages}.", found["table"], *found["notes"]]
        text = "\n\n".join(part for part in said if part)
        return f"<!-- bench:{name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- end -->", anew, document, flags=re.DOTALL)


def main() -> int:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    DOCUMENT.write_text(fill_in(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{DOCUMENT}: {', '.join(results) or 'nothing was measured'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
