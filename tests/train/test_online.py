"""Parts of learning online by themselves: answers that are judged while others are sampled, passes
and steps over rounds of any size, a critic that learns beside the policy."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from posttrain.chat.template import ChatTemplate
from posttrain.losses.clip import Clip
from posttrain.losses.kl import KL, Objective
from posttrain.models.hf import open_model
from posttrain.models.spec import ModelConfig
from posttrain.optim import OptimConfig
from posttrain.rewards.base import Reward
from posttrain.rewards.scorer import RewardError, Scorer
from posttrain.sampling.request import OnDone, Request, Sampling
from posttrain.train.answering import Answering
from posttrain.train.answers import Answers
from posttrain.train.evaluate_online import HeldOutPrompts
from posttrain.train.online import seed_of
from posttrain.train.online_config import CriticConfig, OnlineEvalConfig, RolloutLogConfig
from posttrain.train.online_steps import Critic, make_steps
from posttrain.train.passes import Passes, put
from posttrain.train.rollout_rows import Shape, lay_out
from posttrain.train.source import Stopped
from posttrain.train.state import new_state
from posttrain.train.step import Forward
from posttrain.types import Rollout
from tests.models.tiny import mesh_of, open_tiny
from tests.sampling.conftest import chatml  # noqa: F401 - a fixture
from tests.sampling.scripted import Scripted, prompt, says

SAMPLING = Sampling(max_new_tokens=64)


class Told(Reward):
    """1 for a right answer; calls `when` first."""

    when: Any = None

    def __call__(self, rollout: Rollout) -> float | None:
        if self.when is not None:
            self.when(rollout)
        return float(rollout.text == "12")


class Weighted(Scripted):
    """Takes weights, and says which."""

    def update(self, params: Any) -> None:
        self.params = [*getattr(self, "params", []), params]


def answering(engine: Any, chat: ChatTemplate, scorer: Scorer) -> Answering:
    made = Answering(engine, chat, scorer, seq_len=256, tools={}, max_turns=1)
    made.update("weights", 3)
    return made


def test_an_answer_is_judged_while_others_are_still_being_sampled(chatml: ChatTemplate) -> None:  # noqa: F811
    judged = threading.Event()
    inner = says(chatml, "12")

    class Slow(Weighted):
        def generate(self, requests: Sequence[Request], on_done: OnDone | None = None) -> Any:
            first = inner.generate(requests[:1], on_done)
            assert judged.wait(30), "nobody judged the first answer before the second was asked for"
            moved = on_done and (lambda index, which, done: on_done(index + 1, which, done))
            return first + inner.generate(requests[1:], moved)

    with Scorer({"correct": Told(when=lambda _: judged.set())}) as scorer:
        made = answering(Slow(inner.answer), chatml, scorer)
        found = made([prompt(name="a"), prompt(name="b")], SAMPLING, n=1, seed=0, first_group=5)
    assert [r.reward for r in found.rollouts] == [1.0, 1.0]
    assert [(r.group, r.version) for r in found.rollouts] == [(5, 3), (6, 3)]
    assert found.tokens == sum(r.length for r in found.rollouts) > 0


def test_the_same_weights_are_given_to_the_engine_once(chatml: ChatTemplate) -> None:  # noqa: F811
    engine = Weighted(says(chatml, "12").answer)
    with Scorer({"correct": Told()}) as scorer:
        made = answering(engine, chatml, scorer)
        made.update("the same", 3)
        made.update("others", 4)
    assert engine.params == ["weights", "others"]


def test_a_reward_that_fails_ends_the_round(chatml: ChatTemplate) -> None:  # noqa: F811
    def broken(rollout: Rollout) -> None:
        raise KeyError("no such unit")

    engine = Weighted(says(chatml, "12").answer)
    with Scorer({"correct": Told(when=broken)}) as scorer, pytest.raises(RewardError, match="unit"):
        answering(engine, chatml, scorer)([prompt()], SAMPLING, n=2, seed=0)


def test_a_run_that_is_told_to_stop_samples_no_further(chatml: ChatTemplate) -> None:  # noqa: F811
    judged: list[Rollout] = []
    engine = Weighted(says(chatml, "12").answer)
    with Scorer({"correct": Told(when=judged.append)}) as scorer:
        made = answering(engine, chatml, scorer)
        asked = iter([False, True])
        made.watch(lambda: next(asked))
        with pytest.raises(Stopped):
            made([prompt(name="a"), prompt(name="b")], SAMPLING, n=2, seed=0)
    assert len(judged) <= 1


def test_held_out_prompts_are_answered_with_the_same_draws_each_time(
    chatml: ChatTemplate,  # noqa: F811
    tmp_path: Path,
) -> None:
    engine = Weighted(says(chatml, "12").answer)
    cfg = SimpleNamespace(
        sampling=SAMPLING, eval=OnlineEvalConfig(answers=2, temperature=0.5), seed=1,
        right="correct", run_dir=tmp_path, rollouts=RolloutLogConfig(),
        task=SimpleNamespace(name="sums"),
    )  # fmt: skip
    with Scorer({"correct": Told()}) as scorer:
        held_out = HeldOutPrompts(answering(engine, chatml, scorer), [prompt()], cfg)
        first, second = (held_out.measure(f"after {step}", step) for step in (4, 8))
    assert first["eval/sums/accuracy"] == first["eval/sums/reward"] == 1.0
    seeds = {request.seed for _, _, request in engine.asked}
    assert len(seeds) == 1
    assert {request.sampling.temperature for _, _, request in engine.asked} == {0.5}
    lines = (tmp_path / "rollouts" / "8.held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["12", "12"]
    assert second.keys() == first.keys()


def test_no_two_rounds_or_tries_have_the_same_draws() -> None:
    seeds = {
        seed_of(s, number, attempt) for s in (0, 1) for number in range(9) for attempt in (0, 1)
    }
    assert len(seeds) == 2 * 9 * 2
    assert all(0 <= seed < 2**31 for seed in seeds)


MESH = (1, 2, 1)
SHAPE = Shape(shards=2, rows=2, seq_len=32, segments=4)


def answers(count: int = 9) -> Answers:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, count)
    tokens = [rng.integers(0, 160, n).astype(np.int32) for n in lengths]
    weights = [(np.arange(n) >= 3).astype(np.float32) for n in lengths]
    noise = [
        rng.normal(size=n).astype(np.float32) * w for n, w in zip(lengths, weights, strict=True)
    ]
    return Answers(
        tokens, weights, [-5 * w for w in weights], advantages=noise,
        old_values=[x / 2 for x in noise], returns=noise,
    )  # fmt: skip


def forward_of(model: Any, mesh: jax.sharding.Mesh, loss: Any) -> Forward:
    whole = SHAPE.rows * SHAPE.seq_len
    return Forward(model.graph, loss, mesh, budget=whole, head_chunk=16, sources=1, ragged=True)


def test_passes_say_of_each_answer_what_the_model_says_of_it_alone(tmp_path: Path) -> None:
    mesh, found = mesh_of(*MESH), answers()
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path, "llama", mesh)
        params = nnx.to_pure_dict(model.state)
        room = SHAPE.micro_batches(20)
        said = Passes(forward_of(model, mesh, None), SHAPE, mesh, room)(params, found)
        network = nnx.merge(model.graph, model.state)
        for tokens, weights, got in zip(found.tokens, found.weights, said, strict=True):
            n = len(tokens)
            padded = np.pad(tokens, (0, 32 - n))[None]
            inside = (np.arange(32) < n).astype(np.int32)[None]
            logits = network.logits(padded, np.arange(32)[None] * inside, inside)
            z = np.asarray(logits, np.float64)[0, : n - 1]
            logps = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logps -= z.max(-1, keepdims=True)
            want = np.append(0.0, np.take_along_axis(logps, tokens[1:, None], 1)[:, 0]) * weights
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_one_program_serves_rounds_of_all_lengths(tmp_path: Path) -> None:
    """Log-probs of all tokens but the last three, and of few; what is asked of both is the same."""
    mesh = mesh_of(*MESH)
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path, "llama", mesh)
        says = Passes(forward_of(model, mesh, None), SHAPE, mesh, SHAPE.micro_batches(9))
        params, whole = nnx.to_pure_dict(model.state), answers()
        kept = [w * (np.arange(len(w)) < 5) for w in whole.weights]
        few = dataclasses.replace(whole, weights=kept)
        for a, b, w in zip(says(params, whole), says(params, few), kept, strict=True):
            np.testing.assert_allclose(a * w, b, atol=1e-6)
        assert says._program._cache_size() == 1


def test_micro_batches_that_stay_empty_change_no_step_and_a_critic_learns_beside_the_policy(
    tmp_path: Path,
) -> None:
    """The step with a critic has room for three micro-batches more than the one without."""
    mesh, found = mesh_of(*MESH), answers(24)
    live = lay_out(found.lengths, found.trained, SHAPE, 24).live
    assert live > 1
    cfg = SimpleNamespace(optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0))
    tx, stepped = optax.sgd(1.0), []
    with jax.set_mesh(mesh):
        policy = open_tiny(tmp_path, "llama", mesh)
        policies = forward_of(policy, mesh, Objective(Clip(), KL()))
        named = ModelConfig(path=str(tmp_path), dtype="float32", random_init=True)
        opened = open_model(named, mesh, head="value", new_head=True)
        critic = Critic(CriticConfig(), forward_of(opened, mesh, CriticConfig().loss))
        foretells = new_state(nnx.to_pure_dict(opened.state), critic.optimizer(4))
        before = jax.device_get(foretells.params)
        for room, own in ((live, None), (live + 3, critic)):
            params = jax.tree.map(jnp.copy, nnx.to_pure_dict(policy.state))
            state = dataclasses.replace(new_state(params, tx), critic=own and foretells)
            layout = lay_out(found.lengths, found.trained, SHAPE, room)
            step = make_steps(cfg, policies, tx, 4, state, own)
            state, metrics = step(state, put(found, layout, SHAPE, mesh), None)
            stepped.append((state, metrics))
    (alone, loss), (both, metrics) = stepped
    np.testing.assert_allclose(loss["loss"].total, metrics["loss"].total, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (alone.params, both.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    names = {"critic/loss", "critic/grad_norm", "critic/learning_rate", "loss", "values/mean"}
    assert names <= metrics.keys()
    assert both.critic is not None
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), before, jax.device_get(both.critic.params)
    )
    assert moved["score"] > 0
