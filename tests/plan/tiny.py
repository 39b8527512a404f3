"""A config of posttrain sft whose model is a config.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write_config(
    folder: Path, *, layers: int = 2, heads: int = 4, kv_heads: int = 2, vocab: int = 512, **fields
) -> Path:
    """The path of the YAML file; the model lies beside it. fields: of config.json."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    known = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(known | fields))
    tree = {
        "job": "sft",
        "model": {"path": str(model)},
        "data": {"seq_len": 128, "sources": {"a": {"path": "a.jsonl"}}},
        "batch": {"rows": 8},
        "train": {"steps": 10},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
