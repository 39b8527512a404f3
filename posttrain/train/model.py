"""A model on the mesh with what belongs to it: structure, weights, tokenizer, chat template."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.models import adapters, hf, peft, read_spec
from posttrain.models.lora import LoraConfig
from posttrain.models.peft_config import check_config
from posttrain.models.spec import HeadName, Spec
from posttrain.models.transformer import abstract_model, compute_of


@dataclass(frozen=True)
class Model:
    """A model on the mesh: what it is, its structure and weights, its tokenizer and template."""

    folder: Path
    spec: Spec
    graphdef: Any
    params: Any
    tokenizer: Tokenizer
    chat: ChatTemplate
    new_head: bool = False  # the folder has no score head: it is random
    lora: LoraConfig | None = None  # the adapters among the parameters
    new_ids: range = range(0)  # of tokens that were added to the vocabulary
    whole: tuple[str, ...] = ()  # the parameters that lora.path holds whole, not as adapters


def use_compile_cache() -> None:
    """Compiled programs are kept between starts, where the user named no folder for them."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        if not folder.is_absolute():
            return  # a user without a home
        jax.config.update("jax_compilation_cache_dir", str(folder / "posttrain" / "compiled"))


def open_abstract(
    cfg: Any,
    mesh: jax.sharding.Mesh,
    *,
    head: HeadName = "lm",
    new_head: bool = False,
    lora: LoraConfig | None = None,
) -> Model:
    """The same model as open_model's, its parameters shapes: of config.json alone.

    It has no chat template, and a tokenizer only where the folder has one: without, the vocabulary
    is config.json's and the tokens that model.new_tokens adds.
    """
    folder = hf.local_folder(cfg.model.path, weights=False)
    tokenizer: Any = None
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
        size = tokenizer.size
        tokenizer = tokenizer.with_added_tokens(list(cfg.model.new_tokens))
        new_ids = range(size, tokenizer.size)
    else:
        size = read_spec(folder).vocab_size
        new_ids = range(size, size + len(cfg.model.new_tokens))
    spec, made = hf.spec_of(
        cfg.model, folder, tokenizer_size=new_ids.stop, head=head, new_head=new_head
    )
    graph, state = abstract_model(spec, compute_of(cfg.model), mesh)
    if lora:
        graph, state = adapters.adapt(graph, state, lora, mesh, new_ids=new_ids)
    params = nnx.to_pure_dict(state)
    chat: Any = None
    return Model(folder, spec, graph, params, tokenizer, chat, made, lora, new_ids)


def open_model(
    cfg: Any,
    mesh: jax.sharding.Mesh,
    *,
    head: HeadName = "lm",
    new_head: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Model:
    """Weights straight onto the mesh. Reads the sections model and chat of cfg.

    head, new_head: as posttrain.models.hf.open_model takes them. lora: the adapters to put on it,
    those of lora.path or fresh ones by `seed`.
    """
    if lora and lora.path:
        check_config(hf.local_folder(lora.path), lora)
    folder = hf.local_folder(cfg.model.path)
    tokenizer = Tokenizer.load(folder)
    size = tokenizer.size
    if cfg.model.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(cfg.model.new_tokens))
    chat = ChatTemplate.load(folder, tokenizer, cfg.chat)
    new_ids = range(size, tokenizer.size)
    loaded = hf.open_model(
        cfg.model,
        mesh,
        tokenizer_size=tokenizer.size,
        new_ids=new_ids,
        head=head,
        new_head=new_head,
        store=adapters.quantizing(lora) if lora else None,
    )
    graph, state = loaded.graph, loaded.state
    if lora:
        graph, state = adapters.adapt(graph, state, lora, mesh, seed=seed, new_ids=new_ids)
    params, whole = nnx.to_pure_dict(state), []
    if lora and lora.path:
        params, whole = peft.load(hf.local_folder(lora.path), loaded.spec, params, lora, new_ids)
    return Model(
        folder, loaded.spec, graph, params, tokenizer, chat, loaded.new_head, lora, new_ids,
        tuple(whole),
    )  # fmt: skip
