"""Which tensor is which parameter: stacks of layers and fused tensors, there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from posttrain.models import hf, stream
from tests.models.test_hf import ONE, config, values
from tests.models.tiny import mesh_of, open_tiny


@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "olmo2"])
def test_families_with_stacks_and_fused_tensors_come_back(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written from one mesh and read on another, a few rows at a time, in several files."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 3000)
    model = open_tiny(tmp_path / "config", name, mesh_of(2, 2, 2))
    hf.save(tmp_path / "model", model.spec, model.state, shard_bytes=50_000)
    want = values(model)
    for shape in (ONE, (1, 1, 8)):
        found = values(hf.open_model(config(tmp_path / "model"), mesh_of(*shape)))
        assert set(found) == set(want)
        for path, array in want.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_fused_tensors_hold_their_parts_in_order(tmp_path: Path) -> None:
    """Phi-3's qkv_proj is q, k, v, one under the other; gate_up_proj is gate, then up."""
    model = open_tiny(tmp_path / "config", "phi3", mesh_of(*ONE))
    hf.save(tmp_path / "model", model.spec, model.state)
    tensors, own = load_file(tmp_path / "model" / "model.safetensors"), values(model)
    parts = [own[f"layers/0/attention/{name}"][1].reshape(64, -1).T for name in "qkv"]
    qkv = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(qkv, np.concatenate(parts))
    gate, up = (own[f"layers/0/mlp/{name}"][1].T for name in ("gate", "up"))
    fused = tensors["model.layers.1.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(fused, np.concatenate([gate, up]))


def test_layers_of_a_period_find_their_tensors(tmp_path: Path) -> None:
    """Gemma 3's layers 0, 2 | 1, 3 | 4 lie in three stacks."""
    model = open_tiny(tmp_path / "config", "gemma3_text", mesh_of(*ONE))
    hf.save(tmp_path / "model", model.spec, model.state)
    tensors, own = load_file(tmp_path / "model" / "model.safetensors"), values(model)
    for layer, (stack, index) in enumerate([("0", 0), ("1", 0), ("0", 1), ("1", 1), ("2", 0)]):
        for ours, theirs in {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }.items():
            want = own[f"layers/{stack}/{ours}"][index]
            found = tensors[f"model.layers.{layer}.{theirs}.weight"]
            np.testing.assert_array_equal(found, want)
        up = own[f"layers/{stack}/mlp/up"][index].T
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.mlp.up_proj.weight"], up)
