"""What a finished run leaves for others: a Hugging Face folder with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.checkpoint import is_primary
from posttrain.config import plain_dict
from posttrain.config_yaml import to_yaml
from posttrain.data.plan import Plan
from posttrain.models import hf
from posttrain.train.model import Model


def export(cfg: Any, model: Model, plan: Plan, params: Any) -> None:
    """<run_dir>/export: weights, config, tokenizer, template, generation config, model card."""
    folder = Path(cfg.run_dir) / "export"
    scores = model.spec.head == "score"
    stop_ids, tokenizer = model.chat.stop_ids, model.tokenizer
    if scores:  # transformers finds the last token of a text by the padding that follows it
        tokenizer = tokenizer.padding_apart(stop_ids)
    hf.save(
        folder,
        model.spec,
        params,
        tokenizer,
        dtype=cfg.model.param_dtype,
        stop_ids=() if scores else stop_ids,
        pad_id=tokenizer.pad_id if scores else None,
    )
    if is_primary():
        model.chat.save(folder)
        (folder / "README.md").write_text(_model_card(cfg, model, plan), encoding="utf-8")
        print(f"exported to {folder}", flush=True)


METHODS = {
    "sft": "Supervised fine-tuning (posttrain sft)",
    "preference": "Preference optimisation (posttrain preference, {loss})",
    "reward_model": "Reward model (posttrain reward_model, {loss})",
}
"""By job, what the model card calls it."""


def _model_card(cfg: Any, model: Model, plan: Plan) -> str:
    sources = "\n".join(
        f"- {name}: {', '.join(source.paths)}, seen {plan.repeats[name]:.4g} times an epoch"
        for name, source in cfg.data.sources.items()
    )
    config = plain_dict(cfg)
    method = METHODS[cfg.job].format(loss=config["loss"]["type"])
    use = (
        "Conversations are rendered by the chat template in this folder; generation ends at the "
        "tokens\n`eos_token_id` of generation_config.json."
    )
    if model.spec.head == "score":
        use = (
            "Conversations, the answer included, are rendered by the chat template in this folder; "
            "the logit\nis the reward. What means something is its difference between two answers."
        )
    return f"""---
library_name: transformers
base_model: {cfg.model.path}
tags: [posttrain, {cfg.job}]
---
# {cfg.model.path}, fine-tuned

{method} of a {model.spec.family} model with
{model.spec.parameters:,} parameters: {plan.steps:,} optimiser steps, trained on the assistant's
turns ({cfg.chat.train_on}) of

{sources}

{use} The run's config:

```yaml
{to_yaml(config).strip()}
```
"""
