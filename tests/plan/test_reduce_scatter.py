"""What gradients travel as, in a step compiled for a slice of 4 x 4: over both dims at once XLA
sums them whole on every device, one dim after the other it scatters as it sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config import load
from posttrain.jobs import sft
from posttrain.plan.compiled import Compiled, compile_program
from posttrain.plan.devices import devices_of, read_topology
from posttrain.plan.programs import offline
from tests.plan.tiny import write_config

pytest.importorskip("libtpu", reason="compiling for TPUs takes the extra `tpu`")

LAYERS, EMBED, MLP, HEADS, HEAD_DIM, VOCAB = 2, 1024, 2048, 8, 128, 4096
MATRICES = LAYERS * EMBED * (4 * HEADS * HEAD_DIM + 3 * MLP)


def test_gradients_are_scattered_and_not_reduced_whole(tmp_path: Path) -> None:
    """Those of layers in bfloat16, those of head and embedding in float32: each byte once."""
    shape = {"hidden_size": EMBED, "intermediate_size": MLP, "head_dim": HEAD_DIM}
    config = write_config(
        tmp_path, layers=LAYERS, heads=HEADS, kv_heads=HEADS, vocab=VOCAB, **shape
    )
    cfg = load(sft.Config, [config], ["data.seq_len=512", "batch.rows=16"])
    job = offline(cfg, devices_of("v5e:4x4"), setup={})
    step = compile_program(job.programs[0], job.mesh, job.spec, read_topology("v5e:4x4"))
    assert isinstance(step, Compiled)
    sent = {
        kind: sum(c.total for c in step.collectives if c.kind == kind)
        for kind in ("reduce-scatter", "all-reduce")
    }
    gradients = (2 * MATRICES + 2 * 4 * EMBED * VOCAB) * 15 / 16
    # in the second stage parts of o, down and the embedding are 64 wide, half a tile: summed whole
    assert sent["reduce-scatter"] > 0.85 * gradients
    assert sent["all-reduce"] < 0.2 * gradients
