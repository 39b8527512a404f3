"""Decoders. MODELS maps config.json's model_type to the function that reads it into a Spec.

Light to import (no flax): config modules read ModelConfig from here on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from posttrain.models import gemma, llama, mistral, olmo, phi, qwen
from posttrain.models.config_json import read_json, suggest
from posttrain.models.spec import Spec

MODELS = {
    "gemma2": gemma.read_gemma2,
    "gemma3_text": gemma.read_gemma3,
    "llama": llama.read_spec,
    "mistral": mistral.read_spec,
    "olmo2": olmo.read_spec,
    "phi3": phi.read_spec,
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
}
# What transformers calls the causal model of each, for a config.json that does not say.
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What it calls the classifier of each, where the name does not follow from the causal model's; None
# where there is none.
CLASSIFIERS: dict[str, str | None] = {"gemma3_text": "Gemma3TextForSequenceClassification"}


def classifier_of(family: str) -> str | None:
    """What transformers calls a family's sequence classifier, as which a reward model is saved."""
    usual = ARCHITECTURES[family].replace("ForCausalLM", "ForSequenceClassification")
    return CLASSIFIERS.get(family, usual)


def read_spec(folder: str | Path) -> Spec:
    """Spec of the model in an HF folder; a sequence classifier's is one with a score head.

    ValueError naming the file and field.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    if raw.get("model_type") not in MODELS:
        raise ValueError(f"{file}: model_type {suggest(str(raw.get('model_type')), MODELS)}")
    spec = MODELS[raw["model_type"]](raw, str(file))
    scores = any(
        name.endswith("ForSequenceClassification") for name in raw.get("architectures") or ()
    )
    return dataclasses.replace(spec, head="score") if scores else spec
