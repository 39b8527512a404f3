"""Policy losses against TRL's own code, on log-probs that are given: value, gradient and metrics.

Its trainers are called unbound, on a stand-in that holds the settings they read and says what it
was told of the tokens. So nothing is known here of their formulas.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.advantages.base import Signal
from posttrain.advantages.grpo import GRPO
from posttrain.losses.cispo import CISPO
from posttrain.losses.clip import Clip
from posttrain.losses.correction import Correction
from posttrain.losses.kl import KL, Objective
from posttrain.losses.reinforce import Reinforce
from posttrain.types import Batch, Extremes, Mean, TokenOutputs

pytestmark = pytest.mark.parity
torch: Any = pytest.importorskip("torch")
pytest.importorskip("trl")

N, WIDTH, MAX_LENGTH = 6, 12, 20


@dataclasses.dataclass
class Said:
    """Of N completions of 1 to WIDTH tokens, float32 [N, WIDTH]: log-probs by policy, old policy,
    sampler and reference, entropies, and which tokens were sampled (a tool's lie between)."""

    policy: np.ndarray
    old: np.ndarray
    sampled: np.ndarray
    reference: np.ndarray
    entropy: np.ndarray
    mask: np.ndarray
    advantages: np.ndarray  # [N]


@pytest.fixture(scope="module")
def said() -> Said:
    rng = np.random.default_rng(0)
    mask = np.arange(WIDTH) < rng.integers(2, WIDTH + 1, N)[:, None]
    mask &= (rng.random(mask.shape) < 0.8) | (np.arange(WIDTH) == 0)
    old = rng.uniform(-4, -0.5, mask.shape)
    policy, sampled = old + rng.normal(size=(2, *mask.shape)) * 0.3
    given = [policy, old, sampled, old + rng.normal(size=mask.shape), rng.uniform(0, 3, mask.shape)]
    given = [(x * mask).astype(np.float32) for x in given]
    return Said(*given, mask.astype(np.float32), rng.normal(size=N).astype(np.float32))


def ours(said: Said) -> tuple[Batch, TokenOutputs]:
    """A completion a row, after one token of prompt."""

    def pad(x):
        return np.pad(x, ((0, 0), (1, 0)))

    segments, ids = np.ones((N, WIDTH + 1), np.int32), np.arange(N)[:, None]
    batch = Batch(
        segments, segments, segments, pad(said.mask), ids, 0 * ids,
        reference_logps=pad(said.reference), old_logps=pad(said.old),
        sampled_logps=pad(said.sampled), advantages=pad(said.advantages[:, None] * said.mask),
    )  # fmt: skip
    outputs = TokenOutputs(pad(said.policy), pad(said.entropy))
    return jax.tree.map(jnp.asarray, (batch, outputs))


def by_trl(trainer: Any, said: Said, inputs: dict[str, Any], **settings: Any) -> Any:
    """(loss, its gradient by the policy's log-probs, metrics) of a trainer's _compute_loss."""
    policy = torch.tensor(said.policy, requires_grad=True)

    def same(x, **_):
        return x

    made = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, sync_gradients=True),
        model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, max_completion_length=MAX_LENGTH,
        _metrics=defaultdict(lambda: defaultdict(list)), **settings,
    )  # fmt: skip
    made._get_per_token_logps_and_entropies = lambda *_, **__: (
        policy,
        torch.tensor(said.entropy),
        None,
    )
    nothing = torch.zeros((N, 1), dtype=torch.int64)
    mask = torch.tensor(said.mask)
    given = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask.long()}
    given |= {"completion_mask": mask, "advantages": torch.tensor(said.advantages)}
    value = trainer._compute_loss(made, None, given | inputs)
    value.backward()
    metrics = {key: values[-1] for key, values in made._metrics["train"].items()}
    return value.item(), policy.grad.numpy() * said.mask, metrics


def by_grpo_trainer(name: str, loss: Any, kl: KL, said: Said) -> Any:
    from trl.trainer.grpo_trainer import GRPOTrainer

    correction = loss.correction
    apart = np.exp(said.old - said.sampled).astype(np.float32)
    return by_trl(
        GRPOTrainer,
        said,
        {
            "old_per_token_logps": torch.tensor(said.old),
            "ref_per_token_logps": torch.tensor(said.reference),
            "importance_sampling_ratio": torch.tensor(apart).clamp(max=correction.high),
            "num_items_in_batch": torch.tensor(said.mask.sum()),
        },
        loss_type=name,
        importance_sampling_level="token" if loss.ratio == "token" else "sequence",
        beta=kl.coef,
        epsilon_low=loss.low,
        epsilon_high=loss.high,
        use_vllm=correction.type != "none",
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=bool(loss.entropy_coef),
        entropy_coef=loss.entropy_coef,
        args=SimpleNamespace(
            delta=getattr(loss, "dual", None),
            use_bias_correction_kl=kl.unbiased,
            steps_per_generation=1,
        ),
    )


NONE = Correction(type="none")
PLAIN = KL(coef=0.3, unbiased=False)
CASES = [
    ("grpo", Clip(aggregate="sequence", correction=NONE), PLAIN),
    ("grpo", Clip(aggregate="sequence", low=0.1, high=0.28, correction=NONE, dual=1.5), KL()),
    ("dr_grpo", Clip(aggregate="constant", length=MAX_LENGTH, correction=NONE), PLAIN),
    ("bnpo", Clip(correction=NONE, high=0.28, entropy_coef=0.1), PLAIN),
    ("dapo", Clip(correction=Correction(high=1.2), high=0.28), KL()),
    ("dapo", Clip(correction=Correction(high=1.2), high=0.28), PLAIN),
    # GSPO
    ("grpo", Clip(aggregate="sequence", ratio="sequence", correction=NONE, low=0.02), PLAIN),
    ("cispo", CISPO(correction=Correction(high=1.2), high=1.2), PLAIN),
    # its KL with the ratio's gradient through it is ours, in value and in gradient
    ("bnpo", Clip(correction=NONE), KL(coef=0.3)),
]


def value_and_grad(loss: Any, said: Said) -> tuple[float, np.ndarray, dict[str, Any]]:
    batch, outputs = ours(said)

    def value(logps: jax.Array) -> Any:
        terms = loss(dataclasses.replace(outputs, logps=logps), batch)
        return (terms.values * terms.weights).sum() / terms.count.sum(), terms.metrics

    (found, metrics), grad = jax.value_and_grad(value, has_aux=True)(outputs.logps)
    return float(found), np.asarray(grad)[:, 1:], metrics


def assert_same(loss: Any, said: Said, theirs: Any) -> None:
    value, grad, metrics = value_and_grad(loss, said)
    want, slope, named = theirs
    assert value == pytest.approx(want, rel=3e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
    names = {name for name, x in metrics.items() if isinstance(x, Mean)} & named.keys()
    assert "entropy" in names
    for name in names:
        mean = float(metrics[name].total / metrics[name].count)
        assert mean == pytest.approx(named[name], rel=1e-5, abs=1e-7), name


def case_name(case: tuple[str, Any, KL]) -> str:
    said = [*case[1].model_dump(exclude_defaults=True).values(), f"kl={case[2].coef}"]
    return " ".join([case[0], *map(str, said)])


@pytest.mark.parametrize("case", CASES, ids=map(case_name, CASES))
def test_losses_of_grpo_trainer(case: tuple[str, Any, KL], said: Said) -> None:
    name, loss, kl = case
    theirs = by_grpo_trainer(name, loss, kl, said)
    assert_same(Objective(loss, kl), said, theirs)
    wanted = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    assert (wanted if isinstance(loss, Clip) else {"cispo_clip_ratio"}) <= theirs[2].keys()


def test_the_loss_of_rloo_trainer(said: Said) -> None:
    """Whole answers' ratios, clipped; near the old policy, where they are not, its gradient is that
    of `reinforce` with sums over answers."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    def theirs(given: Said) -> Any:
        inputs = {"old_logps": torch.tensor((given.old * given.mask).sum(1))}
        return by_trl(RLOOTrainer, given, inputs, epsilon_low=0.4, epsilon_high=0.5)

    loss = Clip(ratio="product", aggregate="sequence", low=0.4, high=0.5, correction=NONE)
    assert_same(Objective(loss, KL()), said, theirs(said))
    fresh = dataclasses.replace(said, policy=said.old)
    _, slope, _ = theirs(fresh)
    plain = Reinforce(aggregate="constant", length=1, correction=NONE)
    _, grad, _ = value_and_grad(plain, fresh)
    np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-7)


def test_group_deviations_are_trls() -> None:
    from trl.trainer.utils import nanstd

    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 4))
    rewards[2, 1] = np.nan
    std = nanstd(torch.tensor(rewards), dim=1).numpy()
    mean = np.nanmean(rewards, 1)
    want = np.nan_to_num((rewards - mean[:, None]) / (std[:, None] + 1e-4)).reshape(-1)
    given = Signal(rewards.reshape(-1), np.repeat(np.arange(5), 4), [np.ones(1)] * 20)
    found = GRPO()(given).advantages
    np.testing.assert_allclose(np.concatenate(found), want, rtol=1e-6)


def test_metrics_of_the_sampler_are_named_as_trls() -> None:
    """In the source that makes them, which cannot be called alone."""
    import inspect

    from trl.trainer.grpo_trainer import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    ones = np.ones((N, WIDTH), np.float32)
    batch, outputs = ours(Said(-ones, -ones, -ones, -ones, ones, ones, ones[:, 0]))
    metrics = Clip()(outputs, batch).metrics
    for name, value in metrics.items():
        if name.startswith("sampling/"):
            ends = ("/min", "/max") if isinstance(value, Extremes) else ("",)
            told = [name + end for end in ends if name + end in source]
            assert told, name
