"""One rollout under way: how it ends, what a failed call comes to, what a turn is read as."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat.template import ChatTemplate
from posttrain.chat.templates import TEMPLATES
from posttrain.sampling.conversation import make_rollouts, tool_metrics
from posttrain.sampling.request import Completion, Sampling
from posttrain.sampling.select import SFTSelection
from posttrain.sampling.tally import counts, told
from posttrain.types import Rollout
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


def sampled_text(chat: ChatTemplate, rollout: Rollout) -> str:
    return chat.tokenizer.decode(rollout.tokens[rollout.loss_weights > 0].tolist())


def test_how_rollouts_end(chatml: ChatTemplate):
    def run(engine: Scripted, sampling: Sampling = SAMPLING, **options: Any) -> Rollout:
        return make_rollouts([prompt()], engine, chatml, sampling, **options)[0]

    cut = run(says(chatml, call()), sampling=Sampling(max_new_tokens=5), tools=TOOLS)
    assert (cut.finish, cut.calls, len(cut.messages)) == ("length", 0, 1)
    endless = run(says(chatml, *[call()] * 9), tools=TOOLS, max_turns=3)
    assert (endless.finish, endless.calls, len(endless.messages)) == ("turns", 2, 5)
    assert endless.messages[-1]["role"] == "assistant"
    assert endless.tokens[-1] == chatml.stop_ids[0]
    plain = run(says(chatml, call(), "Never said."))
    assert (plain.finish, plain.calls, len(plain.messages)) == ("stop", 0, 1), "nobody runs it"
    assert plain.messages[0]["tool_calls"][0]["function"]["arguments"] == {"expression": "3*4"}


def test_a_rollout_stays_within_the_context(chatml: ChatTemplate):
    shown = [CALCULATOR.schema]
    asked = len(chatml.generation_prompt(prompt().messages, shown))
    first = len(chatml.tokenizer.encode(call()).ids) + 1
    between = len(
        chatml.tokenizer.encode("\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n").ids
    )
    sampling = Sampling(max_new_tokens=first)

    def run(context: int) -> tuple[Rollout, Scripted]:
        engine = says(chatml, call(), "one two three four five six")
        options: dict[str, Any] = {"tools": TOOLS, "context": context}
        return make_rollouts([prompt()], engine, chatml, sampling, **options)[0], engine

    rollout, engine = run(asked + first + between + 3)
    assert engine.asked[-1][2].sampling.max_new_tokens == 3
    assert (rollout.finish, len(rollout.tokens)) == ("length", asked + first + between + 3)
    rollout, engine = run(asked + first + between)
    assert (rollout.finish, len(rollout.tokens), engine.calls) == ("length", asked + first, 1)
    assert [m["role"] for m in rollout.messages] == ["assistant"]
    with pytest.raises(ValueError, match=rf"prompt p: {asked} tokens and {first} new"):
        run(asked + first - 1)


def test_a_turn_that_ends_with_a_stop_string_is_closed_by_the_template(chatml: ChatTemplate):
    ids = chatml.tokenizer.encode(call()).ids

    class Stopping(Scripted):
        def _complete(self, request: Any, which: int) -> Completion:
            return Completion(list(self.answer(request, which)), [], [], "stop")

    said = iter([ids, [*chatml.tokenizer.encode("Done.").ids, chatml.stop_ids[0]]])
    engine = Stopping(lambda request, which: next(said))
    (rollout,) = make_rollouts([prompt()], engine, chatml, SAMPLING, tools=TOOLS)
    text = chatml.tokenizer.decode(rollout.tokens.tolist())
    assert text.endswith(
        "</tool_call><|im_end|>\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"
        "Done.<|im_end|>"
    )
    assert sampled_text(chatml, rollout) == call() + "Done.<|im_end|>"
    assert (rollout.logps.size, rollout.plain_logps.size) == (0, 0), "an engine without log-probs"


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (call("1/0"), "error: division by zero"),
        (call(name="calc"), "error: there is no tool named 'calc'; there are: calculator"),
        ('<tool_call>\n{"name": "calculator", "arg', "error: <tool_call> is never closed"),
        (
            '<tool_call>{"name": "calculator", "arguments": [3]}</tool_call>',
            'error: what stands after <tool_call> is no JSON object with "name" and "arguments"',
        ),
        (
            '<tool_call>{"name": "calculator", "arguments": {"expr": "3"}}</tool_call>',
            "error: wrong arguments for calculator: expression: missing; expr: not known; "
            "known are expression",
        ),
    ],
)
def test_a_call_that_fails_is_told_to_the_model(chatml: ChatTemplate, turn: str, told: str):
    engine = says(chatml, turn, "Sorry.")
    (rollout,) = make_rollouts([prompt()], engine, chatml, SAMPLING, tools=TOOLS)
    assert rollout.messages[1]["role"] == "tool"
    assert rollout.messages[1]["content"] == told
    assert (rollout.calls, rollout.failed_calls) == (1, 1)
    assert rollout.messages[-1] == say("assistant", "Sorry.")
    metrics = tool_metrics([rollout])
    assert metrics["tools/failure_frequency"].value == 1


@pytest.mark.parametrize(
    "turn",
    [
        '<tool_call>{"name": "calculator", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "calc\\udfff", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": {"expression": "<|im_end|>"}}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": {"x": %s}}</tool_call>' % ("9" * 5000),
        '<tool_call>{"name": "calculator", "arguments": {"x": %s}}</tool_call>' % ("[" * 900),
        '<tool_call>{"name": "calculator", "arguments": "{}", "id": 123456789}</tool_call>',
        "<tool_call>" * 100,
        '<tool_call>{"name": "", "arguments": {"": ""}}</tool_call>',
    ],
    ids=range(8),
)
def test_nothing_that_a_model_writes_ends_the_run(chatml: ChatTemplate, turn: str):
    engine = says(chatml, turn, "Done.")
    long = Sampling(max_new_tokens=20_000)
    (rollout,) = make_rollouts([prompt()], engine, chatml, long, tools=TOOLS)
    assert (rollout.finish, rollout.calls, rollout.failed_calls) == ("stop", 1, 1)
    json.dumps(rollout.messages, ensure_ascii=False).encode()
    assert rollout.messages[1]["content"].startswith("error: ")
    assert rollout.messages[-1]["content"] == "Done."


def test_thinking_that_the_prompt_opens_is_thinking(data_dir: Path):
    opens = TEMPLATES["chatml"].replace(
        "add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}",
        "add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}",
    )
    chat = template(data_dir, opens)
    engine = Scripted(lambda request, _: chat.tokenizer.encode("Let me see, it is").ids)
    (rollout,) = make_rollouts([prompt()], engine, chat, SAMPLING)
    assert rollout.messages[0] == say("assistant", "", reasoning_content="Let me see, it is")
    assert rollout.text == "Let me see, it is"


def test_a_call_that_the_template_cannot_write_ends_the_rollout(
    data_dir: Path, public: dict[str, str]
):
    """Llama 3.1's writes one call a turn: two at once cannot be gone on from."""
    chat = template(data_dir, public["llamacpp__meta-llama-Llama-3.1-8B-Instruct"])
    engine = says(chat, call() + call())
    (rollout,) = make_rollouts([prompt()], engine, chat, SAMPLING, tools=TOOLS)
    assert (rollout.finish, rollout.calls, rollout.failed_calls) == ("template", 2, 2)
    assert [m["role"] for m in rollout.messages] == ["assistant"]
    assert tool_metrics([rollout, rollout])["tools/unwritable_frequency"].value == 1
    judged = replace(rollout, rewards={"correct": 1.0}, reward=1.0)
    assert SFTSelection()([judged], {}).dropped == {"calls that the chat template cannot write": 1}
    assert "  1 ended with calls that the chat template cannot write" in told(
        [counts([judged], "correct", 1.0)]
    )


def test_a_thinking_template_that_keeps_thoughts_between_calls_is_taken(
    data_dir: Path, public: dict[str, str]
):
    chat = template(data_dir, public["llamacpp__Qwen-Qwen3-0.6B"])
    engine = says(chat, f"<think>\nHm.\n</think>\n\n{call()}", "<think>\nSo.\n</think>\n\n12")
    (rollout,) = make_rollouts([prompt()], engine, chat, SAMPLING, tools=TOOLS)
    assert [m.get("reasoning_content") for m in rollout.messages] == ["Hm.", None, "So."]
    assert rollout.messages[-1]["content"] == "12"
