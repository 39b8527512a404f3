"""Every loss on pairs: published figures, its paper's formula in float64, the formula's slope."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.losses import PAIR_LOSSES
from posttrain.losses.aot import AOT, AOTUnpaired
from posttrain.losses.bco import BCOPair
from posttrain.losses.cpo import CPO
from posttrain.losses.dpo import DPO, DiscoPOP, RobustDPO, SigmoidNorm
from posttrain.losses.exo import EXOPair
from posttrain.losses.hinge import Hinge
from posttrain.losses.ipo import IPO, SPPOHard
from posttrain.losses.mixture import Mixture, Part
from posttrain.losses.nca import NCAPair
from posttrain.losses.orpo import ORPO
from posttrain.losses.pair_loss import MarginLoss, PairLoss
from posttrain.losses.simpo import SimPO
from posttrain.types import Batch, TokenOutputs
from tests.losses.batches import PAIRS, B, S, T, make, mean, of_sums
from tests.losses.formulas import pair_losses

# torchtune's test of DPO: sums of three pairs, chosen and rejected
POLICY = np.array([[-0.5, -0.1], [-10, -30], [-1, -21]])
REFERENCE = np.array([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
LENGTHS = np.array([[2, 4], [4, 5], [5, 2]])
# beta 0.1; sigmoid and hinge as torchtune prints them, the others by hand from the formulas
FIGURES = {
    "dpo": [0.6931, 0.3133, 0.1269],
    "hinge": [1, 0, 0],
    "nca_pair": [1.386294, 1.195220, 1.122047],
    "bco_pair": [1.386294, 1.004121, 0.855775],
    "robust": [0.693147, 0.188262, -0.123072],
    "exo_pair": [2.761231, 1.276310, 0.458972],
    "sppo_hard": [50, 48.02, 287.62],
    "apo_zero": [1, 0.768412, 0.632557],
    "apo_down": [1, 0.771441, 0.596718],
    "discopop": [0.846574, 0.367879, 0.135335],
    "aot": [0.693147, 0.126928, 0.313262],
    "ipo": [25, 8.970025, 27.7729],
}
OPTIONS = [
    DPO(beta=0.5, label_smoothing=0.2),
    DPO(nll_weight=0.7, ld_alpha=0.4),
    DPO(use_weighting=True, nll_weight=0.3),
    *(DPO(f_divergence=f) for f in ("forward_kl", "js_divergence", "alpha_divergence")),
    IPO(f_divergence="js_divergence", ld_alpha=0.0),
    SigmoidNorm(f_divergence="alpha_divergence", f_alpha=0.8),
    Hinge(beta=0.3, ld_alpha=0.5, use_weighting=True),
    SPPOHard(beta=0.1, use_weighting=True),
    AOT(beta=0.4, label_smoothing=0.1, ld_alpha=0.3),
    AOTUnpaired(beta=0.4, label_smoothing=0.1),
    NCAPair(beta=0.5, ld_alpha=0.2),
    EXOPair(beta=0.3, label_smoothing=0.05),
    RobustDPO(beta=0.3, label_smoothing=0.3),
    SimPO(beta=1.5, gamma=0.3, label_smoothing=0.1),
    CPO(label_smoothing=0.1, nll_weight=0.5),
    ORPO(nll_weight=0.0),
]
NAMES = {made: name for name, made in PAIR_LOSSES.items()}
CASES = [(name, made()) for name, made in PAIR_LOSSES.items()]
CASES += [(NAMES[type(loss)], loss) for loss in OPTIONS]


def said(case: tuple[str, PairLoss]) -> str:
    changed = case[1].model_dump(exclude_defaults=True)
    return " ".join([case[0], *(f"{k}={v}" for k, v in changed.items())])


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures(name: str) -> None:
    loss = PAIR_LOSSES[name].model_validate({"beta": 0.1})
    batch, outputs = of_sums(POLICY, REFERENCE, LENGTHS)
    values = loss(outputs, batch).values[:3]
    np.testing.assert_allclose(
        values, FIGURES[name], rtol=2e-6, atol=5e-5 if name == "dpo" else 2e-6
    )


@pytest.mark.parametrize("case", CASES, ids=map(said, CASES))
def test_value_is_the_formula(case: tuple[str, PairLoss]) -> None:
    name, loss = case
    for seed in range(2):
        batch, outputs = make(seed)
        want = pair_losses(name, loss, batch, outputs)
        terms = loss(outputs, batch)
        real = np.asarray(terms.weights) > 0
        assert real.sum() == PAIRS == terms.weights.sum()
        np.testing.assert_allclose(np.asarray(terms.values)[real], want, rtol=1e-5, atol=1e-6)
        assert np.isfinite(terms.values).all()


@pytest.mark.parametrize("case", CASES, ids=map(said, CASES))
def test_gradient_is_the_formulas_slope(case: tuple[str, PairLoss]) -> None:
    """By every trained token; of tokens that are not, it is 0."""
    name, loss = case
    batch, outputs = make()

    @jax.jit
    def ours(logps: jax.Array) -> jax.Array:
        return mean(loss(dataclasses.replace(outputs, logps=logps), batch))

    found = np.asarray(jax.grad(ours)(outputs.logps))
    logps, step = np.asarray(outputs.logps, np.float64), 1e-5
    slopes = np.zeros((B, T))
    for b, t in np.argwhere(np.asarray(batch.loss_weights) > 0):
        nudge = np.zeros((B, T))
        nudge[b, t] = step
        up, down = (
            pair_losses(name, loss, batch, outputs, logps + sign * nudge).mean() for sign in (1, -1)
        )
        slopes[b, t] = (up - down) / (2 * step)
    assert np.abs(slopes).max() > 0
    np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-6 * np.abs(slopes).max())


def test_every_loss_has_a_formula_and_says_what_it_takes() -> None:
    for name, made in PAIR_LOSSES.items():
        assert made().data == "pairs"
        assert made().coupled == ("micro-batch" if name.startswith("aot") else "")
        assert ("reference_logps" in made().needs) == (name not in ("simpo", "orpo", "cpo"))
    assert "log_sum_sq" in DPO(use_weighting=True).needs
    assert "log_sum_sq" not in DPO().needs


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    made = {"dpo": DPO(nll_weight=1), "bco_pair": BCOPair(use_weighting=True)}
    weights = {"dpo": 0.8, "bco_pair": 0.2}
    parts = [
        {"weight": weights[name], "loss": {"type": name, **loss.model_dump()}}
        for name, loss in made.items()
    ]
    mixture = Mixture.model_validate({"parts": parts})
    assert mixture.needs == made["bco_pair"].needs
    batch, outputs = make()
    terms = mixture(outputs, batch)
    alone = {name: pair_losses(name, loss, batch, outputs) for name, loss in made.items()}
    want = sum(weights[name] * values for name, values in alone.items())
    np.testing.assert_allclose(np.asarray(terms.values)[:PAIRS], want, rtol=1e-5)
    for k, name in enumerate(made):
        found = terms.metrics[f"loss_parts/{k}_{name}"].value
        assert found == pytest.approx(alone[name].mean(), rel=1e-5)
    assert terms.metrics["rewards/margins"].value == pytest.approx(
        made["dpo"](outputs, batch).metrics["rewards/margins"].value
    )
    assert mixture.coupled == ""
    assert Mixture.model_validate({"parts": [{"loss": {"type": "aot"}}, *parts]}).coupled


def test_a_part_is_made_of_its_pairs_alone() -> None:
    class OfTheStep(DPO):
        def statistic(self) -> dict[str, float]:
            return {}

    with pytest.raises(ValueError, match="OfTheStep needs a statistic of the step: use it alone"):
        Part(loss=OfTheStep())


def test_sorting_leaves_out_what_is_no_pair() -> None:
    """A micro-batch has room for more pairs than it holds: what stands there has no part in AOT."""
    batch, outputs = make()
    pairs = range(4)
    few = np.isin(np.asarray(batch.pair_ids), pairs)
    part = dataclasses.replace(
        batch,
        pair_ids=jnp.where(few, batch.pair_ids, -1),
        example_ids=jnp.where(few, batch.example_ids, -1),
    )
    for name in ("aot", "aot_unpaired"):
        loss = PAIR_LOSSES[name]()
        terms = loss(outputs, part)
        want = pair_losses(name, loss, part, outputs)
        assert terms.weights.sum() == len(pairs)
        np.testing.assert_allclose(np.asarray(terms.values)[: len(pairs)], want, rtol=1e-5)


def test_a_longer_answers_tail_counts_by_ld_alpha() -> None:
    """LD-DPO by hand: 3 tokens against 5, of which the last two count half."""
    batch, outputs = of_sums(
        np.array([[-3.0, -10.0]]), np.array([[-6.0, -5.0]]), np.array([[3, 5]])
    )
    terms = DPO(beta=1.0, ld_alpha=0.5)(outputs, batch)
    margin = (-3 + 6) - (-10 + 5) * (3 + 0.5 * 2) / 5
    assert terms.metrics["rewards/margins"].value == pytest.approx(margin)
    whole = DPO(beta=1.0, ld_alpha=1.0)(outputs, batch)
    assert whole.metrics["rewards/margins"].value == pytest.approx(8)


@pytest.mark.parametrize(
    "loss", [DPO(f_divergence=f) for f in ("forward_kl", "alpha_divergence")] + [DiscoPOP()]
)
@pytest.mark.parametrize("apart", [-900.0, 900.0])
def test_far_ratios_are_finite(loss: MarginLoss, apart: float) -> None:
    """e^900 is no float: neither the loss nor its slope may become inf or NaN."""
    batch, outputs = of_sums(np.array([[apart - 1000, -1000]]), np.array([[-1000.0, -1000.0]]))

    def value(logps: jax.Array) -> jax.Array:
        return mean(loss(dataclasses.replace(outputs, logps=logps), batch))

    found, grad = jax.value_and_grad(value)(outputs.logps)
    assert np.isfinite(found)
    assert np.isfinite(grad).all()


def test_orpo_is_finite_where_the_model_is_certain() -> None:
    batch, outputs = of_sums(np.array([[0.0, -1e-9], [-1e-9, -5.0]]), np.zeros((2, 2)))

    def value(logps: jax.Array, outputs: TokenOutputs, batch: Batch) -> jax.Array:
        return mean(ORPO()(dataclasses.replace(outputs, logps=logps), batch))

    found, grad = jax.value_and_grad(value)(outputs.logps, outputs, batch)
    assert np.isfinite(found)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    "wrong",
    [
        ("exo_pair", {"label_smoothing": 0}),
        ("robust", {"label_smoothing": 0.5}),
        ("aot", {"use_weighting": True}),
        ("nca_pair", {"f_divergence": "js_divergence"}),  # no difference cancels the prompt's term
        ("simpo", {"ld_alpha": 0.5}),
        ("dpo", {"ld_alpha": 1.5}),
        ("dpo", {"f_alpha": 0.3}),  # of a divergence that has none
        ("mixture", {"parts": []}),
        ("mixture", {"parts": [{"loss": {"type": "kto"}}]}),
        ("mixture", {"parts": [{"weight": 0, "loss": {"type": "dpo"}}]}),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(wrong: tuple[str, dict]) -> None:
    name, settings = wrong
    with pytest.raises(ValidationError):
        {**PAIR_LOSSES, "mixture": Mixture}[name].model_validate(settings)


def test_the_room_for_pairs_is_half_the_segments() -> None:
    batch, outputs = make()
    assert all(
        made()(outputs, batch).values.shape == (B * S // 2,) for made in PAIR_LOSSES.values()
    )
