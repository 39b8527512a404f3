"""The one train step, and its twin that only evaluates.

A step takes a Batch of A micro-batches. Losses and metrics travel as (total, count); gradients of
totals are added up in float32 and divided by the count once: accumulation, packing, the mesh and
the number of hosts add the same numbers in another order, and change nothing else. What a
micro-batch has to know of the others is made in a forward pass over all of them before.
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
from posttrain.models.dropout import Dropout, hashed
from posttrain.models.head import token_outputs
from posttrain.models.moe import NO_ROUTER, RouterWeights, router_loss
from posttrain.models.nested import join
from posttrain.optim import Schedule
from posttrain.train.config import ReferenceSync
from posttrain.train.state import TrainState
from posttrain.train.sync import mixed
from posttrain.types import Batch, Extremes, Mean, Routing, Statistic, Terms, TokenOutputs


@runtime_checkable
class Coupled(Protocol):
    """A loss whose terms depend on a statistic of all examples of the step.

    `statistic` makes one micro-batch's part of it; parts are added up, and the sum, without a
    gradient, is the third argument of the loss.
    """

    needs: frozenset[str]

    def statistic(self, outputs: TokenOutputs, batch: Batch, /) -> Statistic: ...

    def __call__(self, outputs: TokenOutputs, batch: Batch, statistic: Statistic, /) -> Terms: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """What one micro-batch has to know of all of the step's; parts add up.

    statistic: of a Coupled loss. routing and count (of the loss): where routers are trained by
    losses of their own.
    """

    statistic: Statistic | None = None
    routing: Routing | None = None
    count: Any = None


@dataclass(frozen=True)
class Forward:
    """All that is static in computing a loss: the model's structure, the loss, the head's budget.

    budget: trained positions that one shard's rows of one micro-batch hold at the most.
    temperature: log-probabilities are of softmax(logits / temperature), as answers were sampled.
    router: weights of the losses of a mixture's router, which are trained beside the loss and not
    in the `loss` that is reported; their means are over all real tokens of the step. dropout: the
    seed of adapters' dropout, None where there is none; key: of the update under way. ragged:
    micro-batches at the end of a step may be empty, and are passed over.
    """

    graphdef: Any
    loss: Any  # one of the registries in losses
    mesh: jax.sharding.Mesh
    budget: int
    head_chunk: int
    sources: int
    router: RouterWeights = NO_ROUTER
    dropout: int | None = None
    key: Any = None
    temperature: float = 1.0
    ragged: bool = False

    def at(self, step: jax.Array) -> Forward:
        """In update `step` of training: with dropout, a function of seed and step alone."""
        if self.dropout is None:
            return self
        return dataclasses.replace(self, key=hashed(self.dropout, step))

    def _dropout(self, micro: Batch) -> Dropout | None:
        if self.key is None:
            return None
        segments = jnp.maximum(micro.segment_ids - 1, 0)
        examples = jnp.take_along_axis(micro.example_ids, segments, axis=1)
        return Dropout(self.key, examples, micro.positions)

    def __call__(
        self, params: Any, micro: Batch, reference: Any = None, whole: Whole | None = None
    ) -> tuple[Mean, Metrics]:
        """(what is trained, metrics) of one micro-batch [B, T].

        `reference`: the parameters of a live reference, whose log-probabilities take the place of
        micro.reference_logps where the loss needs them. `whole`: of the whole step; None where the
        step has this one micro-batch.
        """
        micro = self._referenced(micro, reference)
        outputs = self.outputs(params, micro, self.loss.needs)
        whole = jax.lax.stop_gradient(self._whole(outputs, micro) if whole is None else whole)
        terms = self._terms(outputs, micro, whole.statistic)
        loss = Mean((terms.values * terms.weights).sum(), _counts(terms).sum())
        metrics = {**terms.metrics, "loss": loss, "loss_by_source": self._by_source(terms)}
        if outputs.routing is not None:
            metrics["routing"] = outputs.routing
            if whole.routing is not None:  # a mean, among totals that the count divides
                beside = router_loss(outputs.routing, whole.routing, self.router)
                loss = Mean(loss.total + whole.count * beside, loss.count)
        return loss, metrics

    def whole(self, params: Any, batch: Batch, reference: Any) -> Whole | None:
        """What has to be known of a step of several micro-batches: a pass over them all.

        None where nothing has, and where there is one, whose outputs serve for both.
        """
        coupled = isinstance(self.loss, Coupled) or self.router != NO_ROUTER
        if not coupled or batch.tokens.shape[0] == 1:
            return None
        return self.part_of_whole(params, batch, reference)

    def part_of_whole(self, params: Any, batch: Batch, reference: Any) -> Whole:
        """What these micro-batches add to it."""

        def part(micro: Batch) -> Whole:
            micro = self._referenced(micro, reference)
            return self._whole(self.outputs(params, micro, self.loss.needs), micro)

        return _sum_over_micro_batches(part, batch, ragged=self.ragged)

    def _whole(self, outputs: TokenOutputs, micro: Batch) -> Whole:
        """One micro-batch's part of it."""
        loss = self.loss
        statistic = loss.statistic(outputs, micro) if isinstance(loss, Coupled) else None
        if self.router == NO_ROUTER:
            return Whole(statistic)
        # how many terms there are is no matter of the statistic: a part of it will do
        count = _counts(self._terms(outputs, micro, statistic)).sum()
        return Whole(statistic, outputs.routing, count)

    def _terms(self, outputs: TokenOutputs, micro: Batch, statistic: Statistic | None) -> Terms:
        coupled = () if statistic is None else (jax.lax.stop_gradient(statistic),)
        return self.loss(outputs, micro, *coupled)

    def _referenced(self, micro: Batch, reference: Any) -> Batch:
        """The micro-batch with what a live reference says, where the loss needs it."""
        if reference is None or "reference_logps" not in self.loss.needs:
            return micro
        plain = dataclasses.replace(self, key=None)
        said = plain.outputs(jax.lax.stop_gradient(reference), micro)
        # No log-prob is over 1: the tokens stay, and depend on what the reference said, so that the
        # policy's pass comes after its pass. Side by side, each may wait on some devices of a CPU
        # for a collective of the other.
        tokens = jnp.where(said.logps.max() > 1, 0, micro.tokens)
        return dataclasses.replace(micro, tokens=tokens, reference_logps=said.logps)

    def outputs(
        self, params: Any, micro: Batch, needs: frozenset[str] = frozenset()
    ) -> TokenOutputs:
        """What a model of these parameters says of the trained tokens: logps, and more by needs.

        A reward model says one thing of each segment, its score; a critic one of each token.
        """
        model = nnx.merge(self.graphdef, params)
        hidden_BTD, routing = model.routed(
            micro.tokens, micro.positions, micro.segment_ids, self._dropout(micro)
        )
        if model.spec.head == "score":
            segments = micro.example_ids.shape[-1]
            scores = model.scores(hidden_BTD, micro.segment_ids, segments)
            return TokenOutputs(scores=scores, routing=routing)
        if model.spec.head == "value":
            values = model.values(hidden_BTD, micro.segment_ids)
            return TokenOutputs(values=values, routing=routing)
        said = token_outputs(
            hidden_BTD,
            model.head_kernel(),
            micro.tokens,
            micro.segment_ids,
            micro.loss_weights,
            mesh=self.mesh,
            budget=self.budget,
            vocab_size=model.spec.vocab_size,
            softcap=model.spec.final_softcap,
            temperature=self.temperature,
            chunk=self.head_chunk,
            entropy="entropy" in needs,
            correct="correct" in needs,
            log_sum_sq="log_sum_sq" in needs,
        )
        return dataclasses.replace(said, routing=routing)

    def _by_source(self, terms: Terms) -> Mean:
        """The loss of each data source apart: totals and counts of shape [sources]."""
        values, counts = terms.values * terms.weights, _counts(terms)
        of = [terms.source_ids == source for source in range(self.sources)]
        totals = jnp.stack([jnp.where(here, values, 0.0).sum() for here in of])
        return Mean(totals, jnp.stack([jnp.where(here, counts, 0.0).sum() for here in of]))


def _counts(terms: Terms) -> Any:
    """What each term adds to what the loss's total is divided by."""
    return terms.weights if terms.count is None else terms.count


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
        params: Any, now: Forward, micro: Batch, reference: Any, frozen: Any, whole: Whole | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        loss, metrics = now(join(params, frozen), micro, reference, whole)
        return loss.total, (loss.count, metrics)

    def micro_grads(params: Any, *others: Any) -> tuple[Any, jax.Array, Metrics]:
        run = jax.value_and_grad(total, has_aux=True)
        (_, (count, metrics)), grads = run(params, *others)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, layout.params), count, metrics

    def step(
        state: TrainState, batch: Batch, reference: Any = None, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        if state.reference is not None:
            reference = join(state.reference, frozen)
        now = forward.at(state.step)
        whole = now.whole(join(state.params, frozen), batch, reference)
        grads, count, metrics = _sum_over_micro_batches(
            lambda micro: micro_grads(state.params, now, micro, reference, frozen, whole),
            batch,
            ragged=forward.ragged,
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
    """Jitted (params, batch, reference=None, whole=None) -> metrics as sums, to be added over
    batches. whole: what has to be known of all of them (`whole_fn`); None: of the batch alone."""
    forward = dataclasses.replace(forward, router=NO_ROUTER)  # whose losses train alone

    def step(
        params: Any, batch: Batch, reference: Any = None, whole: Whole | None = None
    ) -> Metrics:
        whole = forward.whole(params, batch, reference) if whole is None else whole
        return _sum_over_micro_batches(
            lambda micro: forward(params, micro, reference, whole)[1], batch
        )

    return jax.jit(step, out_shardings=sharding.replicated(forward.mesh))


def whole_fn(forward: Forward) -> Callable[..., Whole] | None:
    """Jitted (params, batch, reference=None) -> the batch's part of what a loss has to know of a
    held-out set, to be added over batches. None: it couples no examples."""
    if not isinstance(forward.loss, Coupled):
        return None
    forward = dataclasses.replace(forward, router=NO_ROUTER)

    def part(params: Any, batch: Batch, reference: Any = None) -> Whole:
        return forward.part_of_whole(params, batch, reference)

    return jax.jit(part, out_shardings=sharding.replicated(forward.mesh))


def _sum_over_micro_batches(
    function: Callable[[Batch], Any], batch: Batch, *, ragged: bool = False
) -> Any:
    """Adds function(micro-batch) over the leading axis, one micro-batch in memory at a time.

    ragged: over those before the first that is all padding.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return function(first)
    nothing = jax.tree.map(_nothing, jax.eval_shape(function, first), is_leaf=_merges)

    def add(acc: Any, micro: Batch) -> tuple[Any, None]:
        return added(acc, function(micro)), None

    if ragged:
        live = (batch.segment_ids > 0).any((1, 2)).sum()
        return jax.lax.fori_loop(
            0, live, lambda i, acc: add(acc, jax.tree.map(lambda x: x[i], batch))[0], nothing
        )
    return jax.lax.scan(add, nothing, batch)[0]


def added(a: Any, b: Any) -> Any:
    """Sums of two parts, leaf by leaf; what is no sum, as it is added itself."""
    return jax.tree.map(operator.add, a, b, is_leaf=_merges)


def _merges(value: Any) -> bool:
    """Whether it is no array, but knows itself how it is added."""
    return isinstance(value, Extremes)


def _nothing(like: Any) -> Any:
    """What added to a value leaves it as it is."""
    if isinstance(like, Extremes):
        return Extremes(*(jnp.full_like(like.low, sign * jnp.inf) for sign in (1, -1)))
    return jnp.zeros(like.shape, like.dtype)
