"""docs/scale.md: its story is run, command by command, and its table is made of its results."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import Finished, finish, wait_for_step

ROOT = Path(__file__).parents[2]


scale = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "scale.py")))
TEXT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
STORY = [line for line in COMMANDS if "stories_gsm8k" in line]
# what the test changes of a run: sizes and places, never what it does
QUICK = ["train.epochs=null", "train.steps=8", "batch.rows=8"]
QUICK += ["data.cache_dir=cache", "data.workers=1"]


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: with the configs, the model and some of the data."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "models").symlink_to(data_dir / "data" / "models")
    rows = (data_dir / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [row for row in rows if len(row) < 400][:64]
    (folder / "data" / "gsm8k").mkdir(parents=True)
    (folder / "data" / "gsm8k" / "train.jsonl").write_text("\n".join(short), encoding="utf-8")
    return folder


def start(line: str, folder: Path, *quick: str) -> subprocess.Popen[str]:
    """A command of the page in a process of its own; SIGTERM is the test's to send."""
    words = shlex.split(line)
    own = dict(words.pop(0).split("=", 1) for word in [*words] if re.match(r"[A-Z_]+=", word))
    if words[0] == "timeout":
        words = words[3:]
    assert words[0] == "posttrain"
    command = [sys.executable, "-m", "posttrain.cli", *words[1:], *quick]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **own}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=env, cwd=folder, text=True, **pipes)


@pytest.mark.soak
def test_the_story_is_told_by_commands_that_run(folder):
    preempted, resumed, talk = STORY
    run = folder / "runs" / "stories_gsm8k"
    running = start(preempted, folder, *QUICK)
    wait_for_step(run, 2, running)
    running.send_signal(signal.SIGTERM)
    assert finish([running]) == [PREEMPTED]
    assert 2 <= len(Finished(PREEMPTED, run).metrics) < 8
    assert finish([start(resumed, folder, *QUICK)]) == [0]
    assert [line["step"] for line in Finished(0, run).metrics] == list(range(1, 9))
    assert (run / "export" / "config.json").exists()
    talking = start(talk, folder, "max_new_tokens=4", "temperature=0")
    said, _ = talking.communicate(timeout=200)
    assert talking.returncode == 0, said
    assert said.strip()


def test_every_command_of_the_page_is_one_that_is_run():
    """The launcher's by tests/launch/test_docs.py, the searches by docs/scale.py."""
    launched = [line for line in COMMANDS if line.startswith("python -m launch ")]
    planned = [line for line in COMMANDS if line.startswith("posttrain plan ")]
    assert len(launched) == 1
    assert planned == [shlex.join(["posttrain", "plan", *scale.command("8b/sft/v6e:16x16")])]
    assert sorted(COMMANDS) == sorted([*launched, *planned, *STORY])


def test_the_page_is_what_its_results_make_of_it():
    results = json.loads(scale.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == [case for case in scale.CASES if case in results]
    assert "8b/sft/v6e:16x16" in results
    assert scale.page(TEXT, results) == TEXT


def test_a_row_by_hand():
    found = {
        "winner": "fsdp=2",
        "limit": 32 * 2**30,
        "compiled": [
            {"layout": "fsdp=1", "fits": False},
            {
                "layout": "fsdp=2",
                "peak": 16 * 2**30,
                "flops": 1e15,
                "wire": {"all-gather": 3e9, "reduce-scatter": 1e9},
                "floors": [2.0, 0.5, 4.0],
                "model_flops": 1.2e15,
                "peak_flops": 1e15,
                "analytic": {
                    "memory": {"total": 12 * 2**30},
                    "flops": 1.1e15,
                    "wire": {"all-gather": 2e9},
                    "floors": [2.2, 0.25, 4.0],
                },
            },
        ],
    }
    row = dict(zip(scale.COLUMNS, scale.row_of("70b/preference/v5p:4x4x4", found), strict=True))
    assert (row["model"], row["job"], row["slice"]) == ("Llama-3 70B", "DPO", "v5p:4x4x4")
    assert row["memory, GiB"] == "16.0 of 32 (-25%)"
    assert (row["compute, s"], row["HBM, s"]) == ("2 (+10%)", "0.5 (-50%)")
    assert row["interconnect, s"] == "4 (+0%)"
    assert row["GB into a device"] == "all-gather 3.0, reduce-scatter 1.0 (-50%)"
    assert (row["binds"], row["of peak, at most"]) == ("interconnect", "30%")
    assert row["tokens/s, at most"] == "524,288"
