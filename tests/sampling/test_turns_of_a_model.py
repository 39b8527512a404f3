"""Several turns of a real engine: what was sampled, where, with the log-probs that training has."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.chat.template import ChatTemplate
from posttrain.models.hf import open_model
from posttrain.models.spec import ModelConfig
from posttrain.sampling import talk
from posttrain.sampling.conversation import make_rollouts
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Sampling
from posttrain.types import Prompt, Rollout
from tests.chat.samples import say
from tests.models.tiny import mesh_of
from tests.sampling.scripted import TOOLS

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
PROMPTS = [Prompt(f"p{i}", (say("user", "What is it? " * (i + 1)),)) for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, chatml: ChatTemplate) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    config = CONFIG | {"vocab_size": chatml.tokenizer.size}
    (folder / "config.json").write_text(json.dumps(config))
    cfg = ModelConfig(path=str(folder), dtype="float32", remat="none", random_init=True)
    opened = open_model(cfg, mesh_of(1, 1, 1))
    return nnx.merge(opened.graph, opened.state)


def logps(model: Any, rollouts: list[Rollout]) -> list[np.ndarray]:
    """What a forward pass over the whole of each says of its tokens."""
    graph, state = nnx.split(model)
    shape = (len(rollouts), 512)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, rollout in enumerate(rollouts):
        count = len(rollout.tokens)
        tokens[i, :count], segments[i, :count] = rollout.tokens, 1
    at = np.broadcast_to(np.arange(shape[1]), shape)

    @jax.jit
    def of_targets(state: Any) -> Any:
        logits = nnx.merge(graph, state).logits(tokens, at, segments)[:, :-1]
        logp = jax.nn.log_softmax(logits)
        return jax.numpy.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]

    found = np.asarray(of_targets(state))
    return [np.append(0, row)[: len(r.tokens)] for row, r in zip(found, rollouts, strict=True)]


def test_turns_of_a_real_engine(model: Any, chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch):
    """A model that knows nothing calls a tool in every turn, since its words are read so."""

    def calls(text: str) -> dict[str, Any]:
        arguments = {"expression": f"{len(text)} * 3"}
        call = {"id": "", "function": {"name": "calculator", "arguments": arguments}}
        return say("assistant", text, tool_calls=[call | {"type": "function"}])

    monkeypatch.setattr(talk, "parse_assistant", calls)
    stop = chatml.stop_ids[0]
    sampling = Sampling(max_new_tokens=24, temperature=0.7, logit_bias={stop: 5.0})
    engine = Engine(model, slots=4, length=512)

    def sample(prompts: list[Prompt], **options: Any) -> list[Rollout]:
        return make_rollouts(
            prompts, engine, chatml, sampling, n=3, tools=TOOLS, max_turns=3, context=512, **options
        )

    rollouts = sample(PROMPTS, seed=1)
    turns = [sum(m["role"] == "assistant" for m in r.messages) for r in rollouts]
    assert max(turns) == 3
    assert {r.finish for r in rollouts} == {"turns", "length"}
    for rollout, told in zip(rollouts, logps(model, rollouts), strict=True):
        sampled = rollout.loss_weights > 0
        np.testing.assert_allclose(rollout.plain_logps[sampled], told[sampled], atol=1e-5)
        assert not rollout.plain_logps[~sampled].any()
        assert (rollout.tokens[sampled] == stop).sum() == rollout.calls + (
            rollout.finish == "turns"
        )
    again = sample(PROMPTS[::-1], seed=1)
    by_prompt = [r.tokens.tolist() for i in (2, 1, 0) for r in again[i * 3 : i * 3 + 3]]
    assert by_prompt == [r.tokens.tolist() for r in rollouts], "whatever the neighbours are"
    other = sample(PROMPTS, seed=2)
    assert [r.tokens.tolist() for r in other] != by_prompt
    assert len({tuple(r.tokens.tolist()) for r in rollouts}) == 9
