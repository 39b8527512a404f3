"""`posttrain sft` whole: against TRL's figures, and against itself on other meshes and layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.runs import Finished, Runner, l2_apart, mesh_keys, relative


def test_twenty_steps_equal_trl(run_sft: Runner, data_dir: Path) -> None:
    """Loss of 20 steps within 1e-4 relative of TRL's, at every step; the gradient norm within 5e-4.

    torch's float32 norm of the head's 819,200 gradients is 2e-4 too small on a CPU, and so are the
    golden norms: tests/parity/test_golden.py recomputes them in float64 and holds ours to 1e-5,
    in the golden run without accumulation.
    """
    name = "sft_b4_accum2.json"
    run = run_sft("train.steps=20", "batch.accumulate=2", devices=1)
    log = json.loads((data_dir / "golden" / name).read_text())["log_history"]
    rows = [row for row in log if "loss" in row]
    assert len(rows) == 20
    want = lambda key: np.array([row[key] for row in rows])  # noqa: E731
    got = lambda key: np.array([row[key] for row in run.metrics])  # noqa: E731
    print(f"{name}: loss {relative(got('loss'), want('loss')):.1e}", end=" ")
    print(f"grad_norm {relative(got('grad_norm'), want('grad_norm')):.1e}")
    assert relative(got("loss"), want("loss")) < 1e-4
    assert relative(got("grad_norm"), want("grad_norm")) < 5e-4
    assert got("num_tokens").tolist() == want("num_tokens").tolist()
    assert (got("learning_rate") == np.float32(1e-3)).all()


@pytest.fixture(scope="module")
def short(tiny_model: Path) -> list[str]:
    """Ten steps of a tiny model: eight devices on few cores are slow."""
    return [f"model.path={tiny_model}", "train.steps=10"]


@pytest.fixture(scope="module")
def one_device(run_sft: Runner, short: list[str]) -> Finished:
    """On one device, unpacked, no accumulation: what all layouts must equal."""
    return run_sft(*short, devices=1)


LAYOUTS = {
    "data 8": mesh_keys(8, 1, 1),
    "fsdp 8": mesh_keys(1, 8, 1),
    "data 2, fsdp 4": mesh_keys(2, 4, 1),
    "data 2, fsdp 2, tensor 2": mesh_keys(2, 2, 2),
    "tensor 8": mesh_keys(1, 1, 8),  # more devices than KV heads: those are replicated
    "packed": ["batch.packing=best_fit", *mesh_keys(1, 2, 1)],
    "accumulation 4": ["batch.accumulate=4", *mesh_keys(1, 2, 1)],
    "remat": ["model.remat=full", *mesh_keys(1, 1, 2)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(
    run_sft: Runner, short: list[str], one_device: Finished, layout: str
) -> None:
    """Loss of 10 steps within 1e-5 relative, parameters within 1e-5 relative L2 per tensor."""
    keys = LAYOUTS[layout]
    devices = int(np.prod([int(k.split("=")[1]) for k in keys if k.startswith("mesh")]))
    run = run_sft(*short, *keys, devices=devices)
    apart = l2_apart(run, one_device)
    worst = max(apart, key=lambda k: apart[k])
    print(
        f"{layout}: loss {relative(run.losses, one_device.losses):.1e}, {worst} {apart[worst]:.1e}"
    )
    assert relative(run.losses, one_device.losses) < 1e-5
    assert apart[worst] < 1e-5, (worst, apart[worst])
    if layout == "packed":
        assert run.metrics[0]["packing_efficiency"] > one_device.metrics[0]["packing_efficiency"]
