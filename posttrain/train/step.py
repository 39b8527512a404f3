"""The one train step, and its twin that only evaluates.

A step takes a Batch of A micro-batches. Losses and metrics travel as (total, count); gradients of
totals are added up in float32 and divided by the count once: accumulation, packing, the mesh and
the number of hosts add the same numbers in another order, and change nothing else.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from posttrain import sharding
from posttrain.metrics import Metrics
from posttrain.models.head import token_outputs
from posttrain.models.nested import join
from posttrain.optim import Schedule
from posttrain.train.config import ReferenceSync
from posttrain.train.state import TrainState
from posttrain.train.sync import mixed
from posttrain.types import Batch, Extremes, Mean, Statistic, Terms, TokenOutputs


@runtime_checkable
class Coupled(Protocol):
    """A loss whose terms depend on a statistic of all examples of the step.

    `statistic` makes one micro-batch's part of it; parts are added up, and the sum, without a
    gradient, is the third argument of the loss.
    """

    def statistic(self, outputs: TokenOutputs, batch: Batch, /) -> Statistic: ...


@dataclass(frozen=True)
class Forward:
    """All that is static in computing a loss: the model's structure, the loss, the head's budget.

    budget: trained positions that one shard's rows of one micro-batch hold at the most.
    """

    graphdef: Any
    loss: Any  # one of the registries in losses
    mesh: jax.sharding.Mesh
    budget: int
    head_chunk: int
    sources: int

    def __call__(
        self, params: Any, micro: Batch, reference: Any = None, statistic: Statistic | None = None
    ) -> tuple[Mean, Metrics]:
        """(loss, metrics) of one micro-batch [B, T].

        `reference`: the parameters of a live reference, whose log-probabilities take the place of
        micro.reference_logps where the loss needs them. `statistic`: of a Coupled loss, the whole
        step's; None where the step has this one micro-batch.
        """
        micro = self._referenced(micro, reference)
        outputs = self.outputs(params, micro, self.loss.needs)
        terms: Terms
        if isinstance(self.loss, Coupled):
            statistic = self.loss.statistic(outputs, micro) if statistic is None else statistic
            terms = self.loss(outputs, micro, jax.lax.stop_gradient(statistic))
        else:
            terms = self.loss(outputs, micro)
        loss = Mean((terms.values * terms.weights).sum(), terms.weights.sum())
        return loss, {**terms.metrics, "loss": loss, "loss_by_source": self._by_source(terms)}

    def statistic(self, params: Any, batch: Batch, reference: Any) -> Statistic | None:
        """What a Coupled loss has to know of a step of several micro-batches: a pass over them all.

        None for other losses, and where there is one micro-batch, whose outputs serve for both.
        """
        loss = self.loss
        if not isinstance(loss, Coupled) or batch.tokens.shape[0] == 1:
            return None

        def part(micro: Batch) -> Statistic:
            micro = self._referenced(micro, reference)
            return loss.statistic(self.outputs(params, micro, loss.needs), micro)

        return _sum_over_micro_batches(part, batch)

    def _referenced(self, micro: Batch, reference: Any) -> Batch:
        """The micro-batch with what a live reference says, where the loss needs it."""
        if reference is None or "reference_logps" not in self.loss.needs:
            return micro
        said = self.outputs(jax.lax.stop_gradient(reference), micro)
        return dataclasses.replace(micro, reference_logps=said.logps)

    def outputs(
        self, params: Any, micro: Batch, needs: frozenset[str] = frozenset()
    ) -> TokenOutputs:
        """What a model of these parameters says of the trained tokens: logps, and more by needs.

        A reward model says one thing of each segment: its score.
        """
        model = nnx.merge(self.graphdef, params)
        hidden_BTD = model.hidden(micro.tokens, micro.positions, micro.segment_ids)
        if model.spec.head == "score":
            segments = micro.example_ids.shape[-1]
            return TokenOutputs(scores=model.scores(hidden_BTD, micro.segment_ids, segments))
        return token_outputs(
            hidden_BTD,
            model.head_kernel(),
            micro.tokens,
            micro.segment_ids,
            micro.loss_weights,
            mesh=self.mesh,
            budget=self.budget,
            vocab_size=model.spec.vocab_size,
            softcap=model.spec.final_softcap,
            chunk=self.head_chunk,
            entropy="entropy" in needs,
            correct="correct" in needs,
            log_sum_sq="log_sum_sq" in needs,
        )

    def _by_source(self, terms: Terms) -> Mean:
        """The loss of each data source apart: totals and counts of shape [sources]."""
        weights = [
            jnp.where(terms.source_ids == source, terms.weights, 0.0)
            for source in range(self.sources)
        ]
        totals = jnp.stack([(terms.values * w).sum() for w in weights])
        return Mean(totals, jnp.stack([w.sum() for w in weights]))


def train_step_fn(
    forward: Forward,
    tx: optax.GradientTransformation,
    rate: Schedule,
    clip_norm: float | None,
    state: TrainState,
    sync: ReferenceSync | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Jitted (state, batch, reference=None, frozen=None) -> (state, metrics).

    reference: the parameters of a live reference; None where the loss needs none or batches hold
    what it said. frozen: those of the model that are not in the state; None: there are none.
    The state's buffers are donated; the others are neither changed nor donated.
    sync: how the reference in the state follows the policy, where there is one.

    `state` gives the layout (arrays or abstract): gradients and the new state keep it, so that the
    second call finds the shardings that the first was compiled for. Metrics are of the parameters
    before the update; grad_norm is before clipping.
    """

    layout = jax.tree.map(lambda x: x.sharding, state)

    def total(
        params: Any, micro: Batch, reference: Any, frozen: Any, statistic: Any
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        loss, metrics = forward(join(params, frozen), micro, reference, statistic)
        return loss.total, (loss.count, metrics)

    def micro_grads(params: Any, micro: Batch, *others: Any) -> tuple[Any, jax.Array, Metrics]:
        run = jax.value_and_grad(total, has_aux=True)
        (_, (count, metrics)), grads = run(params, micro, *others)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, layout.params), count, metrics

    def step(
        state: TrainState, batch: Batch, reference: Any = None, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        if state.reference is not None:
            reference = join(state.reference, frozen)
        statistic = forward.statistic(join(state.params, frozen), batch, reference)
        grads, count, metrics = _sum_over_micro_batches(
            lambda micro: micro_grads(state.params, micro, reference, frozen, statistic), batch
        )
        grads = jax.tree.map(lambda g: g / count, grads)
        norm = optax.tree.norm(grads)
        if clip_norm is not None:
            # torch's clip_grad_norm_ and optax agree but for its 1e-6 in the denominator
            scale = jnp.minimum(1.0, clip_norm / norm)
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": norm, "learning_rate": rate(state.step)}
        done, following = state.step + 1, state.reference
        if sync is not None:
            following = mixed(following, params, done, sync)
        return TrainState(done, params, opt_state, following), metrics

    return jax.jit(
        step, donate_argnums=0, out_shardings=(layout, sharding.replicated(forward.mesh))
    )


def eval_step_fn(forward: Forward) -> Callable[..., Metrics]:
    """Jitted (params, batch, reference=None) -> metrics as Means, to be added over batches."""

    def step(params: Any, batch: Batch, reference: Any = None) -> Metrics:
        statistic = forward.statistic(params, batch, reference)
        return _sum_over_micro_batches(
            lambda micro: forward(params, micro, reference, statistic)[1], batch
        )

    return jax.jit(step, out_shardings=sharding.replicated(forward.mesh))


def _sum_over_micro_batches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Adds function(micro-batch) over the leading axis, one micro-batch in memory at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return function(first)
    nothing = jax.tree.map(_nothing, jax.eval_shape(function, first), is_leaf=_merges)

    def add(acc: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(operator.add, acc, function(micro), is_leaf=_merges), None

    return jax.lax.scan(add, nothing, batch)[0]


def _merges(value: Any) -> bool:
    """Whether it is no array, but knows itself how it is added."""
    return isinstance(value, Extremes)


def _nothing(like: Any) -> Any:
    """What added to a value leaves it as it is."""
    if isinstance(like, Extremes):
        return Extremes(*(jnp.full_like(like.low, sign * jnp.inf) for sign in (1, -1)))
    return jnp.zeros(like.shape, like.dtype)
