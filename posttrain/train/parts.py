"""What planning, compiling, evaluating and the reference of an offline run have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from posttrain import sharding
from posttrain.checkpoint import is_primary
from posttrain.config import ConfigError
from posttrain.data.cache import Cache
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig, Plan
from posttrain.data.prepare import prepare
from posttrain.models.moe import RouterWeights
from posttrain.models.nested import Rule, split
from posttrain.train.evaluate import HeldOut
from posttrain.train.model import Model
from posttrain.train.rewards import HeldOutPairs, score_step_fn
from posttrain.train.starting import restored
from posttrain.train.state import abstract
from posttrain.train.step import Forward, eval_step_fn, whole_fn
from posttrain.train.trainable import trained_rule
from posttrain.types import DataKind


@dataclass(frozen=True)
class Parts:
    """A run's config, its devices and its model. kind: what its data are."""

    cfg: Any
    mesh: jax.sharding.Mesh
    model: Model
    kind: DataKind

    def plan(self, cache: Cache, data: DataConfig, batch: BatchConfig, **length: Any) -> Plan:
        """`length`: epochs= or steps=."""
        return Plan(
            cache,
            batch,
            seq_len=data.seq_len,
            seed=self.cfg.seed,
            batch_shards=sharding.batch_shards(self.mesh),
            sources=data.sources,
            kind=self.kind,
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
            router=self.router,
            dropout=self.cfg.seed if self.model.lora and self.model.lora.dropout else None,
        )

    @property
    def router(self) -> RouterWeights:
        """Of the losses of a mixture's router."""
        return RouterWeights(self.cfg.train.router_balance, self.cfg.train.router_z)

    def held_out(self) -> list[HeldOut | HeldOutPairs]:
        """Each evaluation set: one epoch, in order, laid out as training's batches are."""
        sets: list[HeldOut | HeldOutPairs] = []
        for name, source in self.cfg.eval.sets.items():
            data = self.cfg.data.model_copy(update={"sources": {name: source}})
            cache = self.prepare(data, "eval.sets")
            batch = self.cfg.batch.model_copy(update={"order": "sequential"})
            plan = self.plan(cache, data, batch, epochs=1)
            forward = self.forward(plan, 1)
            if self.model.spec.head == "score":
                sets.append(HeldOutPairs(name, cache, plan, score_step_fn(forward)))
            else:
                step, whole = eval_step_fn(forward), whole_fn(forward)
                sets.append(HeldOut(name, cache, plan, step, whole=whole))
        return sets

    def prepare(self, data: DataConfig, section: str) -> Cache:
        return prepare(
            data, self.model.chat, kind=self.kind, is_primary=is_primary(), section=section
        )

    @functools.cached_property
    def rule(self) -> Rule:
        """Which parameters the run trains."""
        adapters = self.model.lora is not None
        rule = trained_rule(self.cfg.train, self.model.params, adapters=adapters)
        if lost := [path for path in self.model.whole if not rule(path)]:
            raise ConfigError(
                f"lora.path: the adapter holds {', '.join(lost)} whole, as trained beside it: add "
                "them to train.trainable, so that this run's adapter holds them too"
            )
        return rule

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen) of all parameters."""
        return split(params, self.rule)

    def restored(self, source: str) -> Any:
        """The parameters of a run's checkpoint, laid out as the model's."""
        return restored(source, abstract(self.model.params), lambda: self.model.params)
