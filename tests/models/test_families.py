"""Every family through the vocabulary head: one device and eight say the same, gradients too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.models import MODELS, read_spec
from posttrain.models.head import token_outputs
from posttrain.models.hf import flat_params
from posttrain.models.spec import ModelConfig
from posttrain.models.transformer import abstract_model, compute_of
from tests.models.tiny import CONFIGS, mesh_of, open_tiny, write_config

# data, fsdp, tensor, expert: 8 experts, and 6, which 4 devices do not divide
MESHES = {"qwen3_moe": (1, 1, 2, 4), "olmoe": (1, 2, 1, 4)}
TRIED_ELSEWHERE = ("mixtral",)  # tests/train/test_step_meshes.py


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """8 rows of 24: segments of 13 and 9, longer than the windows, then padding."""
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 0], [13, 9, 2]).astype(np.int32)
    positions = np.concatenate([*map(np.arange, (13, 9)), np.zeros(2)]).astype(np.int32)
    return {
        "tokens": rng.integers(0, 160, (8, 24)).astype(np.int32),
        "positions": np.tile(positions, (8, 1)),
        "segments": np.tile(segments, (8, 1)),
        "weights": rng.choice([0.0, 1.0], (8, 24)).astype(np.float32),
    }


def loss_and_grads(
    folder: Path, name: str, shape: tuple[int, ...], rows: dict[str, np.ndarray], remat: str
) -> tuple[float, dict[str, np.ndarray]]:
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        model = open_tiny(folder, name, mesh, remat=remat)

        def loss(state: Any) -> jax.Array:
            network = nnx.merge(model.graph, state)
            said = token_outputs(
                network.hidden(rows["tokens"], rows["positions"], rows["segments"]),
                network.head_kernel(),
                rows["tokens"],
                rows["segments"],
                rows["weights"],
                mesh=mesh,
                budget=rows["tokens"].size,
                vocab_size=model.spec.vocab_size,
                softcap=model.spec.final_softcap,
            )
            return -(said.logps * rows["weights"]).sum()

        value, grads = jax.jit(jax.value_and_grad(loss))(model.state)
        return float(value), {path: np.asarray(g) for path, g in flat_params(grads)}


def test_every_family_has_a_tiny_config() -> None:
    """But for gemma3, which is a gemma3_text inside another config.json."""
    assert set(CONFIGS) == set(MODELS) - {"gemma3"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in TRIED_ELSEWHERE])
def test_one_device_and_eight_give_the_same_loss_and_gradients(
    tmp_path: Path, name: str, rows: dict[str, np.ndarray]
) -> None:
    """The one keeps of each layer what it can, the eight the least."""
    value, grads = loss_and_grads(tmp_path, name, (1, 1, 1), rows, "none")
    other, found = loss_and_grads(tmp_path, name, MESHES.get(name, (2, 2, 2)), rows, "full")
    assert other == pytest.approx(value, rel=1e-6)
    for path, grad in grads.items():
        norm = np.linalg.norm(grad)
        assert norm > 0, path
        assert np.linalg.norm(found[path] - grad) / norm < 5e-6, path


def test_a_period_is_traced_once_however_often_it_comes(tmp_path: Path) -> None:
    """Gemma 3's 26 layers: five local and a global one, four times, and two local ones: code for
    seven layers, in two scans."""
    sizes = {"num_hidden_layers": 26, "sliding_window_pattern": 6}
    spec = read_spec(write_config(tmp_path, "gemma3_text", **sizes))
    compute = compute_of(ModelConfig(path=str(tmp_path)))
    graph, state = abstract_model(spec, compute, mesh_of(1, 1, 1))
    ids = jax.ShapeDtypeStruct((2, 24), np.int32)
    traced = jax.make_jaxpr(lambda s, *rows: nnx.merge(graph, s).hidden(*rows))(
        state, ids, ids, ids
    )
    scans = [eqn.params for eqn in traced.eqns if eqn.primitive.name == "scan"]
    assert [scan["length"] for scan in scans] == [4, 2]
    layers = [
        sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in scan["jaxpr"].eqns)
        for scan in scans
    ]
    assert layers == [6, 1]
