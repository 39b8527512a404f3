"""adapter_config.json of a PEFT adapter: what of it is computed here, and what `lora` must say.

Light: safetensors are not opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.config import ConfigError
from posttrain.models.config_json import read_json
from posttrain.models.lora import LoraConfig

CONFIG = "adapter_config.json"
# Fields of adapter_config.json that change what an adapter computes: the values we compute.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    # others take the base model apart, or weights away from it
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def fields(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """adapter_config.json, and what in it is not computed here."""
    file = folder / CONFIG
    raw = read_json(file)
    wrong = [
        f"{file}: {name} is {json.dumps(raw[name])}: only {json.dumps(allowed[0])} is supported"
        for name, allowed in _ONLY.items()
        if name in raw and raw[name] not in allowed
    ]
    return raw, wrong


def is_scorer(folder: Path) -> bool:
    """Whether an adapter folder belongs to a sequence classifier."""
    return read_json(folder / CONFIG).get("task_type") == "SEQ_CLS"


def check_config(folder: Path, cfg: LoraConfig) -> None:
    """ConfigError where an adapter folder is none of ours, or not the one that `lora` describes."""
    raw, wrong = fields(folder)
    for theirs, ours in {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}.items():
        found, asked = raw.get(theirs, False), getattr(cfg, ours)
        if found != asked:
            at = folder / CONFIG
            wrong.append(f"lora.{ours} is {asked}, {theirs} in {at} is {found}: set it so")
    if wrong:
        raise ConfigError("\n    ".join(wrong))
