"""The first lines of an offline run: what it is, and what may surprise in its config."""

from __future__ import annotations

import time
from typing import Any

import jax

from posttrain import optim
from posttrain.checkpoint import is_primary
from posttrain.data.plan import Plan
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.reinforce import Reinforce
from posttrain.train.model import Model
from posttrain.train.prompts import PromptStream
from posttrain.train.rollout_rows import Shape


def say(
    cfg: Any, plan: Plan, model: Model, mesh: jax.sharding.Mesh, start: int, began: float,
    split: str | None,
) -> None:  # fmt: skip
    """Prints them in process 0. began: by time.monotonic. split: which parameters are trained."""
    if not is_primary():
        return
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    for line in (
        f"model: {model.spec.title}, {model.spec.parameters:,} parameters, {cfg.model.path}",
        *([split] if split else []),
        *_base_lines(cfg),
        f"devices: {jax.device_count()} ({jax.devices()[0].device_kind}), {shape}",
        plan.describe(),
        _head_line(model, plan),
        *coupling_lines(cfg),
        *router_lines(cfg),
        *sync_lines(cfg, plan.steps),
        *(f"learning rate: {warning}" for warning in _rate_warnings(cfg, plan)),
        f"{'continuing at' if start else 'starting at'} step {start}, "
        f"{time.monotonic() - began:.1f} s after the start",
    ):
        print(line, flush=True)


def _base_lines(cfg: Any) -> list[str]:
    if not cfg.lora or (cfg.model.param_dtype, cfg.model.dtype) != ("float32", "bfloat16"):
        return []
    return [
        "base: kept in float32, and multiplied in bfloat16: model.param_dtype=bfloat16 halves it "
        "(adapters stay float32)"
    ]


def _rate_warnings(cfg: Any, plan: Plan) -> list[str]:
    found = optim.warnings(cfg.optim, plan.steps)
    if cfg.job == "sft" and cfg.lora and cfg.optim.lr == optim.OptimConfig().lr:
        found.append(
            f"{cfg.optim.lr:g} is the default, a rate for whole models; adapters take about ten "
            "times as much"
        )
    return found


def router_lines(cfg: Any) -> list[str]:
    """What several micro-batches cost where a router is trained."""
    weighted = cfg.train.router_balance or cfg.train.router_z
    if not weighted or cfg.batch.accumulate == 1:
        return []
    return [
        "router: its losses are of the whole step: a forward pass over the step comes before its "
        f"{cfg.batch.accumulate} micro-batches"
    ]


def sync_lines(cfg: Any, steps: int) -> list[str]:
    """What a reference is that follows too late."""
    sync = cfg.reference_sync if cfg.job == "preference" else None
    if sync is None or sync.every < steps:
        return []
    return [f"reference: it never moves: reference_sync.every is {sync.every} of {steps} steps"]


def coupling_lines(cfg: Any) -> list[str]:
    """What several micro-batches mean to a loss that couples their examples."""
    parts = cfg.batch.accumulate
    if parts == 1 or not isinstance(cfg.loss, PreferenceLoss) or not cfg.loss.coupled:
        return []
    if cfg.loss.coupled == "step":
        said = f"a forward pass over the step comes before its {parts} micro-batches"
        return [f"loss: what couples its examples is of the whole step: {said}"]
    of_all = cfg.batch.examples
    return [
        f"loss: a term is of the examples of its micro-batch together: {parts} micro-batches of "
        f"{of_all / parts:g} are not the loss of one of {of_all}"
    ]


def _head_line(model: Model, plan: Plan) -> str:
    if model.spec.head == "lm":
        return f"vocabulary head: at most {plan.head_budget():,} trained tokens in a shard's rows"
    if model.new_head:
        return f"score head: new, random with standard deviation {model.spec.init_std:g}"
    return "score head: the model's"


def policy_lines(cfg: Any) -> list[str]:
    """What makes the gradient of a run that learns online another than the policy's."""
    lines, sampling = [], cfg.sampling
    plain = type(sampling)()
    odd = [
        f"{name}={getattr(sampling, name)}"
        for name in sorted(
            {*type(sampling).model_fields} - {"max_new_tokens", "temperature", "stop"}
        )
        if getattr(sampling, name) != getattr(plain, name)
    ]
    if odd:
        lines.append(
            f"sampling: answers are drawn with {', '.join(odd)}, and trained on as if without: "
            "tokens that are never drawn are not learned of, and importance ratios are biased"
        )
    if isinstance(cfg.loss, Reinforce) and cfg.round.updates > 1:
        lines.append(
            f"loss: reinforce has no ratio: {cfg.round.updates - 1} of {cfg.round.updates} steps "
            "of a round are off policy, and not corrected"
        )
    return lines


def say_online(
    cfg: Any, model: Model, mesh: jax.sharding.Mesh, shape: Shape, stream: PromptStream,
    steps: int, start: int, began: float,
) -> None:  # fmt: skip
    """Likewise of a run that learns online."""
    if not is_primary():
        return
    devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    round_, rounds = cfg.round, -(-steps // cfg.round.updates)
    every = f"{round_.prompts * round_.answers:,} answers ({round_.prompts} x {round_.answers})"
    rewards = ", ".join(f"{part.weight:g} x {name}" for name, part in cfg.rewards.items())
    warnings = optim.warnings(cfg.optim, steps)
    for line in (
        f"model: {model.spec.title}, {model.spec.parameters:,} parameters, {cfg.model.path}",
        *_base_lines(cfg),
        f"devices: {jax.device_count()} ({jax.devices()[0].device_kind}), {devices}",
        f"task: {cfg.task.name}, {len(stream):,} prompts; reward: {rewards}",
        f"{rounds:,} rounds of {every}, {steps:,} steps: {round_.updates} on each",
        f"rows: {shape.seq_len:,} tokens, {shape.micro_rows} in a micro-batch",
        cfg.kl.line(),
        *policy_lines(cfg),
        *(f"learning rate: {warning}" for warning in warnings),
        f"{'continuing at' if start else 'starting at'} step {start}, "
        f"{time.monotonic() - began:.1f} s after the start",
    ):
        print(line, flush=True)
