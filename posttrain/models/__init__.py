"""Decoders. MODELS maps config.json's model_type to the function that reads it into a Spec.

Light to import (no flax): config modules read ModelConfig from here on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from posttrain.models import gemma, llama, mistral, mixtral, olmo, olmoe, phi, qwen, qwen3_moe
from posttrain.models.config_json import read_json, suggest
from posttrain.models.spec import Spec

MODELS = {
    "gemma2": gemma.read_gemma2,
    "gemma3": gemma.read_gemma3_images,
    "gemma3_text": gemma.read_gemma3,
    "llama": llama.read_spec,
    "mistral": mistral.read_spec,
    "mixtral": mixtral.read_spec,
    "olmo2": olmo.read_spec,
    "olmoe": olmoe.read_spec,
    "phi3": phi.read_spec,
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
    "qwen3_moe": qwen3_moe.read_spec,
}
# What transformers calls the causal model of each, for a config.json that does not say.
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# What it calls the classifier of each, where the name does not follow from the causal model's; None
# where there is none.
CLASSIFIERS: dict[str, str | None] = {
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "olmoe": None,
}


def classifier_of(family: str) -> str | None:
    """What transformers calls a family's sequence classifier, as which a reward model is saved."""
    usual = ARCHITECTURES[family].replace("ForCausalLM", "ForSequenceClassification")
    return CLASSIFIERS.get(family, usual)


def read_spec(folder: str | Path) -> Spec:
    """Spec of the model in an HF folder; a sequence classifier's is one with a score head.

    ValueError naming the file and field; so too for a classifier of several labels.
    """
    file = Path(folder) / "config.json"
    if not file.exists() and (adapter := Path(folder) / "adapter_config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: an adapter, not a model. To train on, name its base ({base}) in model.path "
            f"and the adapter in lora.path; for one folder of both, `posttrain convert "
            f"source={base} adapter={folder} out=FOLDER`"
        )
    raw = read_json(file)
    if raw.get("model_type") not in MODELS:
        raise ValueError(f"{file}: model_type {suggest(str(raw.get('model_type')), MODELS)}")
    spec = MODELS[raw["model_type"]](raw, str(file))
    scores = any(
        name.endswith("ForSequenceClassification") for name in raw.get("architectures") or ()
    )
    if not scores:
        return spec
    labels = raw.get("id2label") or raw.get("num_labels")  # transformers writes the one or neither
    if labels is not None and (count := labels if isinstance(labels, int) else len(labels)) != 1:
        name = "num_labels" if labels == count else "id2label"
        raise ValueError(
            f"{file}: {name} gives {count} labels: a reward model has one, its score; classifiers "
            "of several labels are not supported"
        )
    return dataclasses.replace(spec, head="score")
