"""The programs that a job compiles, with abstract arguments: nothing is allocated, nothing is read
but config.json (and the tokenizer, where there is one).

They are the job's own: the step of train/step.py, made of the parts that a run makes it of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from posttrain import optim, sharding
from posttrain.losses.kl import objective
from posttrain.models.nested import join
from posttrain.models.spec import Spec
from posttrain.plan.assumed import batch_of, plan_of_a_step, rollouts_of
from posttrain.plan.hlo import Bounds
from posttrain.train.config import ReferenceSync
from posttrain.train.model import open_abstract
from posttrain.train.offline import step_size
from posttrain.train.parts import Parts
from posttrain.train.reference import abstract_live_copy
from posttrain.train.rollout_rows import Shape
from posttrain.train.setup import refuse_long_rows, refuse_what_has_no_use
from posttrain.train.setup_online import online_forward
from posttrain.train.state import TrainState, new_abstract_state
from posttrain.train.step import train_step_fn
from posttrain.train.throughput import StepSize, train_flops

UNKNOWN_STEPS = 1000
"""Of a run whose length follows from its data: what the schedule of learning rates is made for."""


@dataclass(frozen=True)
class Program:
    """A jitted function and its abstract arguments.

    held: what stays on the device (parameters, optimiser, ...); beside: the names of those among it
    that are no arguments of this program, but of another of the job's. trained: what has
    gradients while it runs. flops: that all devices together need for it by
    train/throughput.py's convention; None: that convention says nothing of it. tokens: that it
    reads.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    held: Mapping[str, Any]
    tokens: int
    keywords: Mapping[str, Any] = field(default_factory=dict)
    trained: Any = None
    beside: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    flops: float | None = None


@dataclass(frozen=True)
class Job:
    """What a config's job compiles on a mesh. assumed: lines on what was not known.

    rows: of a micro-batch on one device. steps: of the run; None: its data say that.
    """

    mesh: jax.sharding.Mesh
    spec: Spec
    programs: tuple[Program, ...]
    assumed: tuple[str, ...]
    rows: int
    steps: int | None


def offline(
    cfg: Any, devices: list[Any], *, setup: Mapping[str, Any], example_tokens: int | None = None
) -> Job:
    """Of sft, preference and reward_model. setup: as posttrain.train.setup.run takes it.

    example_tokens: mean length of an example; None: a row's. ConfigError as a run raises it.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    kind, head = setup.get("kind", "samples"), setup.get("head", "lm")
    mode, seq_len = setup.get("reference"), cfg.data.seq_len
    with jax.set_mesh(mesh):
        model = open_abstract(cfg, mesh, head=head, new_head=True, lora=cfg.lora)
        parts = Parts(cfg, mesh, model, kind)
        trained, frozen = parts.split(model.params)
        refuse_long_rows("data.seq_len", seq_len, model)
        refuse_what_has_no_use(cfg, mesh, model, ("data.seq_len", seq_len))
        tokens = min(example_tokens or seq_len, seq_len)
        shards = sharding.batch_shards(mesh)
        plan = plan_of_a_step(cfg.batch, kind, seq_len=seq_len, tokens=tokens, shards=shards)
        steps = cfg.train.steps or UNKNOWN_STEPS
        tx = optim.make_optimizer(cfg.optim, steps)
        state = new_abstract_state(trained, tx)
        asks = mode is not None and "reference_logps" in cfg.loss.needs
        sync = mode if isinstance(mode, ReferenceSync) else None
        live = None
        if sync is not None:
            state = TrainState(state.step, state.params, state.opt_state, trained)
        elif asks and mode == "live":
            live = join(abstract_live_copy(trained, cfg.model.dtype), frozen)
        step = train_step_fn(
            parts.forward(plan, len(cfg.data.sources)),
            tx,
            optim.schedule(cfg.optim, steps),
            cfg.optim.clip_norm,
            state,
            sync,
        )
        batch = batch_of(plan, mesh, reference=asks and mode == "cached")
    held = {"parameters": model.params, "optimiser": state.opt_state, "batch": batch}
    if sync is not None or live is not None:
        held["reference"] = (
            trained if sync is not None else abstract_live_copy(trained, cfg.model.dtype)
        )
    size = step_size(plan, 0)
    program = Program(
        "train step",
        step,
        (state, batch, live, frozen),
        held,
        size.tokens,
        trained=trained,
        flops=train_flops(
            model.spec,
            size,
            live_reference=sync is not None or live is not None,
            adapters=model.lora is not None,
        ),
    )
    known = (
        f"each example has {tokens:,} tokens"
        + ("" if example_tokens else " (a full row: --example-tokens N says otherwise)")
        + ", all of them trained"
    )
    rows = plan.micro_rows // shards
    step_said = (
        f"a step is {plan.rows:,} rows x {seq_len:,} tokens in {cfg.batch.accumulate} "
        f"micro-batch(es): {rows} row(s) a device at a time"
    )
    return Job(mesh, model.spec, (program,), (step_said, known), rows, cfg.train.steps)


def online(cfg: Any, devices: list[Any]) -> Job:
    """Of rl: the policy's train step, and the critic's where there is one. Of both the parameters
    and optimisers, and a reference, are there all the time.

    ConfigError as a run raises it.
    """
    mesh, length = sharding.make_mesh(cfg.mesh, devices), cfg.round.seq_len
    steps = cfg.train.steps or UNKNOWN_STEPS
    shape = Shape(
        shards=sharding.batch_shards(mesh),
        rows=max(1, cfg.round.micro_tokens // length),
        seq_len=length,
        segments=1,
    )
    answers = -(-cfg.round.prompts * cfg.round.answers // cfg.round.steps)
    room = shape.micro_batches(answers)
    fields = ["advantages"] + ["old_logps"] * (cfg.round.updates > 1)
    fields += ["reference_logps"] * bool(cfg.kl.coef)
    fields += ["returns", "old_values"] * (cfg.critic is not None)
    size = StepSize(
        examples=answers,
        trained=answers * cfg.sampling.max_new_tokens,
        positions=room * shape.micro_rows * length,
        segments=np.full(answers, length, np.int64),
    )
    held: dict[str, Any] = {}
    programs = []

    def add(name: str, parts: Parts, loss: Any, cfg: Any) -> None:
        """cfg: what has `optim`, of the policy or of its critic."""
        trained, frozen = parts.model.params, {}  # of a critic all is trained
        if name == "policy":
            trained, frozen = parts.split(parts.model.params)
        tx = optim.make_optimizer(cfg.optim, steps)
        state = new_abstract_state(trained, tx)
        forward = online_forward(parts, loss, shape)
        rate = optim.schedule(cfg.optim, steps)
        step = train_step_fn(forward, tx, rate, cfg.optim.clip_norm, state)
        which = "" if name == "policy" else f"{name}'s "
        held.update({f"{which}parameters": parts.model.params})
        held.update({f"{which}optimiser": state.opt_state})
        adapters = parts.model.lora is not None
        programs.append(
            Program(
                f"{name}'s train step",
                step,
                (state, batch, None, frozen),
                held,
                size.tokens,
                trained=trained,
                bounds=Bounds(other=room),
                flops=train_flops(parts.model.spec, size, adapters=adapters),
            )
        )

    with jax.set_mesh(mesh):
        model = open_abstract(cfg, mesh, lora=cfg.lora)
        refuse_long_rows("round.seq_len", length, model)
        refuse_what_has_no_use(cfg, mesh, model, ("round.seq_len", length))
        parts = Parts(cfg, mesh, model, "samples")
        batch = rollouts_of(shape, room, fields, mesh)
        loss = objective(cfg.loss, cfg.kl, cfg.sampling.max_new_tokens)
        add("policy", parts, loss, cfg)
        if cfg.kl.coef:
            trained = parts.split(model.params)[0]
            held["reference"] = abstract_live_copy(trained, cfg.model.dtype)
        if cfg.critic is not None:
            named = cfg.model.model_copy(update={"path": cfg.critic.path or cfg.model.path})
            asked = SimpleNamespace(model=named, chat=cfg.chat)
            critic = open_abstract(asked, mesh, head="value", new_head=True)
            other = Parts(cfg.model_copy(update={"lora": None}), mesh, critic, "samples")
            add("critic", other, cfg.critic.loss, cfg.critic)
    own = [("parameters", "optimiser"), ("critic's parameters", "critic's optimiser")]
    for number, names in enumerate(own[: len(programs)]):
        beside = tuple(name for name in held if name not in names)
        programs[number] = dataclasses.replace(programs[number], beside=beside)
    held["batch"] = batch
    assumed = (
        f"a step is {answers:,} answers in {room} micro-batch(es) of {shape.micro_rows:,} rows x "
        f"{length:,} tokens: {shape.rows} row(s) a device at a time",
        f"each answer fills a row with its prompt, {cfg.sampling.max_new_tokens:,} tokens of it "
        "sampled; what the sampler needs beside this is not in it",
    )
    return Job(mesh, model.spec, tuple(programs), assumed, shape.rows, cfg.train.steps)
