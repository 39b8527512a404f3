"""The engine: a real model's known text, the trainer's log-probs, slots, stops, follow-ups."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.chat.tokenizer import Tokenizer
from posttrain.models.hf import open_model
from posttrain.models.spec import ModelConfig
from posttrain.sampling import decoder
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Completion, Request, Sampling, alike
from posttrain.sampling.schedule import Schedule
from tests.models.tiny import mesh_of, open_tiny, write_config

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 90,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
PROMPTS = [[5], [17, 3, 80, 2, 9], list(range(20, 60))]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
DRAWN = Sampling(max_new_tokens=12, temperature=1.3)


def network(folder: Path, mesh: jax.sharding.Mesh, **options: Any) -> Any:
    options = {"dtype": "float32", "remat": "none"} | options
    model = open_model(ModelConfig(path=str(folder), **options), mesh)
    return nnx.merge(model.graph, model.state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return network(folder, mesh_of(1, 1, 1), random_init=True, vocab_multiple=128)


@pytest.fixture(scope="module")
def engine(model: Any) -> Engine:
    return Engine(model, slots=4)


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[Completion]:
    return [found for (found,) in engine.generate(alike(PROMPTS, GREEDY))]


def full_logps(model: Any, sequences: Sequence[Sequence[int]], temperature: float = 1) -> list:
    """log p of each token after the first of each sequence, as training has them."""
    tokens = np.zeros((8, 64), np.int32)
    segments = np.zeros(tokens.shape, np.int32)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)], segments[i, : len(sequence)] = sequence, 1
    graph, state = nnx.split(model)
    at = np.broadcast_to(np.arange(64), tokens.shape)
    logits = _logits(graph, state, tokens, at, segments)
    logp = np.asarray(jax.nn.log_softmax(logits / temperature))
    return [
        np.array([logp[i, t - 1, sequence[t]] for t in range(1, len(sequence))])
        for i, sequence in enumerate(sequences)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: Any, at: Any, segments: Any) -> Any:
    return nnx.merge(graph, state).logits(tokens, at, segments)


def test_greedy_text_of_a_real_model(data_dir: Path) -> None:
    """stories260K goes on as its authors' own program does, to the last of 256 tokens; or to the
    token that completes a text that is to stop it."""
    folder = data_dir / "data" / "models" / "stories260K"
    tokenizer = Tokenizer.load(folder)
    want = (folder / "greedy_golden.txt").read_text().strip()
    engine = Engine(network(folder, mesh_of(1, 1, 1)), slots=2, tokenizer=tokenizer)
    story = Sampling(max_new_tokens=256, temperature=0)
    short = story.model_copy(update={"stop": ("never said", "big, red")})
    (whole,), (found,) = engine.generate([Request([1], story), Request([1], short)])
    assert tokenizer.decode(whole.tokens).strip() == want
    assert len(whole.tokens) == 256
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert "big, red" in tokenizer.decode(found.tokens)
    assert "big, red" not in tokenizer.decode(found.tokens[:-1])
    assert found.finish == "stop"


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_log_probs_are_the_trainers(engine: Engine, model: Any, sampling: Sampling) -> None:
    found = [c for (c,) in engine.generate(alike(PROMPTS, sampling, seed=1))]
    whole = [prompt + c.tokens for prompt, c in zip(PROMPTS, found, strict=True)]
    plain, tempered = full_logps(model, whole), full_logps(model, whole, 1.3)
    for prompt, c, logps, drawn_from in zip(PROMPTS, found, plain, tempered, strict=True):
        assert len(c.tokens) == 12
        assert c.finish == "length"
        np.testing.assert_allclose(c.plain_logps, logps[len(prompt) - 1 :], atol=1e-5)
        want = drawn_from[len(prompt) - 1 :] if sampling is DRAWN else np.zeros(12)
        np.testing.assert_allclose(c.logps, want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),  # data, fsdp, tensor, expert
    [("gemma2", (1, 1, 1, 1)), ("mixtral", (1, 2, 1, 2))],
)
def test_windows_caps_ropes_and_experts_hold_in_decoding(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """Prompts and texts on either side of the window of 5, and of the ring of 8 that holds it."""
    opened = open_tiny(tmp_path, name, mesh_of(*shape))
    model = nnx.merge(opened.graph, opened.state)
    prompts = [[7, 3], list(range(20)), list(range(40))]
    found = Engine(model, slots=4).generate(alike(prompts, DRAWN))
    whole = [prompt + c.tokens for prompt, (c,) in zip(prompts, found, strict=True)]
    for prompt, (c,), want in zip(prompts, found, full_logps(model, whole), strict=True):
        np.testing.assert_allclose(c.plain_logps, want[len(prompt) - 1 :], atol=1e-5)


def test_greedy_is_the_most_probable_token(model: Any, greedy: list[Completion]) -> None:
    sequence = PROMPTS[1] + greedy[1].tokens
    for t in range(len(PROMPTS[1]), len(sequence)):
        others = [[*sequence[:t], token] for token in range(t % 13, 90, 13)]
        told, *rest = full_logps(model, [sequence[: t + 1], *others])
        assert all(told[-1] >= other[-1] for other in rest)
    assert len(set(greedy[1].tokens)) > 2


def many(count: int) -> list[Request]:
    """Requests that differ in all that requests may differ in."""
    return [
        Request(
            PROMPTS[i % 3][: 1 + 7 * i],
            Sampling(
                max_new_tokens=3 + 5 * i % 20,
                temperature=(0.0, 1.0, 2.0)[i % 3],
                top_k=4 * (i % 4),
                top_p=(1.0, 0.8)[i % 2],
                repetition_penalty=(1.0, 1.5)[i // 2 % 2],
                logit_bias={i: 2.0} if i % 5 == 0 else {},
            ),
            stop_ids=(3 * i, 3 * i + 1),
            seed=i,
            n=1 + i % 3,
        )
        for i in range(count)
    ]


def test_a_sequence_is_the_same_to_the_bit_alone_and_among_others(engine: Engine) -> None:
    """More completions than slots, so that they come and go around each other."""
    requests = many(9)
    together = engine.generate(requests)
    assert [len(found) for found in together] == [request.n for request in requests]
    for i in (0, 3, 5, 8):
        assert engine.generate([requests[i]]) == [together[i]]


def test_groups_of_slots_are_decoded_apart_and_end_in_each_other(
    model: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three groups of 7 on one core, at the end one: what the others held went on in it."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("posttrain.sampling.engine.STRIDE", 2)
    moved, aside = [], Schedule.set_aside
    monkeypatch.setattr(
        Schedule,
        "set_aside",
        lambda self, slots, rows: (moved.extend(self.live(slots)), aside(self, slots, rows)),
    )
    groups, requests = Engine(model, slots=20), many(20)
    assert groups.slots == 21
    together = groups.generate(requests)
    assert moved
    for i in (0, 5, 8, 19):
        assert groups.generate([requests[i]]) == [together[i]]
    for want, found in zip(engine.generate(requests), together, strict=True):
        assert [c.tokens for c in found] == [c.tokens for c in want]


def test_every_mesh_writes_the_same(folder: Path, engine: Engine) -> None:
    requests = many(9)
    other = Engine(network(folder, mesh_of(2, 2, 2), random_init=True), slots=8)
    for want, found in zip(engine.generate(requests), other.generate(requests), strict=True):
        assert [c.tokens for c in found] == [c.tokens for c in want]
        for c, d in zip(found, want, strict=True):
            np.testing.assert_allclose(c.logps, d.logps, atol=1e-5)
            np.testing.assert_allclose(c.plain_logps, d.plain_logps, atol=1e-5)


def test_stop_tokens_end_a_row_and_leave_the_others_alone(
    engine: Engine, greedy: list[Completion]
) -> None:
    stop = greedy[1].tokens[4]
    first = greedy[1].tokens.index(stop)
    found = [c for (c,) in engine.generate(alike(PROMPTS, GREEDY, stop_ids=[stop, 89]))]
    assert found[1].tokens == greedy[1].tokens[: first + 1]
    assert found[1].finish == "stop"
    assert len(found[1].logps) == len(found[1].plain_logps) == first + 1
    for row in (0, 2):
        if stop not in greedy[row].tokens:
            assert found[row] == greedy[row]


def test_tokens_are_told_one_by_one_as_they_come(engine: Engine, greedy: list[Completion]) -> None:
    told: list[tuple[int, int, int]] = []
    found = engine.generate(alike(PROMPTS, GREEDY), on_token=lambda *args: told.append(args))
    assert [c for (c,) in found] == greedy
    assert told[:3] == [(row, 0, greedy[row].tokens[0]) for row in range(3)]
    for row in range(3):
        assert [token for r, _, token in told if r == row] == greedy[row].tokens


def test_a_draw_depends_on_seed_which_and_position_alone(engine: Engine) -> None:
    request = Request(PROMPTS[0], DRAWN, seed=1, n=3)
    (three,) = engine.generate([request])
    assert len({tuple(c.tokens) for c in three}) == 3
    assert engine.generate([dataclasses.replace(request, n=1)]) == [three[:1]]
    far = dataclasses.replace(request, seed=1 + (1 << 40))
    assert engine.generate([far])[0][0] != three[0]


def test_one_that_is_done_may_be_followed_by_another_in_its_place(engine: Engine) -> None:
    """Two turns: what was said is the next prompt's beginning."""
    first = Request(PROMPTS[1], Sampling(max_new_tokens=5), seed=4, n=6)
    seen: list[tuple[int, int, Completion]] = []

    def follow(request: Request, completion: Completion) -> Request:
        asked = [*request.tokens, *completion.tokens, 7]
        return Request(asked, Sampling(max_new_tokens=9), seed=request.seed)

    def on_done(index: int, which: int, completion: Completion) -> Request | None:
        seen.append((index, which, completion))
        again = which % 2 == 0 and len(completion.tokens) == 5
        return follow(first, completion) if again else None

    (plain,) = engine.generate([first])
    (found,) = engine.generate([first], on_done)
    assert [len(c.tokens) for c in found] == [9, 5, 9, 5, 9, 5]
    assert found[1::2] == plain[1::2]
    ((alone,),) = engine.generate([follow(first, plain[0])])
    assert found[0] == alone
    assert {(index, which) for index, which, _ in seen} == {(0, which) for which in range(6)}
    assert [c for _, which, c in seen if which == 2] == [plain[2], found[2]]


def test_a_follow_up_may_need_more_room(tmp_path: Path) -> None:
    """More than the slots had at first, where not even the window had its own."""
    changes = {"max_position_embeddings": 512, "sliding_window": 200, "num_hidden_layers": 1}
    write_config(tmp_path, "mistral", **changes)
    engine = Engine(network(tmp_path, mesh_of(1, 1, 1), random_init=True), slots=2)
    short, long = ([3] * 20, [5] * 170)
    later = Request(long, Sampling(max_new_tokens=8), seed=3)
    first = [Request(short, Sampling(max_new_tokens=n), seed=2) for n in (4, 60)]
    found = engine.generate(first, lambda i, _, c: later if i == 0 and len(c.tokens) < 8 else None)
    assert found[0] == engine.generate([later])[0]
    assert found[1] == engine.generate([first[1]])[0]


def test_new_weights_are_the_next_answers(folder: Path, model: Any) -> None:
    """And none of them is held: training may give them away."""
    engine = Engine(model, slots=4)
    asked = alike(PROMPTS, GREEDY)
    options = {"random_init": True, "vocab_multiple": 128, "init_seed": 1}
    other = network(folder, mesh_of(1, 1, 1), **options)
    want = Engine(other, slots=4).generate(asked)
    before = engine.generate(asked)
    params = nnx.to_pure_dict(nnx.state(other))
    engine.update(params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert engine.generate(asked) == want != before


def test_what_cannot_be_answered_is_refused_before_anything_runs(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions: a prompt of 60 has room for 4 tokens."""
    four, ten = (Sampling(max_new_tokens=n) for n in (4, 10))
    ((found,),) = engine.generate([Request(list(range(60)), four)])
    assert len(found.tokens) == 4
    monkeypatch.setattr(decoder, "prefill", None)
    biased = Sampling(max_new_tokens=1, logit_bias={90: 1.0}, stop=("a",))
    with pytest.raises(ValueError, match="these cannot be answered") as error:
        engine.generate(
            [
                Request([1], four),
                Request(list(range(60)), ten),
                Request([], four, n=0),
                Request([-1], biased),
            ]
        )
    assert str(error.value).splitlines()[1:] == [
        "    request 1: 60 tokens and max_new_tokens 10 are 70, there is room for 64",
        "    request 2: its prompt is empty",
        "    request 2: n is 0, expected at least 1",
        "    request 3: token -1 is not among the model's 90",
        "    request 3: stop strings need an engine with a tokenizer",
    ]
    with pytest.raises(ValueError, match="room for 32"):
        Engine(model, slots=1, length=32).generate([Request([1] * 30, four)])
    assert engine.generate([]) == []


def test_a_follow_up_that_cannot_be_answered_says_so(engine: Engine) -> None:
    too_long = Request([1] * 60, Sampling(max_new_tokens=10))
    with pytest.raises(ValueError, match="on_done gave back: 60 tokens"):
        engine.generate([Request([1], GREEDY)], lambda *_: too_long)


def test_padding_rows_of_the_vocabulary_are_never_drawn(engine: Engine) -> None:
    """90 tokens in 128 rows; at a temperature that makes all rows alike."""
    hot = Sampling(max_new_tokens=32, temperature=1e6)
    (found,) = engine.generate([Request([1], hot, n=8)])
    drawn = {token for completion in found for token in completion.tokens}
    assert max(drawn) < 90
    assert len(drawn) > 60


def test_nothing_is_compiled_twice(engine: Engine, model: Any) -> None:
    """Other lengths in the same buckets, other numbers of requests, another way of drawing."""
    programs = (decoder.prefill, decoder.place, decoder.decode, decoder.empty)
    engine.generate(alike(PROMPTS, GREEDY))
    before = [program._cache_size() for program in programs]
    engine.generate(many(6))
    Engine(model, slots=4).generate([Request([4], DRAWN, n=7)])
    assert [program._cache_size() for program in programs] == before
