"""posttrain plan, programs.py, compiled.py, assumed.py, store.py, report.py, memory: on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from posttrain import cli
from posttrain.config import load
from posttrain.jobs import rl, sft
from posttrain.plan import store
from posttrain.plan.assumed import plan_of_a_step
from posttrain.plan.collectives import Collective
from posttrain.plan.compiled import Compiled, bytes_of, compile_program
from posttrain.plan.overflow import Overflow, is_overflow, read_overflow, sentence
from posttrain.plan.programs import offline, online
from posttrain.plan.report import merged
from tests.plan.tiny import write_config

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(*words: str) -> int:
    return cli.main(["plan", *words])


def test_a_plan_is_of_config_json_alone_and_is_kept(tmp_path, capsys):
    config, out = write_config(tmp_path), tmp_path / "out.json"
    assert not list((tmp_path / "model").glob("*.safetensors"))
    words = (str(config), "--topology", "cpu", "mesh.fsdp=8", "--json", str(out))
    assert plan(*words) == 0
    said = capsys.readouterr().out
    for part in (
        "parameters",
        "optimiser",
        "gradients",
        "peak",
        "matmuls",
        "sent:",
        "8 rows x 128",
    ):
        assert part in said
    first = json.loads(out.read_text())
    assert plan(*words) == 0
    assert "from the store" in capsys.readouterr().out
    assert json.loads(out.read_text())["program"] == first["program"]
    assert plan(*words, "data.seq_len=64") == 0, "another config, another report"
    assert "from the store" not in capsys.readouterr().out


def test_what_a_device_holds_is_counted_from_shapes(tmp_path):
    """A hand count: embedding and head [512, 64], a layer of 64 x 64 x 4 + 3 x 64 x 128, norms."""
    cfg = load(sft.Config, [write_config(tmp_path, heads=4, kv_heads=4)], ["mesh.fsdp=8"])
    program = offline(cfg, jax.devices(), setup={}).programs[0]
    matrices = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    norms = (2 * 2 + 1) * 64
    assert bytes_of(program.held["parameters"]) == 4 * (matrices / 8 + norms)
    scalars = 2 * 4  # counts of updates
    assert bytes_of(program.held["optimiser"]) == 2 * 4 * (matrices / 8 + norms) + scalars


@pytest.mark.parametrize(
    ("keys", "kind", "rows", "tokens"),
    [
        (["batch.rows=6", "batch.accumulate=2"], "samples", 8, 100),
        (["batch.rows=null", "batch.examples=3"], "pairs", 8, 100),
        (["batch.rows=null", "batch.examples=3"], "pairs", 4, 50),
    ],
)
def test_a_step_of_examples_that_nobody_has(tmp_path, keys, kind, rows, tokens):
    cfg = load(sft.Config, [write_config(tmp_path)], keys)
    found = plan_of_a_step(cfg.batch, kind, seq_len=100, tokens=tokens, shards=4)
    assert (found.rows, found.steps) == (rows, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name the config"),
        (("CONFIG",), "--topology is missing"),
        (("CONFIG", "--topology", "v6e:3x3"), "no slice of 3x3"),
        (("CONFIG", "--topology", "cpu", "--search"), "of TPU slices"),
        (("CONFIG", "--topology", "cpu", "--example-tokens", "many"), "expected a whole number"),
        (("CONFIG", "--topology"), "--topology needs NAME"),
        (("CONFIG", "--topologie", "cpu"), "did you mean --topology"),
        (("CONFIG", "--topology", "cpu", "job=chat"), "takes configs of sft"),
        (("CONFIG", "--topology", "cpu", "data.seq_len=4096"), "the model's context is 512"),
    ],
)
def test_a_command_that_is_wrong(words, said, tmp_path, capsys):
    config = str(write_config(tmp_path))
    assert plan(*(config if word == "CONFIG" else word for word in words)) == 2
    assert said in capsys.readouterr().err


def test_an_overflow_is_a_sentence():
    error = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (56.49G) exceeds available HBM (15.75G)."
    )
    assert is_overflow(error)
    held = {"parameters": 2 * GIB, "optimiser": 4 * GIB}
    one = read_overflow(error, "train step", held, None)
    said = sentence(one, rows=4, remat="none")
    for part in ("needs 56.49 GiB, and has 15.75 GiB", "parameters 2.00", "leaves 9.75 GiB"):
        assert part in said
    for knob in ("batch.accumulate: 4 rows", "model.remat=full", "mesh.fsdp"):
        assert knob in said
    full = sentence(Overflow("train step", None, 15.75 * GIB, {"parameters": 20 * GIB}), rows=1)
    assert "What stays there alone is 20.00 GiB" in full
    assert "accumulate" not in full
    assert not is_overflow(RuntimeError("INVALID_ARGUMENT: no"))


def test_a_key_follows_what_changes_a_program(tmp_path):
    config = write_config(tmp_path)

    def key(*keys: str, topology: str = "cpu") -> str:
        return store.key_of(load(sft.Config, [config], keys), tmp_path / "model", topology, {})

    assert key() == key("run_dir=elsewhere", "log.every=7")
    assert len({key(), key("mesh.tensor=2"), key("model.remat=none"), key(topology="v5e:2x2")}) == 4


def test_memory_as_planned_is_that_of_a_real_run(tmp_path):
    """Resident memory of a process that runs the step: see tests/plan/memory_run.py."""
    config = write_config(tmp_path, hidden_size=512, intermediate_size=2048, layers=6, vocab=16384)
    keys = ["mesh.fsdp=1", "batch.rows=2", "batch.accumulate=2"]
    program = Path(__file__).with_name("memory_run.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(program), str(config), *keys],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stderr
    cfg = load(sft.Config, [config], keys)
    job = offline(cfg, jax.devices()[:1], setup={})
    found = compile_program(job.programs[0], job.mesh, job.spec, None)
    assert isinstance(found, Compiled)
    assert found.memory.peak == pytest.approx(int(done.stdout), rel=0.15)


def test_alike_collectives_are_told_together():
    one = Collective("all-gather", "up", False, ("fsdp",), ("x",), 4, 8, 100.0, True)
    two = Collective("all-gather", "up", False, ("fsdp",), ("x",), 4, 2, 50.0, True)
    (both,) = merged((one, two))
    assert (both.times, both.total) == (10, 900.0)
    assert np.isclose(both.wire_bytes, 90)


RL = {
    "job": "rl",
    "task": {"type": "arithmetic"},
    "round": {"prompts": 8, "answers": 4, "seq_len": 128, "micro_tokens": 256},
    "sampling": {"max_new_tokens": 64},
    "advantage": {"type": "gae"},
    "critic": {},
    "kl": {"coef": 0.1},
    "train": {"steps": 10},
}


def test_learning_online_plans_both_steps_with_all_that_is_there(tmp_path, capsys):
    write_config(tmp_path)
    config = tmp_path / "rl.yaml"
    config.write_text(yaml.safe_dump(RL | {"model": {"path": str(tmp_path / "model")}}))
    cfg = load(rl.Config, [config])
    policy, critic = online(cfg, jax.devices()[:1]).programs
    assert (policy.name, critic.name) == ("policy's train step", "critic's train step")
    assert policy.arguments[1].tokens.shape == (16, 2, 128), "32 answers, two rows at a time"
    assert policy.arguments[1].old_logps is None, "one update of a round"
    assert policy.arguments[1].reference_logps is not None
    assert critic.arguments[1].old_values is not None
    assert set(policy.beside) == {"reference", "critic's parameters", "critic's optimiser"}
    assert set(critic.beside) == {"reference", "parameters", "optimiser"}
    out = tmp_path / "out.json"
    words = ("--topology", "cpu", "mesh.fsdp=8", "--json", str(out))
    assert plan(str(config), *words) == 0
    said = capsys.readouterr().out
    assert said.count("train step, of one device of 8") == 2
    memory = json.loads(out.read_text())["program"]["memory"]
    assert memory["peak"] > sum(memory["held"].values())
