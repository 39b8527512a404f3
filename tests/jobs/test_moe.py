"""`posttrain sft` on a mixture of experts, from folder to export; what has no use is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import ConfigError
from tests.jobs.runs import Runner

MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mlp_only_layers": [0],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
SHORT = ["batch.examples=4", "train.steps=2", "model.random_init=true"]


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's tokenizer, with the config.json of a tiny mixture."""
    made = tmp_path_factory.mktemp("mixture")
    golden = data_dir / "golden" / "model"
    for path in golden.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, made)
    size = json.loads((golden / "config.json").read_text())["vocab_size"]
    (made / "config.json").write_text(json.dumps(MIXTURE | {"vocab_size": size}))
    return made


def test_a_mixture_is_trained_watched_and_exported(run_sft: Runner, folder: Path) -> None:
    keys = [*SHORT, f"model.path={folder}", "train.router_balance=0.1", "train.router_z=0.01"]
    done = run_sft(*keys, "mesh.expert=2", "mesh.fsdp=2", devices=4)
    assert done.code == 0
    one, two = done.metrics
    assert {name for name in one if name.startswith("router/")} == {
        f"router/{name}" for name in ("balance", "z", "entropy", "max_load", "min_load")
    }
    assert one["router/balance"] >= 2
    assert one["router/max_load"] > 1 > one["router/min_load"]
    assert 0 < one["router/entropy"] < np.log(4)
    assert two["router/balance"] != one["router/balance"]
    tensors = done.weights
    assert tensors["model.layers.2.mlp.experts.3.down_proj.weight"].shape == (32, 24)
    assert "model.layers.0.mlp.gate_proj.weight" in tensors


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["mesh.expert=8"], "mesh.expert is 8: does not divide the 4 experts of"),
        (["mesh.context=3"], "mesh.context is 3: does not divide data.seq_len=512"),
    ],
)
def test_devices_that_would_do_what_others_do_are_refused(
    run_sft: Runner, folder: Path, keys: list[str], named: str
) -> None:
    devices = int(keys[0].split("=")[1])
    with pytest.raises(ConfigError, match=named):
        run_sft(*SHORT, f"model.path={folder}", *keys, devices=devices)


def test_a_model_without_experts_has_no_router_to_train(run_sft: Runner) -> None:
    with pytest.raises(ConfigError, match=r"expert is 2: \w+ has no experts") as error:
        run_sft(*SHORT, "train.router_balance=0.01", "mesh.expert=2", devices=2)
    assert "train.router_balance is 0.01" in str(error.value)
