"""Every command and config of the README: what is quick runs, the rest resolves."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.data.world_model import write_model_folder

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^`([\w.]+)`[^\n]*\n\n```(?:json|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# what a test may change of a command: sizes and places, never what it does
QUICK = {
    "sft": ["model.random_init=true", "train.epochs=null", "train.steps=2", "data.cache_dir=cache"],
    "data": ["data.cache_dir=cache"],
    "preference": ["train.steps=2", "data.cache_dir=cache"],
    "chat": ["prompt=What grows on an oak?", "max_new_tokens=8"],
}


def commands() -> list[str]:
    """Lines of the bash blocks, continuation lines joined, comments cut."""
    lines = []
    for language, body in BLOCK.findall(TEXT):
        if language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                lines.append(re.sub(r"\s+# .*", "", line).strip())
    return [line for line in lines if line]


def posttrain_lines() -> list[list[str]]:
    """The words after `posttrain` of each command, those inside a remote shell's quotes too."""
    found = []
    for line in commands():
        words = shlex.split(line)
        if words[0] == "gcloud":
            words = shlex.split(words[-1])
        if "posttrain" in words[2 if "&&" in words else 0 :]:
            found.append(words[len(words) - words[::-1].index("posttrain") :])
    return found


def test_the_readme_has_commands_and_files():
    assert len(posttrain_lines()) >= 6
    assert {name for name, _ in FILE.findall(TEXT)} == {
        *("conversations.jsonl", "mine.yaml", "pairs.jsonl", "pairs.yaml")
    }


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("make ")])
def test_make_has_the_target(line):
    target = line.split()[1]
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout or "posttrain" in done.stdout


@pytest.mark.parametrize(
    "words", [w for w in posttrain_lines() if any("configs/" in x for x in w)], ids=" ".join
)
def test_a_command_on_a_config_of_ours_resolves(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main([*words, "--show"]) == 0, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The README's files, and a tiny random model where it has `model`."""
    for name, body in FILE.findall(TEXT):
        body = body * 40 if name.endswith(".jsonl") else body
        (tmp_path / name).write_text(body)
    texts = (tmp_path / "conversations.jsonl").read_text().splitlines()
    assert all(json.loads(line)["messages"] for line in texts)
    write_model_folder(tmp_path / "model", texts, config=TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tour_runs_as_written(folder, capsys):
    ran = []
    for words in posttrain_lines():
        if {"mine.yaml", "pairs.yaml", "model.path=runs/mine/export"} & {*words}:
            code = cli.main([*words, *QUICK[words[0]]])
            assert code == 0, (words, capsys.readouterr())
            ran.append(" ".join(words[:2]))
    assert ran[:3] == ["data check", "data preview", "sft mine.yaml"]
    assert ran[3].startswith("chat ")
    assert ran[4] == "preference pairs.yaml"
    assert (folder / "runs/preferred/export/config.json").exists()
    assert (folder / "runs/mine/export/config.json").exists()
    assert (folder / "runs/mine/metrics.jsonl").read_text().count("\n") >= 2


def test_the_table_of_commands_is_whole():
    rows = re.findall(r"^\| `posttrain (\w+)(?: (prepare|preview|check))?", TEXT, re.MULTILINE)
    assert {job for job, _ in rows} == set(cli.JOBS)
    assert {action for _, action in rows if action} == {"prepare", "preview", "check"}


def test_exit_codes_are_those_of_the_command_line():
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, re.MULTILINE))
    told = set(re.findall(r"^  (\d+) ", cli.EXIT_CODES, re.MULTILINE))
    assert set(table) == told
