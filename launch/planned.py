"""`posttrain plan` of a launch's job, before anything is made: does it fit the slices.

In a process of its own, so that the launcher loads no JAX. What stands in its way is said and does
not stop a launch: libtpu is not installed, the model's config.json is not here, the job is one that
plan does not know. A program that does not fit does.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.base import Launch
from posttrain.config_yaml import Problem

_LIMIT = 1200  # seconds; a compilation takes minutes
_TOLD = ("peak", "floors:", "at most")


def in_the_way(launch: Launch) -> str:
    """Why no plan can be made; "": nothing is in the way."""
    from posttrain.jobs.plan import PLANNED

    name = launch.job.name
    if name not in PLANNED:
        return f"posttrain plan knows {', '.join(PLANNED)}, not {name}"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'posttrain[tpu]'"
    path = launch.job.config.model.path
    if not (Path(path).expanduser() / "config.json").is_file():
        return f"{path}/config.json is not here: give model.path a folder that has it"
    return ""


def plan(launch: Launch) -> tuple[list[str], list[Problem]]:
    """(notes to the user, a problem where the job does not fit)."""
    if reason := in_the_way(launch):
        return [f"plan: not made: {reason}"], []
    cfg = launch.cfg
    topology = f"{cfg.slices}x{cfg.topology}" if cfg.slices > 1 else cfg.topology
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        config = Path(folder) / "job.yaml"
        config.write_text(launch.job.text, encoding="utf-8")
        words = ["plan", str(config), "--topology", topology]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "posttrain.cli", *words],
                capture_output=True,
                text=True,
                timeout=_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return [f"plan: not made within {_LIMIT} s (--no-plan leaves it out)"], []
    lines = [line.strip() for line in done.stdout.splitlines()]
    if done.returncode == 0:
        return [f"plan: {line}" for line in lines if line.startswith(_TOLD)], []
    refused = [line for line in lines if "does not fit" in line]
    if refused:
        return [], [Problem("topology", "", f"{refused[0]} (--no-plan launches it all the same)")]
    said = (done.stderr.strip().splitlines() or ["no reason was given"])[0]
    return [f"plan: not made: {said}"], []
