"""launch/__main__.py, base.py, job.py, manifest.py: the command line, and what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml

from launch import BACKENDS
from launch import __main__ as command
from launch.manifest import to_yaml
from tests.launch.fakes import ROOT


def test_help_lists_all_and_loads_no_jax(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*BACKENDS, *command.ACTIONS, "--dry-run", "gke.queue"))
    look = "import sys, launch.__main__; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "usage"),
        (["gkee", "job.yaml"], "did you mean 'gke'"),
        (["gke", "stats", "job.yaml"], "did you mean 'status'"),
        (["gke", "job.yaml", "--dryrun"], "unknown flag --dryrun"),
        (["gke", "nothing.yaml"], "no such file"),
    ],
)
def test_a_command_line_that_is_wrong(words, reason, capsys):
    assert command.main(words) == 2
    assert reason in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_named(launched, monkeypatch, tmp_path):
    for backend, tool in (("gke", "kubectl"), ("gcloud", "gcloud"), ("skypilot", "sky")):
        with monkeypatch.context() as patched:
            git = str(shutil.which("git"))
            (tmp_path / tool).mkdir()
            (tmp_path / tool / "git").symlink_to(git)
            patched.setenv("PATH", str(tmp_path / tool))
            said = launched(backend)
            assert said.exit_code == 1
            assert f"{tool} is not installed here" in said.err
            assert launched(backend, "--dry-run").exit_code == 0


def test_what_was_changed_is_said(launched, checkout):
    said = launched("gke", "--dry-run", spot=True, save_seconds=30)
    for part in (
        "v6e:4x4: 16 chips, 4 hosts of 4",
        "run_dir: runs/qwen3_gsm8k -> /bucket/post/runs/qwen3_gsm8k",
        "data.cache_dir: ~/.cache/posttrain/data -> /bucket/post/cache",
        "distributed.processes: 4, so that no host begins without others",
        "spot: 90 s of grace are asked for",
    ):
        assert f"launch: {part}" in said.err
    (checkout / "posttrain" / "cli.py").write_text("changed")
    said = launched("gke", "--dry-run", allow_dirty=True)
    assert ", with 1 changed: posttrain/cli.py" in said.err


def test_one_host_is_one_process(launched):
    said = launched("gke", "--dry-run", topology="v6e:1x1")
    assert said.exit_code == 0, said.err
    assert "launch: v6e:1x1: 1 chip, 1 host of 1\n" in said.err
    assert "processes: null" in said.out


def test_overlays_and_overrides_are_laid_on_a_description(launched, tmp_path):
    (tmp_path / "more.yaml").write_text("topology: v5p-128\n")
    said = launched("gke", str(tmp_path / "more.yaml"), "name=other", "--dry-run")
    assert said.exit_code == 0, said.err
    jobset = next(iter(yaml.safe_load_all(said.out)))
    assert jobset["metadata"]["name"] == "other"
    assert "4x4x4" in said.out
    assert "topology: v5p-128" in launched("gke", str(tmp_path / "more.yaml"), "--show").out


def test_text_stays_text_in_every_yaml():
    words = ["1e-6", "0o17", "y", "NO", "on", "012", "1:30", "null", "~", ".inf", "2024-01-01", ""]
    texts = [*words, "a: b", "# c", "- d", " e ", "tab\t", "two\nlines\n", "é", "0x1f", "=", "<<"]
    text = to_yaml({str(i): t for i, t in enumerate(texts)})
    assert list(yaml.safe_load(text).values()) == texts
    for line, word in zip(text.splitlines(), words, strict=False):
        assert line.partition(": ")[2].strip("\"'") == word
        assert line[-1] in "\"'", "a plain word is read by each YAML as it likes"
