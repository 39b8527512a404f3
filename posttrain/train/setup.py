"""Puts an offline run together: processes, mesh, data, model, reference, compiled steps; runs it.

What jobs differ in is said to `run`: what kind of data they take, and what the reference is.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from posttrain import checkpoint, folder, hosts, mirror, optim, sharding
from posttrain.agree import agree, agree_on_run
from posttrain.checkpoint import Checkpoints, is_primary
from posttrain.config import ConfigError, plain_dict
from posttrain.data.cache import Cache
from posttrain.data.plan import Plan
from posttrain.data.prepare import files_of
from posttrain.metrics import Writer
from posttrain.models.nested import join
from posttrain.models.spec import HeadName
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Request, Sampling
from posttrain.train import evaluate, loop
from posttrain.train.config import EvalConfig, ReferenceSync
from posttrain.train.evaluate import HeldOut
from posttrain.train.export import Story, leave
from posttrain.train.first_lines import say
from posttrain.train.model import Model, open_model, use_compile_cache
from posttrain.train.offline import OfflineSource, step_size
from posttrain.train.parts import Parts
from posttrain.train.reference import ReferenceMode, References, make_references
from posttrain.train.rewards import HeldOutPairs
from posttrain.train.starting import keep_frozen
from posttrain.train.state import TrainState, abstract, new_state
from posttrain.train.step import train_step_fn
from posttrain.train.sync import with_reference
from posttrain.train.trainable import describe
from posttrain.types import DataKind


def run(
    cfg: Any,
    devices: Sequence[Any] | None = None,
    *,
    kind: DataKind = "samples",
    reference: ReferenceMode | ReferenceSync | None = None,
    head: HeadName = "lm",
) -> int:
    """A whole run of an offline job, on all devices or those given; its exit code.

    cfg: the Config of posttrain.jobs.sft, preference or reward_model. kind: what its data are.
    reference: where the log-probs of the parameters that training starts from come from, of which
    the loss may make use, or how the reference follows what is trained; None: there is none.
    head: what the model ends in; a score head that its folder lacks is made.
    """
    with loop.stops_at_once():
        return _run(cfg, devices, kind, reference, head)


def _run(
    cfg: Any,
    devices: Sequence[Any] | None,
    kind: DataKind,
    mode: ReferenceMode | ReferenceSync | None,
    head: HeadName,
) -> int:
    began = time.monotonic()
    hosts.init_distributed(cfg.distributed)
    agree_on_run(cfg, cfg.distributed.join_seconds)
    use_compile_cache()
    mesh = sharding.make_mesh(cfg.mesh, devices)
    hosts.refuse_strangers()
    with jax.set_mesh(mesh), folder.at_work(cfg) as cfg:
        resuming = checkpoint.open_run(cfg.run_dir, cfg, cfg.checkpoint.resume)
        if cfg.checkpoint.init_from and not resuming:  # asked before anything slow is done
            checkpoint.find_checkpoint(cfg.checkpoint.init_from)
        _refuse_missing_files(cfg)
        model = open_model(cfg, mesh, head=head, new_head=True, lora=cfg.lora, seed=cfg.seed)
        parts = Parts(cfg, mesh, model, kind)
        parts.split(parts.model.params)  # refuses patterns that name nothing before data are read
        refuse_long_rows("data.seq_len", cfg.data.seq_len, parts.model)
        refuse_what_has_no_use(cfg, mesh, parts.model, ("data.seq_len", cfg.data.seq_len))
        if head == "score" and cfg.export:  # what the export would refuse, before training
            parts.model.tokenizer.padding_apart(parts.model.chat.stop_ids)
        cache = parts.prepare(cfg.data, "data.sources")
        # others may copy the prepared data from a store meanwhile
        limit = max(cfg.distributed.join_seconds, 60 * cfg.data.wait_minutes)
        agree({"data": cache.content}, limit)
        checkpoint.same_data(cfg.run_dir, cache.content, resuming)
        steps, epochs = cfg.train.steps, cfg.train.epochs or 1
        length = {"steps": steps} if steps else {"epochs": epochs}
        plan = parts.plan(cache, cfg.data, cfg.batch, **length)
        return _train(parts, cache, plan, mode, resuming, began)


def _refuse_missing_files(cfg: Any) -> None:
    """Of held-out sets too, which are read when all training data are prepared."""
    missing: list[str] = []
    for section, sources in (("data.sources", cfg.data.sources), ("eval.sets", cfg.eval.sets)):
        try:
            files_of(cfg.data.model_copy(update={"sources": sources}), section)
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("\n".join(missing))


def refuse_long_rows(key: str, seq_len: int, model: Model) -> None:
    """ConfigError where rows are longer than the model's context. key: that says how long."""
    if seq_len > model.spec.max_positions:
        hint = "; data.too_long says what becomes of longer examples" if "data" in key else ""
        raise ConfigError(
            f"{key} is {seq_len}, and the model's context is {model.spec.max_positions} "
            f"(max_position_embeddings of {model.folder}/config.json): lower {key}{hint}"
        )


def refuse_what_has_no_use(
    cfg: Any, mesh: jax.sharding.Mesh, model: Model, seq_len: tuple[str, int]
) -> None:
    """Devices that would do what others do, and losses of a router where there is none.

    seq_len: the key that says it, and what it says.
    """
    experts = max(kind.experts for kind in model.spec.kinds)
    wrong = []
    for axis, size, what in (
        ("expert", experts, f"the {experts} experts of {model.folder}"),
        ("context", seq_len[1], "=".join(map(str, seq_len))),
    ):
        if (n := mesh.shape[axis]) > 1 and (size == 0 or size % n):
            said = f"does not divide {what}" if size else f"{model.spec.family} has no experts"
            wrong.append(f"mesh.{axis} is {n}: {said}")
    if not experts:
        wrong += [
            f"train.{name} is {value:g}: {model.spec.family} has no experts, and so no router"
            for name in ("router_balance", "router_z")
            if (value := getattr(cfg.train, name))
        ]
    if wrong:
        raise ConfigError("\n    ".join(wrong))


def _train(
    parts: Parts,
    cache: Cache,
    plan: Plan,
    mode: ReferenceMode | ReferenceSync | None,
    resuming: bool,
    began: float,
) -> int:
    cfg, mesh, model = parts.cfg, parts.mesh, parts.model
    held_out = parts.held_out()
    tx = optim.make_optimizer(cfg.optim, plan.steps)

    @functools.cache
    def starting() -> Any:
        source = cfg.checkpoint.init_from
        return parts.restored(source) if source else model.params

    if mode == "cached" and mirror.is_url(cfg.data.cache_dir) and jax.process_count() > 1:
        raise ConfigError(
            "reference: cached is written by one host and read by all: data.cache_dir must be a "
            "folder that they have mounted, or set reference=live"
        )
    sets = [(cache, plan), *((held.cache, held.plan) for held in held_out)]
    sync = mode if isinstance(mode, ReferenceSync) else None
    computed = None if isinstance(mode, ReferenceSync) else mode
    references = make_references(parts, sets, computed, starting, resuming)
    checkpoints = Checkpoints(cfg.run_dir, cfg.checkpoint, plain_dict(mirror.as_given(cfg)))
    # a resumed run needs what it started from for what is frozen alone
    whole = starting() if not resuming or parts.split(model.params)[1] else model.params
    trained, frozen = parts.split(whole)
    keep_frozen(cfg.run_dir, frozen)
    state = new_state(trained, tx)
    if sync is not None:
        state = with_reference(state)
    known = (model.params, starting() if starting.cache_info().currsize else None)
    if resuming:
        layout = abstract(state)
        free((state, known), but=frozen)
        state = checkpoints.restore(layout)
    else:
        free(known, but=(state, frozen))
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
        sync,
    )
    writer = Writer(cfg.run_dir, cfg.log, primary=is_primary(), resumed_at=start)
    source = OfflineSource(cache, plan, mesh, start, reference=references.stores[0])
    say(cfg, plan, model, mesh, start, began, describe(state.params, frozen) if frozen else None)
    run = loop.Run(
        folder=cfg.run_dir,
        spec=model.spec,
        train_step=step,
        reference=references.live,
        synced=sync is not None,
        frozen=frozen,
        adapters=model.lora is not None,
        source=source,
        total_steps=plan.steps,
        source_names=names,
        checkpoints=checkpoints,
        writer=writer,
        log=cfg.log,
        evaluate=_evaluation(parts, held_out, references, frozen) if held_out else None,
        eval_every=cfg.eval.every,
        tokens_before=sum(step_size(plan, k).tokens for k in range(start)),
        faults=cfg.faults,
        began=began,
        seek=source.seek,
    )
    try:
        state, preempted = loop.train(run, state)
    finally:
        source.close()
        checkpoints.close()
        writer.close()
    if preempted:
        return loop.PREEMPTED
    seen = [
        f"{name}: {', '.join(from_.paths)}, seen {plan.repeats[name]:.4g} times an epoch"
        for name, from_ in cfg.data.sources.items()
    ]
    leave(cfg, model, Story(plan.steps, seen), state.params, frozen)
    return 0


def free(tree: Any, *, but: Any) -> None:
    """Gives back the memory of arrays that somebody still holds and nobody reads again."""
    kept = {id(array) for array in jax.tree.leaves(but)}
    for array in jax.tree.leaves(tree):
        if id(array) not in kept and not array.is_deleted():
            array.delete()


def _evaluation(
    parts: Parts, sets: Sequence[HeldOut | HeldOutPairs], references: References, frozen: Any
) -> Any:
    cfg: EvalConfig = parts.cfg.eval
    stores = references.stores[1:]
    sets = [
        dataclasses.replace(held, reference=store) if isinstance(held, HeldOut) else held
        for held, store in zip(sets, stores, strict=True)
    ]
    tokenizer = parts.model.tokenizer

    def generate(params: Any, prompts: list[list[int]]) -> list[list[int]]:
        model = nnx.merge(parts.model.graphdef, nnx.State(params))
        room = [parts.model.spec.max_positions - len(prompt) for prompt in prompts]
        requests = [
            Request(
                prompt,
                Sampling(
                    max_new_tokens=max(1, min(cfg.max_new_tokens, most)),
                    temperature=cfg.temperature,
                ),
                parts.model.chat.stop_ids,
                seed=parts.cfg.seed << 32 | i,
            )
            for i, (prompt, most) in enumerate(zip(prompts, room, strict=True))
        ]
        found = Engine(model, slots=min(len(prompts), 16)).generate(requests)
        return [completion.tokens for (completion,) in found]

    def measure(state: TrainState, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        params = join(state.params, frozen)
        synced = state.reference is not None
        live = join(state.reference, frozen) if synced else references.live
        for held_out in sets:
            found |= held_out.measure(params, parts.mesh, live)
            if isinstance(held_out, HeldOut) and cfg.samples:
                path = parts.cfg.run_dir / "samples" / f"{step}_{held_out.name}.jsonl"
                evaluate.write_samples(path, held_out, tokenizer, cfg, generate, params)
        return found

    return measure
