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
from posttrain.models import hf
from posttrain.models.spec import HeadName, Spec


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


def use_compile_cache() -> None:
    """Compiled programs are kept between starts, where the user named no folder for them."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        if not folder.is_absolute():
            return  # a user without a home
        jax.config.update("jax_compilation_cache_dir", str(folder / "posttrain" / "compiled"))


def open_model(
    cfg: Any, mesh: jax.sharding.Mesh, *, head: HeadName = "lm", new_head: bool = False
) -> Model:
    """Weights straight onto the mesh. Reads the sections model and chat of cfg.

    head, new_head: as posttrain.models.hf.open_model takes them.
    """
    folder = hf.local_folder(cfg.model.path)
    tokenizer = Tokenizer.load(folder)
    size = tokenizer.size
    if cfg.model.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(cfg.model.new_tokens))
    chat = ChatTemplate.load(folder, tokenizer, cfg.chat)
    loaded = hf.open_model(
        cfg.model,
        mesh,
        tokenizer_size=tokenizer.size,
        new_ids=range(size, tokenizer.size),
        head=head,
        new_head=new_head,
    )
    params = nnx.to_pure_dict(loaded.state)
    return Model(folder, loaded.spec, loaded.graph, params, tokenizer, chat, loaded.new_head)
