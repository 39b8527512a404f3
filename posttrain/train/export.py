"""What a finished run leaves for others: a Hugging Face folder with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from posttrain.checkpoint import is_primary
from posttrain.config import plain_dict
from posttrain.config_yaml import to_yaml
from posttrain.mirror import home_of
from posttrain.models import hf, peft
from posttrain.models.adapters import merging
from posttrain.models.nested import flat, join
from posttrain.train.model import Model


@dataclass(frozen=True)
class Story:
    """What the model card says of the training. seen: what it was trained on, a line each."""

    steps: int
    seen: list[str]


def leave(cfg: Any, model: Model, story: Story, trained: Any, frozen: Any) -> None:
    """The adapter of a run that trained one, and the whole model where that is asked for."""
    if model.lora:
        save_adapter(cfg, model, story, trained, frozen)
    if cfg.export:
        export(cfg, model, story, trained, frozen)


def export(cfg: Any, model: Model, story: Story, trained: Any, frozen: Any) -> None:
    """<run_dir>/export: weights, config, tokenizer, template, generation config, model card.

    Adapters are merged into the weights.
    """
    folder = Path(cfg.run_dir) / "export"
    params, leaf = join(trained, frozen), None
    if lora := model.lora:
        dtype = jnp.dtype(cfg.model.param_dtype)
        params, leaf = merging(params, lora.adapter, model.new_ids, dtype)
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
        leaf=leaf,
    )
    if is_primary():
        model.chat.save(folder)
        card = _model_card(cfg, model, story, "transformers")
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"exported to {home_of(cfg.run_dir) / 'export'}", flush=True)


def save_adapter(cfg: Any, model: Model, story: Story, trained: Any, frozen: Any) -> None:
    """<run_dir>/adapter: what a run with adapters trained, alone, in PEFT's format."""
    assert model.lora is not None
    folder = Path(cfg.run_dir) / "adapter"
    params, rule = join(trained, frozen), dict(flat(trained)).__contains__
    if lost := peft.unsaved(params, model.spec, rule):
        if is_primary():
            names = ", ".join(lost)
            print(f"no adapter saved: PEFT's format has no place for {names}", flush=True)
        return
    peft.save(
        folder, model.spec, params, rule, model.lora, base=cfg.model.path, new_ids=model.new_ids,
        task="SEQ_CLS" if model.spec.head == "score" else "CAUSAL_LM",
    )  # fmt: skip
    if is_primary():
        tokenizer = model.tokenizer
        if model.spec.head == "score":
            tokenizer = tokenizer.padding_apart(model.chat.stop_ids)
        tokenizer.save(folder)
        model.chat.save(folder)
        card = _model_card(cfg, model, story, "peft")
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"adapter saved to {folder}", flush=True)


METHODS = {
    "sft": "Supervised fine-tuning (posttrain sft)",
    "preference": "Preference optimisation (posttrain preference, {loss})",
    "reward_model": "Reward model (posttrain reward_model, {loss})",
    "rl": "Reinforcement learning (posttrain rl, {loss})",
}
"""By job, what the model card calls it."""


def _model_card(cfg: Any, model: Model, story: Story, library: str) -> str:
    sources = "\n".join(f"- {line}" for line in story.seen)
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
library_name: {library}
base_model: {cfg.model.path}
tags: [posttrain, {cfg.job}]
---
# {cfg.model.path}, fine-tuned

{method} of a {model.spec.family} model with
{model.spec.parameters:,} parameters: {story.steps:,} optimiser steps, trained on the assistant's
turns ({cfg.chat.train_on}) of

{sources}

{use} The run's config:

```yaml
{to_yaml(config).strip()}
```
"""
