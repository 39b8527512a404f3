"""Every preference loss against TRL's own code, on log-probs that are given: value and gradient.

Its trainers are called unbound, on a stand-in that holds the settings they read, and a model that
says what it was told. So nothing is known here of their formulas.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses import PAIR_LOSSES
from posttrain.losses.apo import APOZeroUnpaired
from posttrain.losses.bco import BCO, BCOPair
from posttrain.losses.dpo import DPO
from posttrain.losses.kto import KTO
from posttrain.types import TWIN, Batch, TokenOutputs
from tests.losses.batches import mean

pytestmark = pytest.mark.parity
torch: Any = pytest.importorskip("torch")
pytest.importorskip("trl")

PAIRS, PROMPT, WIDTH = 5, 3, 12
TRL_NAMES = {"dpo": "sigmoid"}
NO_REFERENCE = ("simpo", "orpo", "cpo")
PLAIN = [(name, made()) for name, made in PAIR_LOSSES.items() if name not in NO_REFERENCE]
MORE = [
    ("robust", {"label_smoothing": 0.3, "beta": 0.5}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("aot", {"label_smoothing": 0.1, "ld_alpha": 0.5}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("discopop", {"tau": 0.2}),
    ("ipo", {"f_divergence": "forward_kl"}),
    ("sigmoid_norm", {"f_divergence": "js_divergence"}),
    ("hinge", {"ld_alpha": 0.25}),
    ("sppo_hard", {"use_weighting": True, "beta": 0.1}),
    ("apo_down", {"ld_alpha": 0.0, "use_weighting": True}),
    *(
        ("dpo", {"f_divergence": f, "ld_alpha": 0.5, "use_weighting": True})
        for f in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
]
CASES = PLAIN + [(name, PAIR_LOSSES[name].model_validate(more)) for name, more in MORE]


@dataclasses.dataclass
class Said:
    """What policy and reference say of the tokens of 2 * PAIRS sequences, chosen ones first: a
    prompt, a completion of 1 to 9 tokens, padding. Position t is about token t."""

    policy: np.ndarray
    reference: np.ndarray
    log_sum_sq: np.ndarray
    completion: np.ndarray  # bool


@pytest.fixture(scope="module")
def said() -> Said:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, WIDTH - PROMPT + 1, 2 * PAIRS)
    at = np.arange(WIDTH)
    completion = (at >= PROMPT) & (at < PROMPT + lengths[:, None])
    some = [np.where(completion, rng.uniform(-4, 0, completion.shape), 0) for _ in range(3)]
    policy, reference, squares = (x.astype(np.float32) for x in some)
    return Said(policy, reference, squares, completion)


def ours(said: Said) -> tuple[Batch, TokenOutputs]:
    """One sequence a row."""
    n = np.arange(2 * PAIRS)
    zeros = np.zeros(said.completion.shape, np.int32)
    batch = Batch(
        tokens=zeros,
        positions=zeros,
        segment_ids=zeros + 1,
        loss_weights=said.completion.astype(np.float32),
        example_ids=n[:, None],
        source_ids=0 * n[:, None],
        pair_ids=(n % PAIRS)[:, None],
        chosen=(n < PAIRS)[:, None],
        reference_logps=said.reference,
    )
    outputs = TokenOutputs(said.policy, said.policy, said.policy, said.log_sum_sq)
    return jax.tree.map(jnp.asarray, (batch, outputs))


class Told(torch.nn.Module):
    """A model that says of the sequences it is given (by their first token) what it was told."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Any, log_sum_sq: Any):
        super().__init__()
        self.logps, self.log_sum_sq = logps, log_sum_sq

    def forward(self, input_ids: Any, **_: Any) -> Any:
        rows = input_ids[:, 0]
        logps, squares = self.logps[rows, 1:], self.log_sum_sq[rows, 1:]
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=squares,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing > 0,
        )


def trainer(policy: Told, reference: Told, **settings: Any) -> Any:
    """A stand-in for TRL's trainers, of one process."""

    def same(x):
        return x

    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=same, gather=same,
            unwrap_model=same, autocast=contextlib.nullcontext,
        ),
        model=policy, ref_model=reference, aux_loss_enabled=False, precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        **settings,
    )  # fmt: skip


def by_dpo_trainer(name: str, loss: Any, said: Said, **more: Any) -> tuple[float, np.ndarray, Any]:
    """(loss, its gradient by the policy's log-probs, its metrics) of DPOTrainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    policy = torch.tensor(said.policy, requires_grad=True)
    squares = torch.tensor(said.log_sum_sq)
    models = (Told(policy, squares), Told(torch.tensor(said.reference), squares))
    settings: Any = {
        "loss_types": [TRL_NAMES.get(name, name)],
        "loss_weights": [1.0],
        "beta": loss.beta,
        "label_smoothing": getattr(loss, "label_smoothing", 0.0),
        "ld_alpha": loss.ld_alpha,
        "use_weighting": loss.use_weighting,
        "f_divergence_type": getattr(loss, "f_divergence", "reverse_kl"),
        "f_alpha_divergence_coef": getattr(loss, "f_alpha", 0.5),
        "args": SimpleNamespace(
            discopop_tau=getattr(loss, "tau", None), gradient_checkpointing_kwargs=None
        ),
    }
    made = trainer(*models, **(settings | more))
    ids = torch.arange(2 * PAIRS)[:, None].expand(-1, WIDTH)
    mask = torch.tensor(said.completion.astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    value = DPOTrainer._compute_loss(made, models[0], inputs, False)
    value.backward()
    metrics = {key: values[-1] for key, values in made._metrics["train"].items()}
    return value.item(), policy.grad.numpy() * said.completion, metrics


def value_and_grad(loss: Any, batch: Batch, outputs: TokenOutputs) -> tuple[float, np.ndarray]:
    def value(logps: jax.Array) -> jax.Array:
        given = dataclasses.replace(outputs, logps=logps)
        if not loss.coupled or loss.coupled == "micro-batch":
            return mean(loss(given, batch))
        return mean(loss(given, batch, jax.lax.stop_gradient(loss.statistic(given, batch))))

    found, grad = jax.value_and_grad(value)(outputs.logps)
    return float(found), np.asarray(grad)


def case_name(case: tuple[str, Any]) -> str:
    return " ".join([case[0], *map(str, case[1].model_dump(exclude_defaults=True).values())])


@pytest.mark.parametrize("case", CASES, ids=map(case_name, CASES))
def test_losses_with_a_reference(case: tuple[str, Any], said: Said) -> None:
    name, loss = case
    value, grad = value_and_grad(loss, *ours(said))
    want, slope, metrics = by_dpo_trainer(name, loss, said)
    assert value == pytest.approx(want, rel=2e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
    batch, outputs = ours(said)
    for key, found in loss(outputs, batch).metrics.items():
        if key.startswith(("rewards", "logps")):
            assert float(found.value) == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key


def test_several_losses_at_once(said: Said) -> None:
    """Their weighted sum; TRL's `sft` part is the mean over the tokens of all pairs, our NLL term
    the mean over pairs of each one's mean: equal where the chosen answers are equally long."""
    from posttrain.losses.mixture import Mixture

    even = dataclasses.replace(said, completion=said.completion.copy())
    even.completion[:PAIRS] = even.completion[0]
    for values in (even.policy, even.reference, even.log_sum_sq):
        values[~even.completion] = 0
    parts = [
        {"weight": 0.8, "loss": {"type": "dpo", "nll_weight": 1.25}},
        {"weight": 0.2, "loss": {"type": "bco_pair"}},
    ]
    value, grad = value_and_grad(Mixture.model_validate({"parts": parts}), *ours(even))
    kinds = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    want, slope, _ = by_dpo_trainer("dpo", DPO(), even, **kinds)
    assert value == pytest.approx(want, rel=2e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [*((name, 0.0) for name in NO_REFERENCE), ("simpo", 0.2), ("cpo", 0.2), ("dpo", 0.2)],
)
def test_losses_without_a_reference(name: str, smoothing: float, said: Said) -> None:
    """TRL's functions of answers' log-probs; the NLL terms differ by what they average over (see
    docs/losses.md) and are left out here. And conservative DPO, which its DPO trainer has not:
    its CPO, of log-ratios."""
    more = {"label_smoothing": smoothing} if smoothing else {}
    loss = PAIR_LOSSES[name].model_validate({"nll_weight": 0, "beta": 0.7, **more})
    value, grad = value_and_grad(loss, *ours(said))
    policy = torch.tensor(said.policy, requires_grad=True)
    mask = torch.tensor(said.completion)
    ratios = policy - torch.tensor(said.reference) if name == "dpo" else policy
    sums = (ratios * mask).sum(1)
    sums = sums if name in ("cpo", "dpo") else sums / mask.sum(1)
    if name == "orpo":
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

        made = trainer(None, None, beta=0.7)  # pyright: ignore[reportArgumentType]
        losses = -ORPOTrainer.odds_ratio_loss(made, sums[:PAIRS], sums[PAIRS:])[0]
    else:
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

        kind = "simpo" if name == "simpo" else "sigmoid"
        more = {"loss_type": kind, "label_smoothing": smoothing, "alpha": 0.0, "simpo_gamma": 1.0}
        made = trainer(None, None, beta=0.7, **more)  # pyright: ignore[reportArgumentType]
        losses = CPOTrainer.cpo_loss(made, sums[:PAIRS], sums[PAIRS:])[0]
    losses.mean().backward()
    slope = policy.grad.numpy() * said.completion  # the model's labels mask the rest
    assert value == pytest.approx(losses.mean().item(), rel=2e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


def test_bco_of_labelled_answers(said: Said) -> None:
    """TRL has it of pairs and without the shift: as many answers of each label as pairs, and
    a reference that has the shift in it."""
    loss = BCO(beta=0.3)
    batch, outputs = ours(said)
    good = np.arange(2 * PAIRS) < PAIRS
    batch = dataclasses.replace(batch, labels=jnp.asarray(good[:, None], jnp.int8))
    value, grad = value_and_grad(loss, batch, outputs)
    ratios = ((said.policy - said.reference) * said.completion).sum(1)
    shift = (ratios[:PAIRS].mean() + ratios[PAIRS:].mean()) / 2
    lengths = said.completion.sum(1, keepdims=True)
    moved = np.where(said.completion, said.reference + shift / lengths, 0).astype(np.float32)
    shifted = dataclasses.replace(said, reference=moved)
    want, slope, _ = by_dpo_trainer("bco_pair", BCOPair(beta=0.3), shifted)
    assert value == pytest.approx(want / 2, rel=2e-6)
    np.testing.assert_allclose(grad, slope / 2, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("kto", KTO()),
        ("kto", KTO(beta=0.5, desirable_weight=1.3, undesirable_weight=0.8)),
        ("apo_zero_unpaired", APOZeroUnpaired(beta=0.3, desirable_weight=1.2)),
    ],
)
@pytest.mark.parametrize("sign", [1, -1], ids=["far", "near"])
def test_losses_on_labelled_answers(name: str, loss: Any, sign: int, said: Said) -> None:
    """The first half of the sequences are rows, the other half their mismatched twins; near: the
    KL is cut off at 0."""
    from trl.trainer.kto_trainer import KTOTrainer

    batch, outputs = ours(said)
    reference = said.reference.copy()
    reference[PAIRS:] = said.policy[PAIRS:] - sign * 0.4 * said.completion[PAIRS:]
    good = np.arange(PAIRS) % 3 > 0
    labels = np.concatenate([good.astype(np.int8), np.full(PAIRS, TWIN, np.int8)])[:, None]
    batch = dataclasses.replace(
        batch, labels=jnp.asarray(labels), reference_logps=jnp.asarray(reference)
    )
    value, grad = value_and_grad(loss, batch, outputs)

    policy, squares = torch.tensor(said.policy, requires_grad=True), torch.tensor(said.log_sum_sq)
    models = (Told(policy, squares), Told(torch.tensor(reference), squares))
    made = trainer(
        *models,
        beta=loss.beta,
        loss_type=name,
        calculate_KL=name == "kto",
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    made._compute_kl_logps = lambda model, given: KTOTrainer._compute_kl_logps(made, model, given)
    ids = torch.arange(2 * PAIRS)[:, None].expand(-1, WIDTH)
    mask = torch.tensor(said.completion.astype(np.int64))
    inputs = {"label": torch.tensor(good)}
    for prefix, part in (("", slice(0, PAIRS)), ("KL_", slice(PAIRS, None))):
        inputs |= {f"{prefix}input_ids": ids[part], f"{prefix}attention_mask": mask[part]}
        inputs[f"{prefix}completion_mask"] = mask[part]
    want = KTOTrainer._compute_loss(made, models[0], inputs, False)
    want.backward()
    slope = policy.grad.numpy() * said.completion  # the model's labels mask the rest
    assert value == pytest.approx(want.item(), rel=2e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
    if name == "kto":
        metrics = {key: values[-1] for key, values in made._metrics["train"].items()}
        assert (metrics["kl"] > 0) == (sign > 0)
        terms = loss(outputs, batch, loss.statistic(outputs, batch))
        for key in ("kl", *(f"{x}/{y}" for x in ("rewards", "logps") for y in ("chosen",))):
            assert float(terms.metrics[key].value) == pytest.approx(metrics[key], rel=1e-5), key
