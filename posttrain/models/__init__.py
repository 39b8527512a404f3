"""Decoders. MODELS maps config.json's model_type to the function that reads it into a Spec.

Light to import (no flax): config modules read ModelConfig from here on.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.models import llama, qwen
from posttrain.models.spec import Spec, read_json, suggest

MODELS = {
    "llama": llama.read_spec,
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
}
# What transformers calls the causal model of each, for a config.json that does not say.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read_spec(folder: str | Path) -> Spec:
    """Spec of the model in an HF folder. ValueError naming the file and field."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    if raw.get("model_type") not in MODELS:
        raise ValueError(f"{file}: model_type {suggest(str(raw.get('model_type')), MODELS)}")
    return MODELS[raw["model_type"]](raw, str(file))
