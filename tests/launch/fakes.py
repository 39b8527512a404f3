"""A small checkout, a description, and the text of an engine that only writes down."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "name": "tiny",
    "run": ["configs/sft/qwen3_gsm8k.yaml"],
    "set": ["data.sources.gsm8k.path=/bucket/train.jsonl"],
    "topology": "v6e:4x4",
    "bucket": "gs://my-bucket/post",
    "mount": "/bucket",
    "image": "registry/image:1",
    "project": "my-project",
    "zone": "us-east5-b",
    "gke": {"cluster": "c", "queue": "q", "service_account": "posttrain"},
}
TWO_SLICES: dict[str, Any] = {"slices": 2, "set": [*BASE["set"], "mesh.data=2"]}
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
seen = {p.as_posix(): p.read_bytes().hex() for p in Path(".").rglob("*") if p.is_file()}
stdin = "" if sys.stdin.isatty() else sys.stdin.read()
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, sys.argv[1:], stdin, seen]) + "\\n")
sys.exit(int(os.environ.get("STAND_IN_CODE", "0")))
"""


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *who, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_checkout(root: Path) -> Path:
    """A git checkout of a package `posttrain` that is all stub."""
    (root / "posttrain").mkdir(parents=True)
    (root / "posttrain" / "__init__.py").write_text("")
    (root / "posttrain" / "cli.py").write_text("print('stub')\n")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("jax==1\n")
    (root / "mine").mkdir()
    (root / "mine" / "losses.py").write_text("x = 1\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    return root


@dataclass(frozen=True)
class Said:
    """What a command ended with and wrote."""

    exit_code: int
    out: str
    err: str
