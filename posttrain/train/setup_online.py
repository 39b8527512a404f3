"""Puts a run of `posttrain rl` together: mesh, prompts, model, engine, rewards, steps; runs it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from posttrain import checkpoint, folder, hosts, mirror, optim, sharding
from posttrain.agree import agree_on_run
from posttrain.chat.tokenizer import Tokenizer
from posttrain.checkpoint import Checkpoints, is_primary
from posttrain.config import ConfigError, plain_dict
from posttrain.losses.kl import objective
from posttrain.metrics import Writer
from posttrain.models import read_spec
from posttrain.models.folder import local_folder
from posttrain.models.nested import join
from posttrain.rewards.scorer import Scorer
from posttrain.sampling.engine import Engine
from posttrain.sampling.groups import refuse
from posttrain.sampling.request import RolloutEngine
from posttrain.tools import Tool, open_tools
from posttrain.train import loop
from posttrain.train.answer_scores import score_functions
from posttrain.train.answering import Answering
from posttrain.train.answers import on_first
from posttrain.train.evaluate_online import HeldOutPrompts
from posttrain.train.export import Story, leave
from posttrain.train.first_lines import say_online
from posttrain.train.model import open_model, use_compile_cache
from posttrain.train.online import Judges, OnlineSource
from posttrain.train.online_steps import Critic, make_steps
from posttrain.train.parts import Parts
from posttrain.train.passes import Passes
from posttrain.train.prompts import PromptStream
from posttrain.train.reference import live_reference
from posttrain.train.rollout_rows import Shape
from posttrain.train.setup import free, refuse_long_rows, refuse_what_has_no_use
from posttrain.train.starting import keep_frozen
from posttrain.train.state import TrainState, abstract, new_state
from posttrain.train.step import Forward
from posttrain.types import Prompt

EngineMaker = Callable[[Parts], RolloutEngine]


def our_engine(parts: Parts) -> RolloutEngine:
    """The engine that samples on the mesh that trains."""
    cfg, model = parts.cfg, parts.model
    return Engine(
        nnx.merge(model.graphdef, nnx.State(model.params)),
        slots=cfg.round.slots,
        length=cfg.round.seq_len,
        tokenizer=model.tokenizer,
    )


def run(cfg: Any, devices: Sequence[Any] | None = None, engine: EngineMaker | None = None) -> int:
    """A whole run on all devices or those given; its exit code.

    cfg: the Config of posttrain.jobs.rl. engine: makes what answers prompts; None: ours.
    """
    with loop.stops_at_once():
        return _run(cfg, devices, engine or our_engine)


def _run(cfg: Any, devices: Sequence[Any] | None, make_engine: EngineMaker) -> int:
    began = time.monotonic()
    hosts.init_distributed(cfg.distributed)
    agree_on_run(cfg, cfg.distributed.join_seconds)
    use_compile_cache()
    mesh = sharding.make_mesh(cfg.mesh, devices)
    hosts.refuse_strangers()
    with jax.set_mesh(mesh), folder.at_work(cfg) as cfg:
        resuming = checkpoint.open_run(cfg.run_dir, cfg, cfg.checkpoint.resume)
        if cfg.checkpoint.init_from and not resuming:
            checkpoint.find_checkpoint(cfg.checkpoint.init_from)
        prompts = cfg.task.prompts("train")
        held_out = cfg.task.prompts("held_out") if cfg.eval.prompts else ()
        tools = open_tools(cfg.tools, cfg.task.tools)
        with _scorer(cfg) as scorer:
            model = open_model(cfg, mesh, lora=cfg.lora, seed=cfg.seed)
            parts = Parts(cfg, mesh, model, "samples")
            parts.split(parts.model.params)  # refuses patterns that name nothing
            refuse_long_rows("round.seq_len", cfg.round.seq_len, model)
            refuse_what_has_no_use(cfg, mesh, model, ("round.seq_len", cfg.round.seq_len))
            if cfg.critic is not None and cfg.critic.path:
                refuse_another_vocabulary(cfg, model.tokenizer)
            stream = PromptStream(prompts, cfg.seed, shuffled=cfg.round.order == "shuffle")
            steps = _length(cfg, len(prompts))
            shape = _shape(parts, stream, held_out, tools, steps)
            answering = Answering(
                make_engine(parts),
                model.chat,
                scorer,
                seq_len=cfg.round.seq_len,
                tools=tools,
                max_turns=cfg.tools.max_turns,
            )
            judged = (
                HeldOutPrompts(answering, list(held_out[: cfg.eval.prompts]), cfg)
                if cfg.eval.prompts
                else None
            )
            return _train(parts, shape, stream, answering, judged, steps, resuming, began)


def _scorer(cfg: Any) -> Scorer | nullcontext[None]:
    """Rewards are asked for by process 0 alone: only there are reward models loaded."""
    made: list[Scorer] = []
    on_first(lambda: made.append(Scorer(cfg.rewards, cfg.shaping, score_functions(cfg.rewards))))
    return made[0] if made else nullcontext()


def _length(cfg: Any, prompts: int) -> int:
    """Optimiser steps of the run."""
    if cfg.train.steps:
        return cfg.train.steps
    rounds = -(-prompts * (cfg.train.epochs or 1) // cfg.round.prompts)
    return rounds * cfg.round.updates


def _shape(
    parts: Parts,
    stream: PromptStream,
    held_out: Sequence[Prompt],
    tools: Mapping[str, Tool],
    steps: int,
) -> Shape:
    """What batches look like; refuses prompts that would not fit before anything is sampled."""
    cfg = parts.cfg
    rounds = -(-steps // cfg.round.updates)
    shortest = []
    for split, prompts in (
        ("train", stream.first(rounds * cfg.round.prompts * (1 + cfg.round.resample))),
        ("held_out", held_out[: cfg.eval.prompts]),
    ):
        if prompts:
            length = refuse(
                prompts,
                parts.model.chat,
                cfg.sampling,
                tools,
                cfg.round.seq_len,
                max_turns=cfg.tools.max_turns,
                split=split,
            )
            shortest.append(length)
    return Shape(
        shards=sharding.batch_shards(parts.mesh),
        rows=max(1, cfg.round.micro_tokens // cfg.round.seq_len),
        seq_len=cfg.round.seq_len,
        segments=max(1, cfg.round.seq_len // (shortest[0] + 1)),
    )


def online_forward(parts: Parts, loss: Any, shape: Shape) -> Forward:
    """What a step on sampled answers computes.

    How many tokens of a row were sampled is not known ahead: the head has room for all.
    """
    cfg = parts.cfg
    return Forward(
        parts.model.graphdef,
        loss,
        parts.mesh,
        budget=shape.rows * shape.seq_len,
        head_chunk=cfg.train.head_chunk,
        sources=1,
        router=parts.router,
        temperature=cfg.sampling.temperature,
        ragged=True,
    )


def refuse_another_vocabulary(cfg: Any, policy: Tokenizer) -> None:
    """ConfigError with all that keeps the model of critic.path from reading the policy's ids."""
    folder = local_folder(cfg.critic.path)
    critic, room = Tokenizer.load(folder), read_spec(folder).max_positions
    if cfg.model.new_tokens:
        critic = critic.with_added_tokens(list(cfg.model.new_tokens))
    wrong = []
    # one token more, as a reward model's for padding, is in nobody's way
    other = [
        i for i in range(policy.size) if i >= critic.size or critic.token(i) != policy.token(i)
    ]
    if other:
        first = other[0]
        wrong.append(
            f"{len(other):,} of the policy's {policy.size:,} token ids stand for another token or "
            f"none there, the first {first}: {policy.token(first)!r} here, "
            f"{critic.token(first) if first < critic.size else ''!r} there"
        )
    if cfg.round.seq_len > room:
        wrong.append(f"its context is {room}, and round.seq_len {cfg.round.seq_len}")
    if wrong:
        raise ConfigError(
            f"critic.path {folder} cannot judge what the policy writes: "
            + "; ".join(wrong)
            + ": name a model of the policy's kind"
        )


def _critic(parts: Parts, shape: Shape) -> tuple[Critic, Any] | None:
    """The critic's model and its parameters, all of which are trained."""
    cfg = parts.cfg
    if cfg.critic is None:
        return None
    path = cfg.critic.path or cfg.model.path
    named = cfg.model.model_copy(update={"path": path})
    opened = open_model(
        SimpleNamespace(model=named, chat=cfg.chat), parts.mesh, head="value", new_head=True
    )
    other = Parts(cfg.model_copy(update={"lora": None}), parts.mesh, opened, "samples")
    return Critic(cfg.critic, online_forward(other, cfg.critic.loss, shape)), opened.params


def _train(
    parts: Parts,
    shape: Shape,
    stream: PromptStream,
    answering: Answering,
    held_out: HeldOutPrompts | None,
    steps: int,
    resuming: bool,
    began: float,
) -> int:
    cfg, mesh, model = parts.cfg, parts.mesh, parts.model

    @functools.cache
    def starting() -> Any:
        source = cfg.checkpoint.init_from
        return parts.restored(source) if source else model.params

    reference = live_reference(parts, starting, resuming) if cfg.kl.coef else None
    checkpoints = Checkpoints(cfg.run_dir, cfg.checkpoint, plain_dict(mirror.as_given(cfg)))
    whole = starting() if not resuming or parts.split(model.params)[1] else model.params
    trained, frozen = parts.split(whole)
    keep_frozen(cfg.run_dir, frozen)
    tx = optim.make_optimizer(cfg.optim, steps)
    state = new_state(trained, tx)
    critic = _critic(parts, shape)
    if critic is not None:
        state = dataclasses.replace(state, critic=new_state(critic[1], critic[0].optimizer(steps)))
    known = (model.params, starting() if starting.cache_info().currsize else None)
    saved: dict[str, Any] = {}
    if resuming:
        layout = abstract(state)
        free((state, known), but=(frozen, reference))
        state = checkpoints.restore(layout)
        saved = checkpoints.source(int(state.step))
    else:
        free(known, but=(state, frozen, reference))
    start = int(state.step)
    if start > steps:
        raise ConfigError(
            f"{cfg.run_dir} is at step {start}, past the {steps} steps this config asks for"
        )
    forward = online_forward(parts, objective(cfg.loss, cfg.kl, cfg.sampling.max_new_tokens), shape)
    room = shape.micro_batches(cfg.round.prompts * cfg.round.answers)
    judges = Judges(
        logps=Passes(forward, shape, mesh, room),
        frozen=frozen,
        reference=reference,
        values=critic and Passes(critic[0].forward, shape, mesh, room, values=True),
    )
    source = OnlineSource(
        cfg, mesh, stream, answering, judges, shape, right=cfg.right, start=start, saved=saved
    )
    step = make_steps(cfg, forward, tx, steps, state, critic and critic[0])
    writer = Writer(cfg.run_dir, cfg.log, primary=is_primary(), resumed_at=start)
    say_online(cfg, model, mesh, shape, stream, steps, start, began)
    evaluate = None if held_out is None else functools.partial(_measure, held_out, frozen)
    run = loop.Run(
        folder=cfg.run_dir,
        spec=model.spec,
        train_step=lambda state, batch, _, frozen: step(state, batch, frozen),
        reference=None,
        synced=False,
        frozen=frozen,
        adapters=model.lora is not None,
        source=source,
        total_steps=steps,
        source_names=[cfg.task.name],
        checkpoints=checkpoints,
        writer=writer,
        log=cfg.log,
        evaluate=evaluate,
        eval_every=cfg.eval.every,
        tokens_before=source.tokens,
        faults=cfg.faults,
        began=began,
    )
    try:
        if evaluate is not None and cfg.eval.first and not start:
            found = evaluate(state, 0)
            writer.write(0, found)
            if is_primary():
                print(loop.evaluation_line(0, found), flush=True)
        state, preempted = loop.train(run, state)
    finally:
        source.close()
        checkpoints.close()
        writer.close()
    if preempted:
        return loop.PREEMPTED
    seen = f"{cfg.task.name}: {len(stream):,} prompts, {cfg.round.answers} answers to each"
    leave(cfg, model, Story(steps, [seen]), state.params, frozen)
    return 0


def _measure(
    held_out: HeldOutPrompts, frozen: Any, state: TrainState, step: int
) -> dict[str, float]:
    return held_out.measure(join(state.params, frozen), step)
