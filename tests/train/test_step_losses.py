"""Every preference loss in the train step: rows, micro-batches and devices are layout to all of
them, but for those that say that they couple a micro-batch.

Losses on pairs are tried together, as parts of one mixture whose parts are reported one by one: a
compilation is what costs time here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.fit import with_twins
from posttrain.losses import PAIR_LOSSES
from posttrain.losses.bco import BCO
from posttrain.losses.kto import KTO
from posttrain.losses.mixture import Mixture
from posttrain.types import Example
from tests.train.test_step import PAIRS, SEQ_LEN, FakePairs, assert_same, step

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
    """The answers of FakePairs, each by itself, labelled; with their mismatched twins for KTO."""

    def __init__(self, *, twinned: bool):
        super().__init__(sides=2 if twinned else 1)
        rows = [
            Example(e.tokens, e.loss_weights, label=int(i % 3 > 0))
            for i, e in enumerate(self.examples)
        ]
        if twinned:
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


@pytest.mark.parametrize("made", [KTO, BCO])
def test_losses_on_labelled_answers(folder: Path, made: Any) -> None:
    """What they know of the whole step is the same however many micro-batches it has."""
    data = FakeLabelled(twinned=made().data == "twinned")
    loss = made(beta=0.05, desirable_weight=1.5)
    want = step(folder, (1, 1, 1), loss=loss, data=data, packing="none")
    assert want[0]["loss"].count == 2 * PAIRS
    assert want[0]["kl" if made is KTO else "delta"].value != 0
    for sizes, batch in LAYOUTS if made is KTO else LAYOUTS[1:]:
        assert_same(step(folder, sizes, loss=loss, data=data, **batch), want)


def test_evaluation_knows_the_whole_step_too(folder: Path) -> None:
    data, loss = FakeLabelled(twinned=True), KTO(beta=0.05)
    want, _ = step(folder, (1, 1, 1), loss=loss, data=data, evaluate=True, live=True)
    again = {"accumulate": 3, "evaluate": True, "live": True}
    found, _ = step(folder, (1, 2, 1), loss=loss, data=data, **again)
    assert want["kl"].value > 0
    for name, value in want.items():
        np.testing.assert_allclose(found[name].total, value.total, rtol=1e-5, atol=1e-5)
