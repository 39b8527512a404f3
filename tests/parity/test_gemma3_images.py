"""A Gemma 3 that sees images: its text model alone is read, and exported as one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain import config
from posttrain.jobs import convert
from posttrain.models import hf
from posttrain.models import peft as adapters
from posttrain.models.adapters import attach
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import flat, nested
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.parity


def sees_images() -> Any:
    """A tiny Gemma3ForConditionalGeneration of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 150,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "initializer_range": 0.1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_is_read_and_exported(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both spellings of its tensors' names, of transformers 5 and of the releases."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    whole = sees_images()
    folder = tmp_path / "whole"
    whole.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    written = next(p for p in ("model.language_model.", "language_model.model.") if any(
        name.startswith(p) for name in tensors
    ))  # fmt: skip
    save_file({name.replace(written, prefix): x for name, x in tensors.items()}, file)
    tokens = np.random.default_rng(0).integers(2, 150, (2, 60)).astype(np.int32)
    with torch.no_grad():
        want = whole(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert want.std() > 0.3

    cfg = ModelConfig(path=str(folder), dtype="float32", remat="none", vocab_multiple=1)
    model = hf.open_model(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    positions = np.tile(np.arange(60, dtype=np.int32), (2, 1))
    logits = jax.jit(
        lambda s: nnx.merge(model.graph, s).logits(tokens, positions, np.ones_like(tokens))
    )(model.state)
    assert np.abs(np.asarray(logits) - want).max() < 2e-5

    out = tmp_path / "text"
    convert.run(config.load(convert.Config, [], [f"source={folder}", f"out={out}"]))
    assert "gemma3_text without the part that sees images" in capsys.readouterr().out
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    opened, info = loaded
    assert not any(info.values()), info
    assert type(opened) is transformers.Gemma3ForCausalLM
    with torch.no_grad():
        again = opened.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert (again == want).all()


def test_adapters_of_the_text_model_are_the_whole_models_there(tmp_path: Path) -> None:
    """PEFT finds ours in the model that sees images, and nothing on its vision tower; we find those
    that PEFT trained on its text model, and refuse those on what is left out."""
    import peft
    import torch
    from safetensors.numpy import load_file, save_file

    folder, ours = tmp_path / "whole", tmp_path / "ours"
    sees_images().save_pretrained(folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    cfg = ModelConfig(path=str(folder), dtype="float32", remat="none", vocab_multiple=1)
    lora = LoraConfig(targets=("*",), rank=3, alpha=6.0)
    with jax.set_mesh(mesh):
        model = hf.open_model(cfg, mesh)
        graph, state = attach(model.graph, model.state, lora, mesh)
        rng = np.random.default_rng(1)
        params = nested(
            (p, x + rng.normal(0, 0.1, x.shape).astype(np.float32) if trains(p) else x)
            for p, x in flat(nnx.to_pure_dict(state))
        )
        adapters.save(ours, model.spec, params, trains, lora, base=str(folder), new_ids=range(0))
        blank = nested((p, x * 0 if trains(p) else x) for p, x in flat(params))
        again, whole = adapters.load(ours, model.spec, blank, lora, range(0))
    assert whole == ["final_norm"]
    tokens = np.random.default_rng(0).integers(2, 150, (2, 60)).astype(np.int32)
    positions = np.tile(np.arange(60, dtype=np.int32), (2, 1))
    logits = jax.jit(
        lambda p: nnx.merge(graph, nnx.State(p)).logits(tokens, positions, np.ones_like(tokens))
    )(again)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(ours).float().eval()
    assert type(theirs.base_model.model).__name__ == "Gemma3ForConditionalGeneration"
    assert not [n for n, _ in theirs.named_parameters() if "vision" in n and "lora" in n]
    with torch.no_grad():
        want = theirs(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(np.asarray(logits) - want).max() < 2e-5
    theirs.save_pretrained(tmp_path / "theirs")
    with jax.set_mesh(mesh):
        back, _ = adapters.load(tmp_path / "theirs", model.spec, blank, lora, range(0))
    for (path, found), (_, array) in zip(flat(back), flat(params), strict=True):
        np.testing.assert_array_equal(found, array, err_msg=path)

    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tower = "base_model.model.model.vision_tower.q_proj.lora_A.weight"
    save_file(load_file(file) | {tower: np.zeros((3, 32), np.float32)}, file)
    with pytest.raises(ValueError, match=rf"unexpected: {tower}"), jax.set_mesh(mesh):
        adapters.load(tmp_path / "theirs", model.spec, blank, lora, range(0))


def trains(path: str) -> bool:
    return is_adapter(path) or path == "final_norm"
