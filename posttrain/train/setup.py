"""Puts a supervised run together: processes, mesh, data, model, compiled steps; then runs it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from posttrain import checkpoint, optim, sharding
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.checkpoint import Checkpoints, is_primary
from posttrain.config import ConfigError, plain_dict
from posttrain.config_yaml import to_yaml
from posttrain.data.cache import Cache
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig, Plan
from posttrain.data.prepare import prepare
from posttrain.metrics import Writer
from posttrain.models import hf
from posttrain.models.spec import Spec
from posttrain.sampling import engine
from posttrain.train import evaluate, loop
from posttrain.train.config import EvalConfig
from posttrain.train.evaluate import HeldOut
from posttrain.train.offline import OfflineSource, step_size
from posttrain.train.state import TrainState, abstract, new_state
from posttrain.train.step import Forward, eval_step_fn, train_step_fn


@dataclass(frozen=True)
class Model:
    """A model on the mesh: what it is, its structure and weights, its tokenizer and template."""

    folder: Path
    spec: Spec
    graphdef: Any
    params: Any
    tokenizer: Tokenizer
    chat: ChatTemplate


def use_compile_cache() -> None:
    """Compiled programs are kept between starts, where the user named no folder for them."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        if not folder.is_absolute():
            return  # a user without a home
        jax.config.update("jax_compilation_cache_dir", str(folder / "posttrain" / "compiled"))


def open_model(cfg: Any, mesh: jax.sharding.Mesh) -> Model:
    """Weights straight onto the mesh. Reads the sections model and chat of cfg."""
    folder = hf.local_folder(cfg.model.path)
    tokenizer = Tokenizer.load(folder)
    size = tokenizer.size
    if cfg.model.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(cfg.model.new_tokens))
    chat = ChatTemplate.load(folder, tokenizer, cfg.chat)
    loaded = hf.open_model(
        cfg.model, mesh, tokenizer_size=tokenizer.size, new_ids=range(size, tokenizer.size)
    )
    params = nnx.to_pure_dict(loaded.state)
    return Model(folder, loaded.spec, loaded.graph, params, tokenizer, chat)


@dataclass(frozen=True)
class Parts:
    """What planning, compiling and evaluating have in common."""

    cfg: Any
    mesh: jax.sharding.Mesh
    model: Model

    def plan(self, cache: Cache, data: DataConfig, batch: BatchConfig, **length: Any) -> Plan:
        """`length`: epochs= or steps=."""
        return Plan(
            cache,
            batch,
            seq_len=data.seq_len,
            seed=self.cfg.seed,
            batch_shards=sharding.batch_shards(self.mesh),
            sources=data.sources,
            **length,
        )

    def forward(self, plan: Plan, sources: int) -> Forward:
        return Forward(
            self.model.graphdef,
            self.cfg.loss,
            self.mesh,
            budget=plan.head_budget(),
            head_chunk=self.cfg.train.head_chunk,
            sources=sources,
        )

    def held_out(self) -> list[HeldOut]:
        """Each evaluation set: one epoch, in order, laid out as training's batches are."""
        sets = []
        for name, source in self.cfg.eval.sets.items():
            data = self.cfg.data.model_copy(update={"sources": {name: source}})
            cache = self.prepare(data, "eval.sets")
            batch = self.cfg.batch.model_copy(update={"order": "sequential"})
            plan = self.plan(cache, data, batch, epochs=1)
            sets.append(HeldOut(name, cache, plan, eval_step_fn(self.forward(plan, 1))))
        return sets

    def prepare(self, data: DataConfig, section: str) -> Cache:
        return prepare(data, self.model.chat, is_primary=is_primary(), section=section)


def run_sft(cfg: Any, devices: Sequence[Any] | None = None) -> int:
    """The whole job of posttrain.jobs.sft, on all devices or those given; its exit code."""
    with loop.stops_at_once():
        return _run_sft(cfg, devices)


def _run_sft(cfg: Any, devices: Sequence[Any] | None) -> int:
    began = time.monotonic()
    sharding.init_distributed(cfg.distributed)
    use_compile_cache()
    mesh = sharding.make_mesh(cfg.mesh, devices)
    with jax.set_mesh(mesh), checkpoint.held(cfg.run_dir):
        resuming = checkpoint.open_run(cfg.run_dir, cfg, cfg.checkpoint.resume)
        if cfg.checkpoint.init_from and not resuming:  # asked before anything slow is done
            checkpoint.find_checkpoint(cfg.checkpoint.init_from)
        parts = Parts(cfg, mesh, open_model(cfg, mesh))
        _refuse_long_rows(cfg.data.seq_len, parts.model)
        cache = parts.prepare(cfg.data, "data.sources")
        steps, epochs = cfg.train.steps, cfg.train.epochs or 1
        length = {"steps": steps} if steps else {"epochs": epochs}
        plan = parts.plan(cache, cfg.data, cfg.batch, **length)
        return _train(parts, cache, plan, resuming, began)


def _refuse_long_rows(seq_len: int, model: Model) -> None:
    if seq_len > model.spec.max_positions:
        raise ConfigError(
            f"data.seq_len is {seq_len}, and the model's context is {model.spec.max_positions} "
            f"(max_position_embeddings of {model.folder}/config.json): lower data.seq_len; "
            "data.too_long says what becomes of longer examples"
        )


def _train(parts: Parts, cache: Cache, plan: Plan, resuming: bool, began: float) -> int:
    cfg, mesh, model = parts.cfg, parts.mesh, parts.model
    held_out = parts.held_out()
    tx = optim.make_optimizer(cfg.optim, plan.steps)
    params = model.params
    if cfg.checkpoint.init_from and not resuming:
        layout = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
        )
        params = checkpoint.restore_params(cfg.checkpoint.init_from, layout)
    state = new_state(params, tx)
    checkpoints = Checkpoints(cfg.run_dir, cfg.checkpoint, plain_dict(cfg))
    if resuming:
        state = checkpoints.restore(abstract(state))
    start = int(state.step)
    if start > plan.steps:
        raise ConfigError(
            f"{cfg.run_dir} is at step {start}, past the {plan.steps} steps this config asks for"
        )
    names = list(cache.source_names)
    step = train_step_fn(
        parts.forward(plan, len(names)),
        tx,
        optim.schedule(cfg.optim, plan.steps),
        cfg.optim.clip_norm,
        state,
    )
    writer = Writer(cfg.run_dir, cfg.log, primary=is_primary(), resumed_at=start)
    source = OfflineSource(cache, plan, mesh, start)
    _say(cfg, plan, model, mesh, start, began)
    run = loop.Run(
        folder=cfg.run_dir,
        spec=model.spec,
        train_step=step,
        source=source,
        size=lambda k: step_size(plan, k),
        total_steps=plan.steps,
        epochs_after=plan.epochs_after,
        source_names=names,
        checkpoints=checkpoints,
        writer=writer,
        log=cfg.log,
        evaluate=_evaluation(parts, held_out) if held_out else None,
        eval_every=cfg.eval.every,
        tokens_before=sum(step_size(plan, k).tokens for k in range(start)),
    )
    try:
        state, preempted = loop.train(run, state)
    finally:
        source.close()
        checkpoints.close()
        writer.close()
    if preempted:
        return loop.PREEMPTED
    if cfg.export:
        _export(cfg, model, plan, state.params)
    return 0


def _say(
    cfg: Any, plan: Plan, model: Model, mesh: jax.sharding.Mesh, start: int, began: float
) -> None:
    if not is_primary():
        return
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    for line in (
        f"model: {model.spec.family}, {model.spec.parameters:,} parameters, {cfg.model.path}",
        f"devices: {jax.device_count()} ({jax.devices()[0].device_kind}), {shape}",
        plan.describe(),
        f"vocabulary head: at most {plan.head_budget():,} trained tokens in a shard's rows",
        *(f"learning rate: {warning}" for warning in optim.warnings(cfg.optim, plan.steps)),
        f"{'continuing at' if start else 'starting at'} step {start}, "
        f"{time.monotonic() - began:.1f} s after the start",
    ):
        print(line, flush=True)


def _evaluation(parts: Parts, sets: Sequence[HeldOut]) -> Any:
    cfg: EvalConfig = parts.cfg.eval
    tokenizer = parts.model.tokenizer

    def generate(params: Any, prompts: list[list[int]]) -> list[list[int]]:
        return engine.generate(
            nnx.merge(parts.model.graphdef, nnx.State(params)),
            prompts,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_ids=parts.model.chat.stop_ids,
            seed=parts.cfg.seed,
        )

    def measure(state: TrainState, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for held_out in sets:
            found |= held_out.measure(state.params, parts.mesh)
            if cfg.samples:
                path = parts.cfg.run_dir / "samples" / f"{step}_{held_out.name}.jsonl"
                evaluate.write_samples(path, held_out, tokenizer, cfg, generate, state.params)
        return found

    return measure


def _export(cfg: Any, model: Model, plan: Plan, params: Any) -> None:
    """<run_dir>/export: weights, config, tokenizer, template, generation config, model card."""
    folder = Path(cfg.run_dir) / "export"
    stop_ids = model.chat.stop_ids
    hf.save(
        folder, model.spec, params, model.tokenizer, dtype=cfg.model.param_dtype, stop_ids=stop_ids
    )
    if is_primary():
        model.chat.save(folder)
        (folder / "README.md").write_text(_model_card(cfg, model, plan), encoding="utf-8")
        print(f"exported to {folder}", flush=True)


def _model_card(cfg: Any, model: Model, plan: Plan) -> str:
    sources = "\n".join(
        f"- {name}: {', '.join(source.paths)}, seen {plan.repeats[name]:.4g} times an epoch"
        for name, source in cfg.data.sources.items()
    )
    return f"""---
library_name: transformers
base_model: {cfg.model.path}
tags: [posttrain, {cfg.job}]
---
# {cfg.model.path}, fine-tuned

Supervised fine-tuning (posttrain {cfg.job}) of a {model.spec.family} model with
{model.spec.parameters:,} parameters: {plan.steps:,} optimiser steps, trained on the assistant's
turns ({cfg.chat.train_on}) of

{sources}

Conversations are rendered by the chat template in this folder; generation ends at the tokens
`eos_token_id` of generation_config.json. The run's config:

```yaml
{to_yaml(plain_dict(cfg)).strip()}
```
"""
