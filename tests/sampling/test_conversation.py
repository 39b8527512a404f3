"""From prompts to rollouts: the ids sampled are the ids trained on, and nothing else is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.chat.template import ChatTemplate
from posttrain.sampling.conversation import make_rollouts, tool_metrics
from posttrain.tools import Tool, tool_of
from posttrain.tools.calculator import calculate
from posttrain.types import Conversation, Prompt, Rollout
from tests.chat.samples import say
from tests.sampling.scripted import (
    CALCULATOR,
    SAMPLING,
    TOOLS,
    Scripted,
    call,
    prompt,
    says,
    template,
)


def work_out(expression: str) -> str:
    """Works out an expression."""
    return f"It is {calculate(expression)}."


def wanted(expression: str, index: int) -> dict[str, Any]:
    function = {"name": "work_out", "arguments": {"expression": expression}}
    return {"id": f"call{index:05d}", "type": "function", "function": function}


def test_one_turn(chatml: ChatTemplate):
    engine = says(chatml, "Twelve.")
    seen: list[tuple[int, Rollout]] = []
    rollouts = make_rollouts(
        [prompt(name="a"), prompt("And 5?", name="b")],
        engine,
        chatml,
        SAMPLING,
        n=2,
        version=7,
        first_group=10,
        on_rollout=lambda i, r: seen.append((i, r)),
    )
    assert [(r.prompt.id, r.group, r.version) for r in rollouts] == [
        ("a", 10, 7),
        ("a", 10, 7),
        ("b", 11, 7),
        ("b", 11, 7),
    ]
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert all(r is rollouts[i] for i, r in seen)
    for rollout in rollouts:
        asked = chatml.generation_prompt(rollout.prompt.messages)
        count = rollout.length
        assert rollout.tokens.tolist()[: len(asked)] == asked
        assert rollout.text == "Twelve."
        assert rollout.messages == (say("assistant", "Twelve."),)
        assert rollout.finish == "stop"
        assert rollout.loss_weights.tolist() == [0.0] * len(asked) + [1.0] * count
        assert rollout.logps.tolist() == [0.0] * len(asked) + [-1.0 - i for i in range(count)]
        np.testing.assert_allclose(rollout.plain_logps, rollout.logps / 10)
        assert rollout.tokens.dtype == np.int32
        assert rollout.loss_weights.dtype == np.float32
    assert engine.calls == 1, "everything is asked at once"
    assert {request.n for _, _, request in engine.asked} == {2}


@pytest.mark.parametrize(
    "name",
    [
        "chatml",
        "llama3",
        "chujiezheng__qwen2.5-instruct",
        "llamacpp__Qwen-Qwen3-0.6B",
        "trl__qwen3",
        "llamacpp__meta-llama-Llama-3.1-8B-Instruct",
        "axolotl__llama3_2_vision",
        "llamacpp__mistralai-Mistral-Nemo-Instruct-2407",
        "mistral-common__v11_think",
        "mistral-common__v13",
    ],
)
def test_turns_add_up_to_the_rendered_conversation(
    data_dir: Path, public: dict[str, str], name: str
):
    """Where a model writes its turns just as the template would, two calls and an answer are the
    ids of the whole conversation, rendered and tokenised in one go."""
    chat = template(data_dir, public[name])
    asked = (say("user", "What is 3*4?"),)
    calls = [wanted("3*4", 0), wanted("12/5", 1)]
    results = [
        say("tool", text, name="work_out", tool_call_id=made["id"])
        for text, made in zip(["It is 12.", "It is 2.4."], calls, strict=True)
    ]
    whole = Conversation(
        (
            *asked,
            say("assistant", "", tool_calls=[calls[0]]),
            results[0],
            say("assistant", "", tool_calls=[calls[1]]),
            results[1],
            say("assistant", "Twelve and 2.4."),
        ),
        (tool_of(work_out).schema,),
    )
    (example,) = chat.examples(whole)
    on = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_weights > 0, [0]]).astype(int)))
    turns = [example.tokens[a:b].tolist() for a, b in on.reshape(-1, 2)]
    assert len(turns) == 3
    said = iter(turns)
    engine = Scripted(lambda request, which: next(said))
    tools = {"work_out": tool_of(work_out)}
    (rollout,) = make_rollouts([prompt()], engine, chat, SAMPLING, tools=tools)
    assert rollout.tokens.tolist() == example.tokens[: len(rollout.tokens)].tolist()
    assert rollout.loss_weights.tolist() == example.loss_weights[: len(rollout.tokens)].tolist()
    assert len(rollout.tokens) == on[-1], "and nothing is missing but the template's own tail"
    assert rollout.messages == whole.messages[1:]
    assert (rollout.calls, rollout.failed_calls, rollout.finish) == (2, 0, "stop")


def test_what_was_sampled_is_never_tokenised_again(chatml: ChatTemplate):
    """One id a byte: the same text, which the tokenizer would cut into other tokens."""
    tokenizer = chatml.tokenizer

    def in_bytes(text: str) -> list[int]:
        return [i for character in text for i in tokenizer.encode(character).ids]

    text = f"I work it out.\n{call()}"
    stop = chatml.stop_ids[0]
    said = iter([[*in_bytes(text), stop], [*in_bytes("It is 12."), stop]])
    asked: list[list[int]] = []

    def answer(request: Any, which: int) -> list[int]:
        asked.append(list(request.tokens))
        return next(said)

    (rollout,) = make_rollouts([prompt()], Scripted(answer), chatml, SAMPLING, tools=TOOLS)
    ids = rollout.tokens.tolist()
    assert ids[: len(asked[1])] == asked[1], "sampled after these ids, trained after these ids"
    assert asked[1][: len(asked[0]) + len(text) + 1] == [*asked[0], *in_bytes(text), stop]
    assert tokenizer.encode(tokenizer.decode(ids)).ids != ids, "the pair of texts tests nothing"
    assert rollout.loss_weights.sum() == len(in_bytes(text)) + len(in_bytes("It is 12.")) + 2
    between = rollout.loss_weights[len(asked[0]) :] == 0
    told = tokenizer.decode(rollout.tokens[len(asked[0]) :][between].tolist())
    assert told == "\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"
    assert not rollout.logps[rollout.loss_weights == 0].any()
    assert not rollout.plain_logps[rollout.loss_weights == 0].any()
    assert rollout.logps[len(asked[1])] == -1, "the second turn's log-probs stand at its tokens"


def test_draws_depend_on_the_prompt_and_which_of_its_answers(chatml: ChatTemplate):
    def seeds(names: list[str], seed: int = 0) -> dict[tuple[str, int, int], int]:
        engine = says(chatml, call(), "Done.")
        prompts = [prompt(name=name) for name in names]
        make_rollouts(prompts, engine, chatml, SAMPLING, n=2, seed=seed, tools=TOOLS)
        found: dict[tuple[str, int, int], int] = {}
        for index, which, request in engine.asked:
            turn = int((names[index], which, 0) in found)
            found[names[index], which, turn] = request.seed
        return found

    one, other = seeds(["a", "b", "c"]), seeds(["c", "a"])
    assert all(one[key] == value for key, value in other.items())
    assert one["a", 0, 0] == one["a", 1, 0], "one request: the engine tells its n apart"
    assert one["a", 0, 1] != one["a", 1, 1], "turns of two rollouts draw apart"
    assert len(set(one.values())) == 9
    assert not set(seeds(["a", "b", "c"], seed=1).values()) & set(one.values())


def test_a_prompt_asked_twice_is_drawn_twice(chatml: ChatTemplate):
    engine = says(chatml, "Done.")
    make_rollouts([prompt(), prompt()], engine, chatml, SAMPLING)
    first, second = (request.seed for _, _, request in engine.asked)
    assert first != second


def test_tool_metrics(chatml: ChatTemplate):
    def answer(request: Any, which: int) -> list[int]:
        turns = {0: ["No need."], 1: [call(), call("1/0"), "So."], 2: [call() + call(), "So."]}[
            which
        ]
        seen = chatml.tokenizer.decode(list(request.tokens)).count("<|im_start|>assistant")
        return [*chatml.tokenizer.encode(turns[seen - 1]).ids, chatml.stop_ids[0]]

    engine = Scripted(lambda request, which: answer(request, which))
    rollouts = make_rollouts([prompt()], engine, chatml, SAMPLING, n=3, tools=TOOLS)
    assert [(r.calls, r.failed_calls) for r in rollouts] == [(0, 0), (2, 1), (2, 0)]
    metrics = tool_metrics(rollouts)
    assert metrics["tools/call_frequency"].value == pytest.approx(4 / 3)
    assert metrics["tools/failure_frequency"].value == pytest.approx(1 / 4)


def test_slow_tools_run_beside_the_sampling(chatml: ChatTemplate):
    """Both calls wait for each other, so that they end only if both run while sampling goes on."""
    both = threading.Barrier(2, timeout=20)
    sampled: list[str] = []

    def meet(word: str) -> str:
        """Waits for the other one."""
        both.wait()
        return word.upper()

    tools = {"meet": tool_of(meet)}

    def turn(request: Any) -> str:
        text = chatml.tokenizer.decode(list(request.tokens))
        sampled.append(text)
        word = "one" if "Say one" in text else "two" if "Say two" in text else ""
        if "tool\n" in text.split("</tools>")[-1] or not word:
            return "Met."
        return f'<tool_call>{{"name": "meet", "arguments": {{"word": "{word}"}}}}</tool_call>'

    engine = Scripted(
        lambda request, _: [*chatml.tokenizer.encode(turn(request)).ids, chatml.stop_ids[0]]
    )
    prompts = [prompt(f"Say {word}", name=word) for word in ("one", "two", "nothing")]
    whole: list[int] = []
    rollouts = make_rollouts(
        prompts, engine, chatml, SAMPLING, tools=tools, on_rollout=lambda i, _: whole.append(i)
    )
    assert [r.messages[1]["content"] for r in rollouts[:2]] == ["ONE", "TWO"]
    assert [r.finish for r in rollouts] == ["stop"] * 3
    assert (engine.calls, whole) == (2, [2, 0, 1])


def test_what_is_refused_at_the_door(data_dir: Path, chatml: ChatTemplate, public: dict[str, str]):
    def opened(chat: ChatTemplate, *prompts: Prompt, tools: Any = TOOLS) -> Scripted:
        engine = says(chat, "Done.")
        make_rollouts(prompts, engine, chat, SAMPLING, tools=tools)
        return engine

    def refused(name: str, *messages: dict[str, Any]) -> str:
        chat = template(data_dir, public[name])
        asked = Prompt("p", messages or (say("user", "Hi"),))
        with pytest.raises(ValueError, match="prompt p: ") as error:
            make_rollouts([asked], Scripted(lambda r, w: []), chat, SAMPLING, tools=TOOLS)
        return str(error.value)

    thinking = refused("llamacpp__deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    assert "drops the thinking of a turn once a tool has answered" in thinking
    system = say("system", "Be kind."), say("user", "Hi")
    moved = refused("llamacpp__mistralai-Mistral-Nemo-Instruct-2407", *system)
    assert "changes what came before" in moved
    assert "Be kind." in moved
    granite = refused("chujiezheng__granite-3.0-instruct")
    assert "drops the content of a tool message" in granite
    other = Tool("other", {**CALCULATOR.schema, "function": {"name": "other"}}, str)
    mixed = prompt(name="m", tools=(CALCULATOR.schema, other.schema))
    tooled = prompt(name="t", tools=(other.schema,))
    with pytest.raises(ValueError, match="prompt m: it offers other, which cannot be run") as error:
        opened(chatml, prompt(), mixed, tooled, mixed)
    assert str(error.value).count("prompt m") == 2, "all at once"
    assert opened(chatml, tooled).calls == 1, "its functions are for show: nobody runs them"
