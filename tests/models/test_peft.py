"""PEFT's folders without PEFT: tensors that several parameters share, and what is refused.

tests/parity/test_peft.py holds the numbers against PEFT's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from posttrain.config import ConfigError
from posttrain.models import peft
from posttrain.models.adapters import attach
from posttrain.models.fused import Group
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import flat, nested
from posttrain.models.peft_config import check_config, is_scorer
from tests.models.tiny import mesh_of, open_tiny

CFG = LoraConfig(targets=("q", "v", "mlp/*"), rank=2, alpha=6.0, rslora=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict, Any]:
    """(folder, spec, params, mesh) of a tiny Phi-3, whose q, k and v are one tensor."""
    folder, mesh = tmp_path_factory.mktemp("adapter"), mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path_factory.mktemp("model"), "phi3", mesh)
        _, state = attach(model.graph, model.state, CFG, mesh)
        rng = np.random.default_rng(0)
        params = nested(
            (p, jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding))
            for p, x in flat(nnx.to_pure_dict(state))
        )
        peft.save(folder, model.spec, params, is_adapter, CFG, base="base", new_ids=range(0))
    return folder, model.spec, params, mesh


def read(written: tuple[Path, Any, dict, Any], folder: Path | None = None) -> dict[str, Any]:
    own, spec, params, mesh = written
    blank = nested((p, x * 0 if is_adapter(p) else x) for p, x in flat(params))
    with jax.set_mesh(mesh):
        return dict(flat(peft.load(folder or own, spec, blank, CFG, range(0))[0]))


def test_adapters_of_one_tensor_are_one_of_theirs_and_come_back(written: Any) -> None:
    folder, _, params, _ = written
    leaves = {path: np.asarray(x) for path, x in flat(params)}
    tensors = load_file(folder / "adapter_model.safetensors")
    at = "base_model.model.model.layers.1.self_attn.qkv_proj"
    delta = tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
    assert delta.shape == (64 + 32 + 32, 64)
    for name, rows in {"q": slice(0, 64), "v": slice(96, 128)}.items():
        a, b = (leaves[f"layers/0/attention/{name}_lora_{side}"][1] for side in "ab")
        want = (a @ b.reshape(2, -1)).T
        np.testing.assert_allclose(delta[rows], want, atol=1e-5)
    assert not delta[64:96].any()  # k has none
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["rank_pattern"]["model.layers.0.self_attn.qkv_proj"] == 4
    scale = raw["alpha_pattern"]["model.layers.0.mlp.gate_up_proj"] / np.sqrt(4)
    assert scale == pytest.approx(CFG.adapter.scale)
    assert raw["target_modules"] == ["down_proj", "gate_up_proj", "qkv_proj"]
    for path, x in read(written).items():
        np.testing.assert_array_equal(x, leaves[path], err_msg=path)


def test_one_that_was_trained_as_one_is_taken_apart(written: Any, tmp_path: Path) -> None:
    """q and v get its A both; values for k, which has no adapter here, are refused."""
    tensors = load_file(written[0] / "adapter_model.safetensors")
    raw = json.loads((written[0] / "adapter_config.json").read_text())
    fused = [name for name in tensors if "qkv_proj" in name or "gate_up_proj" in name]
    for name in fused:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
        tensors[name] = np.ascontiguousarray(tensors[name])
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(raw | {"rank_pattern": {}, "alpha_pattern": {}})
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = read(written, tmp_path)
    q, v = (np.asarray(found[f"layers/0/attention/{x}_lora_a"]) for x in "qv")
    np.testing.assert_array_equal(q, v)
    b = tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    np.testing.assert_array_equal(
        np.asarray(found["layers/0/attention/q_lora_b"])[0].reshape(2, -1).T, b[:64]
    )
    b[70] = 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.qkv_proj\.weight: not an adapter of .*q, .*v"
    ):
        read(written, tmp_path)


def test_blocks_are_cut_as_they_were_joined_and_nothing_else() -> None:
    group = Group(("q", "k"), (slice(0, 3), slice(3, 5)), 5)
    rng = np.random.default_rng(0)
    a = [rng.normal(size=(2, 4)) for _ in range(2)]
    b = [rng.normal(size=(n, 2)) for n in (3, 2)]
    whole = group.join(a, b)
    np.testing.assert_allclose((whole[1] @ whole[0])[3:], b[1] @ a[1])
    for (found_a, found_b), want_a, want_b in zip(group.cut(*whole, 2), a, b, strict=True):
        np.testing.assert_array_equal(found_a, want_a)
        np.testing.assert_array_equal(found_b, want_b)
    whole[1][0, 3] = 1  # q by k's A
    with pytest.raises(ValueError, match="not an adapter of q, k alone"):
        group.cut(*whole, 2)


def test_fields_that_compute_something_else_are_refused_at_once(tmp_path: Path) -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "task_type": "SEQ_CLS"}
    raw |= {"use_dora": True, "init_lora_weights": "pissa", "bias": "all"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as error:
        check_config(tmp_path, CFG)
    for said in ("use_dora is true", 'init_lora_weights is "pissa"', 'bias is "all"',
                 "lora.rank is 2, r in"):  # fmt: skip
        assert said in str(error.value)
    assert is_scorer(tmp_path)
