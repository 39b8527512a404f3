"""Programs compiled for TPU slices that are not there, by libtpu (the extra `tpu`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.config import load
from posttrain.jobs import sft
from posttrain.plan.compiled import Compiled, compile_program
from posttrain.plan.devices import devices_of, places, read_topology
from posttrain.plan.overflow import Overflow, sentence
from posttrain.plan.programs import Job, Program, offline
from tests.plan.tiny import write_config

pytest.importorskip("libtpu", reason="compiling for TPUs takes the extra `tpu`")

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
LAYERS, EMBED, MLP, HEADS, KV, HEAD_DIM, VOCAB, LENGTH = 2, 256, 512, 4, 2, 128, 512, 512
DEVICES = 4


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("slices")
    config = write_config(folder, layers=LAYERS, vocab=VOCAB, **SHAPE)
    keys = [f"data.seq_len={LENGTH}", "batch.rows=8", "batch.accumulate=2"]
    cfg = load(sft.Config, [config], keys)
    return offline(cfg, devices_of("v5e:2x2"), setup={})


@pytest.fixture(scope="module")
def step(job) -> Compiled:
    found = compile_program(job.programs[0], job.mesh, job.spec, read_topology("v5e:2x2"))
    assert isinstance(found, Compiled)
    return found


def probe(*shapes: tuple[int, ...], function, spec: P) -> Program:
    mesh = jax.sharding.Mesh(np.array(devices_of("v5e:2x2")), ("x",))
    args = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape in shapes
    )
    return Program("probe", jax.jit(function), args, {"parameters": args}, 0)


def test_flops_of_a_matmul_are_the_hand_count(job):
    program = probe((4, 1024, 768), (4, 768, 512), function=jnp.matmul, spec=P("x"))
    mesh = program.arguments[0].sharding.mesh
    found = compile_program(program, mesh, job.spec, read_topology("v5e:2x2"))
    assert isinstance(found, Compiled)
    assert found.flops == pytest.approx(2 * 1024 * 768 * 512, rel=0.01)
    assert found.memory.held["parameters"] == 2 * (1024 * 768 + 768 * 512)


def test_flops_of_the_step_are_the_hand_count(step):
    """Full remat: each matrix forward, again (but for the last, whose result nobody reads), and
    twice backward; of attention's one block 2 + 2 + 3 + 4 products; the head 1 + 3."""
    tokens = 2 * LENGTH  # two rows a device
    attention = EMBED * HEAD_DIM * (2 * HEADS + 2 * KV)
    each = 4 * attention + 4 * 2 * EMBED * MLP + 3 * EMBED * MLP
    scores = 2 * HEADS * HEAD_DIM * LENGTH * tokens * (2 + 2 + 3 + 4)
    hand = LAYERS * (2 * tokens * each + scores) + 4 * 2 * tokens * EMBED * VOCAB
    assert step.flops == pytest.approx(hand, rel=0.01)
    assert step.kernels == pytest.approx(LAYERS * scores, rel=0.01), "splash is what is compiled"
    assert step.dynamic == pytest.approx(8 * tokens * EMBED * VOCAB, rel=0.01), "the head's loops"
    assert 0 < step.estimated <= step.flops - step.kernels


def test_weights_are_gathered_forward_and_backward(step):
    """By name, axis and bytes: of each weight 3/4 arrives over the wire, in bfloat16, twice in each
    of two micro-batches."""
    for name, size in {
        "gate": EMBED * MLP,
        "up": EMBED * MLP,
        "q": EMBED * HEADS * HEAD_DIM,
    }.items():
        rows = [c for c in step.collectives if c.kind == "all-gather" and c.weight == name]
        sent = sum(c.total for c in rows)
        assert sent == pytest.approx(2 * 2 * LAYERS * size * 2 * 3 / 4, rel=0.01), name
        assert {axis for c in rows for axis in c.axes} <= {"fsdp", "fsdp_inner"}
    table = [c for c in step.collectives if c.kind == "all-gather" and c.weight == "embedding"]
    assert sum(c.total for c in table) == pytest.approx(2 * EMBED * VOCAB * 2 * 3 / 4, rel=0.01)


def test_times_are_work_over_what_the_maker_states(step):
    assert step.times.compute == pytest.approx(step.flops / 197e12)
    assert step.times.hbm == pytest.approx(step.hbm_bytes / 819e9)
    sent = sum(c.total for c in step.collectives)
    assert sent / 100e9 <= step.times.network <= sent / 50e9  # one link, or one of each side
    assert step.memory.peak >= sum(step.memory.held.values())
    assert step.memory.limit == 15.75 * 2**30


def test_what_does_not_fit_is_told(job):
    program = probe((4, 5 * 2**20, 2048), function=lambda x: (x * 2).sum(), spec=P("x"))
    mesh = program.arguments[0].sharding.mesh
    found = compile_program(program, mesh, job.spec, read_topology("v5e:2x2"))
    assert isinstance(found, Overflow)
    assert "a device needs 20.00 GiB, and has 15.75 GiB" in sentence(found)


def test_slices_have_places():
    devices = devices_of("2xv5e:2x2")
    where = places(devices)
    assert where is not None
    assert where[:, 3].tolist() == [0] * 4 + [1] * 4
    assert len({tuple(row) for row in where.tolist()}) == 8
    assert len(devices_of("v5e:1x1")) == 1
