"""Every preference loss in the train step: rows, micro-batches and devices are layout to all of
them, but for those that say that they couple a micro-batch.

Losses on pairs are tried together, as parts of one mixture whose parts are reported one by one: a
compilation is what costs time here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.data.fit import with_twins
from posttrain.data.plan import BatchConfig, Plan
from posttrain.jobs import preference
from posttrain.losses import PAIR_LOSSES, UNPAIRED_LOSSES
from posttrain.losses.kto import KTO
from posttrain.losses.mixture import Mixture
from posttrain.losses.unpaired import UnpairedLoss
from posttrain.train.evaluate import HeldOut
from posttrain.train.first_lines import coupling_lines, router_lines, sync_lines
from posttrain.train.step import Coupled, Forward, eval_step_fn, whole_fn
from posttrain.types import Batch, DataKind, Example, Mean, Statistic, Terms, TokenOutputs
from tests.models.tiny import mesh_of, open_tiny
from tests.train.test_step import PAIRS, SEQ_LEN, FakePairs, FakeReference, assert_same, step

OPTIONS = [
    {"type": "dpo", "ld_alpha": 0.3, "nll_weight": 0.1},
    {"type": "dpo", "use_weighting": True, "f_divergence": "js_divergence"},
]
OF_MICRO_BATCHES = ["aot", "aot_unpaired"]
OTHERS = [name for name in PAIR_LOSSES if name not in OF_MICRO_BATCHES]
LAYOUTS = [
    ((2, 4, 1), {}),
    ((1, 2, 2), {"accumulate": 4}),
]


def mixture(losses: list[dict[str, Any]]) -> Mixture:
    # SPPO's targets of 500 nats would drown the others' gradients
    settings = [{"beta": 0.2, **loss} if loss["type"] == "sppo_hard" else loss for loss in losses]
    return Mixture.model_validate({"parts": [{"loss": loss} for loss in settings]})


class FakeLabelled(FakePairs):
    """The answers of FakePairs, each by itself, labelled, with their mismatched twins."""

    def __init__(self) -> None:
        super().__init__()
        rows = [
            Example(e.tokens, e.loss_weights, label=int(i % 3 > 0))
            for i, e in enumerate(self.examples)
        ]
        rows = with_twins(rows, [0] * len(rows), 4, SEQ_LEN).examples
        rng = np.random.default_rng(1)
        self.said = []
        for row in rows:  # the policy is above the reference, so that the KL is not cut off
            logps = rng.uniform(-9, -5, int((row.loss_weights > 0).sum()))
            self.said.append(logps.astype(np.float32))
        self.examples = rows
        self.lengths = np.array([len(e.tokens) for e in rows], np.int32)
        self.trained = np.array([len(logps) for logps in self.said], np.int32)
        self.source_ids = np.repeat(np.arange(2 * PAIRS) % 2, self.sides).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def pairs_unpacked(folder: Path) -> tuple[dict[str, Any], Any]:
    loss = mixture([*({"type": name} for name in OTHERS), *OPTIONS])
    return step(folder, (1, 1, 1), loss=loss, packing="none")


@pytest.mark.parametrize(("mesh_sizes", "batch"), LAYOUTS)
def test_losses_on_pairs(
    folder: Path,
    pairs_unpacked: tuple[dict[str, Any], Any],
    mesh_sizes: tuple[int, int, int],
    batch: dict[str, Any],
) -> None:
    """Each part's value, and the gradient of them all."""
    parts = [name for name in pairs_unpacked[0] if name.startswith("loss_parts/")]
    assert len(parts) == len(OTHERS) + len(OPTIONS)
    loss = mixture([*({"type": name} for name in OTHERS), *OPTIONS])
    assert_same(step(folder, mesh_sizes, loss=loss, **batch), pairs_unpacked)


def test_losses_of_a_micro_batch_are_the_same_in_any_rows(folder: Path) -> None:
    loss = mixture([{"type": name} for name in OF_MICRO_BATCHES])
    want = step(folder, (1, 1, 1), loss=loss, packing="none")
    assert_same(step(folder, (2, 4, 1), loss=loss), want)


class Together(UnpairedLoss):
    """Every loss on labelled answers, summed: statistics of their own, each one's value reported.
    Those that need no twins pass over them."""

    data: ClassVar[DataKind] = "twinned"
    coupled: ClassVar[str] = "step"

    def parts(self) -> dict[str, UnpairedLoss]:
        settings = {"beta": 0.05, "desirable_weight": 1.5}
        return {name: made.model_validate(settings) for name, made in UNPAIRED_LOSSES.items()}

    def per_row(self, x: Any) -> Any:
        raise AssertionError("its parts have one")

    def statistic(self, outputs: TokenOutputs, batch: Batch) -> Statistic:
        found: dict[str, Mean] = {}
        for part in self.parts().values():
            found |= part.statistic(outputs, batch) if isinstance(part, Coupled) else {}
        return found

    def __call__(
        self, outputs: TokenOutputs, batch: Batch, statistic: Statistic | None = None
    ) -> Terms:
        given = {True: (statistic,), False: ()}
        made = {
            name: part(outputs, batch, *given[isinstance(part, Coupled)])
            for name, part in self.parts().items()
        }
        metrics = {key: mean for terms in made.values() for key, mean in terms.metrics.items()}
        for name, terms in made.items():
            total = (terms.values * terms.weights).sum()
            metrics[f"loss_parts/{name}"] = Mean(total, terms.weights.sum())
        first, *others = made.values()
        values = sum((terms.values for terms in others), first.values)
        return Terms(values, first.weights, first.source_ids, metrics)


def test_losses_on_labelled_answers(folder: Path) -> None:
    """What they know of the whole step is the same however many micro-batches it has."""
    data = FakeLabelled()
    want = step(folder, (1, 1, 1), loss=Together(), data=data, packing="none")
    assert want[0]["loss"].count == 2 * PAIRS
    assert len([name for name in want[0] if name.startswith("loss_parts/")]) == 3
    assert 0 not in (want[0]["kl"].value, want[0]["delta"].value)
    for sizes, batch in LAYOUTS:
        assert_same(step(folder, sizes, loss=Together(), data=data, **batch), want)


def test_evaluation_knows_the_whole_step_too(folder: Path) -> None:
    data, loss = FakeLabelled(), KTO(beta=0.05)
    want, _ = step(folder, (1, 1, 1), loss=loss, data=data, evaluate=True, live=True)
    again = {"accumulate": 3, "evaluate": True, "live": True}
    found, _ = step(folder, (1, 2, 1), loss=loss, data=data, **again)
    assert want["kl"].value > 0
    for name, value in want.items():
        np.testing.assert_allclose(found[name].total, value.total, rtol=1e-5, atol=1e-5)


def test_held_out_figures_are_of_the_set_and_not_of_its_batches(folder: Path) -> None:
    """What couples examples is of them all: a last batch of two rows has no KL of its own."""
    data, mesh = FakeLabelled(), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        model = open_tiny(folder, "llama", mesh)
        found: list[dict[str, float]] = []
        for batch in ({"examples": 2 * PAIRS}, {"examples": 6, "accumulate": 2}):
            settings = BatchConfig.model_validate({"order": "sequential", **batch})
            plan = Plan(data, settings, seq_len=SEQ_LEN, seed=0, epochs=1)
            forward = Forward(
                model.graph, Together(), mesh, plan.head_budget(), head_chunk=64, sources=2
            )
            held_out = HeldOut("held", data, plan, eval_step_fn(forward), FakeReference(data),
                               whole_fn(forward))  # fmt: skip
            found.append(held_out.measure(nnx.to_pure_dict(model.state), mesh))
    whole, cut = found
    assert whole["eval/held/kl"] > 0
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def config(loss: str, **sections: Any) -> preference.Config:
    given = {"model": {"path": "m"}, "data": {"sources": {"a": {"path": "a"}}}}
    given |= {"loss": {"type": loss}, "batch": {"examples": 8}}
    return preference.Config.model_validate({**given, **sections})


def test_what_accumulation_means_to_a_coupled_loss_is_said() -> None:
    def said(loss: str, accumulate: int) -> list[str]:
        return coupling_lines(config(loss, batch={"examples": 8, "accumulate": accumulate}))

    assert "micro-batch together: 4 micro-batches of 2 are not the loss" in said("aot", 4)[0]
    assert "of the whole step: a forward pass over the step" in said("kto", 2)[0]
    assert said("aot", 1) == said("kto", 1) == said("dpo", 4) == []


def test_what_a_trained_router_costs_is_said() -> None:
    batch = {"examples": 8, "accumulate": 4}
    [line] = router_lines(config("dpo", batch=batch, train={"router_z": 0.001}))
    assert "before its 4 micro-batches" in line
    assert router_lines(config("dpo", batch=batch)) == []
    assert router_lines(config("dpo", train={"router_z": 0.001})) == []


def test_a_reference_that_never_moves_is_told() -> None:
    synced = config("dpo", reference="live", reference_sync={"every": 50})
    assert sync_lines(synced, 50) == [
        "reference: it never moves: reference_sync.every is 50 of 50 steps"
    ]
    assert sync_lines(synced, 51) == sync_lines(config("dpo"), 5) == []
