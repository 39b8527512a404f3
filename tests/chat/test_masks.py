"""What 54 real templates train, against what the assistant must write.

The table says, for each template and conversation, EXACT or why it is refused. The exact text is
put together here, from the template's stop token and its way with thinking and tool calls, not
from the code under test.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import pytest

from posttrain.chat.template import ChatError
from tests.chat.samples import PLAIN, SYSTEM, THINK, TOOLS, template_of, trained

EXACT = ""
NO_THINKING = "drops the thinking"
NO_TOOLS = "drops the tools"
NO_CALLS = "drops or changes the tool_calls"
NO_STOP = "ends with no stop token"
ALTERNATE = "roles must alternate"
WANTS_TOOLS = "is not iterable"


class Row(NamedTuple):
    """stop: what ends a turn. lead: what comes between the generation prompt and the answer (for
    Qwen3: in the last turn alone)."""

    stop: str
    plain: str
    system: str
    think: str
    tool: str
    lead: str = ""


TABLE = {
    "axolotl__chatml": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "axolotl__deepseek_v3": Row(
        "<\uff5cend\u2581of\u2581sentence\uff5c>", EXACT, EXACT, NO_THINKING, NO_TOOLS
    ),
    "axolotl__exaone": Row("[|endofturn|]", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "axolotl__falcon_h1": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "axolotl__gemma3": Row("<end_of_turn>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "axolotl__gemma3n": Row("<end_of_turn>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "axolotl__gemma4": Row("<turn|>", EXACT, EXACT, NO_THINKING, NO_STOP),
    "axolotl__llama3": Row("<|eot_id|>", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "axolotl__llama3_2_vision": Row("<|eot_id|>", EXACT, EXACT, NO_THINKING, EXACT),
    "axolotl__llava": Row("", EXACT, EXACT, NO_THINKING, NO_CALLS, lead=" "),
    "axolotl__mistral_v7_tekken": Row(
        "</s>", EXACT, EXACT, NO_THINKING, "Only user, system and assistant roles"
    ),
    "chujiezheng__alpaca": Row("</s>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__amberchat": Row("</s>", NO_STOP, NO_STOP, NO_THINKING, ALTERNATE),
    "chujiezheng__chatml": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__chatqa": Row("</s>", NO_STOP, NO_STOP, NO_THINKING, ALTERNATE),
    "chujiezheng__falcon-instruct": Row("</s>", NO_STOP, NO_STOP, NO_THINKING, ALTERNATE),
    "chujiezheng__gemma-it": Row("<end_of_turn>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__granite-3.0-instruct": Row(
        "<|end_of_text|>", EXACT, EXACT, NO_THINKING, NO_CALLS
    ),
    "chujiezheng__llama-2-chat": Row(
        " </s>", EXACT, EXACT, NO_THINKING, ALTERNATE, lead="\n\n         "
    ),
    "chujiezheng__llama-3-instruct": Row("<|eot_id|>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__mistral-instruct": Row(
        "</s>", EXACT, EXACT, NO_THINKING, ALTERNATE, lead="\n         "
    ),
    "chujiezheng__openchat-3.5": Row(
        "<|end_of_turn|>", EXACT, EXACT, NO_THINKING, ALTERNATE, lead=" "
    ),
    "chujiezheng__phi-3-small": Row("<|end|>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__phi-3": Row("<|end|>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__qwen2.5-instruct": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, EXACT),
    "chujiezheng__saiga": Row("</s>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "chujiezheng__solar-instruct": Row("</s>", NO_STOP, NO_STOP, NO_THINKING, ALTERNATE),
    "chujiezheng__vicuna": Row("</s>", EXACT, EXACT, NO_THINKING, ALTERNATE, lead=" "),
    "chujiezheng__zephyr": Row("</s>", EXACT, EXACT, NO_THINKING, ALTERNATE),
    "llamacpp__CohereForAI-c4ai-command-r-plus-tool_use": Row(
        "<|END_OF_TURN_TOKEN|>", WANTS_TOOLS, WANTS_TOOLS, WANTS_TOOLS, NO_STOP
    ),
    "llamacpp__HuggingFaceTB-SmolLM3-3B": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "llamacpp__NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": Row(
        "<|im_end|>", WANTS_TOOLS, WANTS_TOOLS, WANTS_TOOLS, EXACT
    ),
    "llamacpp__Qwen-Qwen2.5-7B-Instruct": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, EXACT),
    "llamacpp__Qwen-Qwen3-0.6B": Row(
        "<|im_end|>", EXACT, EXACT, EXACT, EXACT, lead="<think>\n\n</think>\n\n"
    ),
    "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Llama-8B": Row(
        "<\uff5cend\u2581of\u2581sentence\uff5c>", EXACT, EXACT, NO_THINKING, NO_CALLS
    ),
    "llamacpp__google-gemma-2-2b-it": Row(
        "<end_of_turn>", EXACT, "System role not supported", NO_THINKING, ALTERNATE
    ),
    "llamacpp__meta-llama-Llama-3.1-8B-Instruct": Row(
        "<|eot_id|>", EXACT, EXACT, NO_THINKING, EXACT
    ),
    "llamacpp__microsoft-Phi-3.5-mini-instruct": Row(
        "<|end|>", EXACT, EXACT, NO_THINKING, NO_CALLS
    ),
    "llamacpp__mistralai-Mistral-Nemo-Instruct-2407": Row(
        "</s>", EXACT, "content of message 0 (system)", NO_THINKING, EXACT
    ),
    "mistral-common__v11_think": Row("</s>", EXACT, EXACT, EXACT, EXACT),
    "mistral-common__v13": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT),
    "mistral-common__v13_think": Row("</s>", EXACT, EXACT, EXACT, EXACT),
    "mistral-common__v15": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT),
    "mistral-common__v2": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT),
    "mistral-common__v3": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT),
    "mistral-common__v3_spm": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT, lead=" "),
    "mistral-common__v7_spm": Row("</s>", EXACT, EXACT, NO_THINKING, EXACT, lead=" "),
    "trl__deepseekv3": Row(
        "<\uff5cend\u2581of\u2581sentence\uff5c>", EXACT, EXACT, NO_THINKING, NO_TOOLS
    ),
    "trl__glm4moe": Row("</s>", NO_STOP, NO_STOP, NO_STOP, NO_STOP),
    "trl__idefics3": Row("<end_of_utterance>", EXACT, EXACT, NO_THINKING, NO_CALLS, lead=" "),
    "trl__llama3": Row("<|eot_id|>", EXACT, EXACT, NO_THINKING, NO_CALLS),
    "trl__llava_next": Row("</s>", EXACT, EXACT, NO_THINKING, "no element 0", lead=" "),
    "trl__qwen3": Row("<|im_end|>", EXACT, EXACT, EXACT, EXACT, lead="<think>\n\n</think>\n\n"),
    "trl__qwen3_instruct_2507": Row("<|im_end|>", EXACT, EXACT, NO_THINKING, EXACT),
}

THOUGHT = {
    "llamacpp__Qwen-Qwen3-0.6B": "<think>\n{}\n</think>\n\n",
    "trl__qwen3": "<think>\n{}\n</think>\n\n",
    "mistral-common__v11_think": "<think>{}</think>",
    "mistral-common__v13_think": "[THINK]{}[/THINK]",
}

HERMES = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris <x>", "days": 3}}\n'
    "</tool_call>"
)
LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris <x>", "days": 3}}'
ARGS = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris <x>", "days": 3}'
# `'literal' + value|safe` escapes the literal: these templates do it, and so does transformers
_LISTED = (
    '[{&#34;name&#34;: &#34;get_weather&#34;, &#34;arguments&#34;: {"city": "Paris <x>", "days": 3}'
)
_WITH_ID = _LISTED + ", &#34;id&#34;: &#34;abcdefghi&#34;}]"
CALLS = {
    "axolotl__llama3_2_vision": LLAMA,
    "chujiezheng__qwen2.5-instruct": HERMES,
    "llamacpp__NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": HERMES,
    "llamacpp__Qwen-Qwen2.5-7B-Instruct": HERMES,
    "llamacpp__Qwen-Qwen3-0.6B": HERMES,
    "llamacpp__meta-llama-Llama-3.1-8B-Instruct": LLAMA,
    "llamacpp__mistralai-Mistral-Nemo-Instruct-2407": (
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris <x>", "days": 3}, '
        '"id": "abcdefghi"}]'
    ),
    "mistral-common__v11_think": (
        '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris <x>", "days": 3}'
    ),
    "mistral-common__v13": ARGS,
    "mistral-common__v13_think": ARGS,
    "mistral-common__v15": ARGS,
    "mistral-common__v2": "[TOOL_CALLS]" + _LISTED + "}]",
    "mistral-common__v3": "[TOOL_CALLS]" + _WITH_ID,
    "mistral-common__v3_spm": "[TOOL_CALLS] " + _WITH_ID,
    "mistral-common__v7_spm": "[TOOL_CALLS] " + _WITH_ID,
    "trl__qwen3": HERMES,
    "trl__qwen3_instruct_2507": HERMES,
}

QWEN3 = ("llamacpp__Qwen-Qwen3-0.6B", "trl__qwen3")
LLAVA = "axolotl__llava"


@pytest.fixture(scope="module")
def sources(data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row["chat_template"] for row in map(json.loads, lines)}


def expected(name: str, kind: str) -> list[list[str]]:
    """For each example, the text of each trained turn."""
    row = TABLE[name]
    first = "" if name in QWEN3 else row.lead
    if kind == "plain":
        # llava's own {% generation %} blocks end with a space and no stop token
        return [[row.lead + "Hello & co" + (" " if name == LLAVA else row.stop)]]
    if kind == "system":
        turns = [first + "Answer A", first + "Answer B", row.lead + "Answer C"]
        if name == LLAVA:  # the space before "USER" is one token with the user's "US"
            return [[turns[0], turns[1], turns[2] + " "]]
        return [[turn + row.stop for turn in turns]]
    if kind == "think":
        one = THOUGHT[name].format("hmm one") + "Answer A" + row.stop
        two = THOUGHT[name].format("hmm two") + "Answer B" + row.stop
        return [[one], [two]] if name in QWEN3 else [[one, two]]
    return [[CALLS[name] + row.stop, row.lead + "It is 21." + row.stop]]


KINDS = {"plain": PLAIN, "system": SYSTEM, "think": THINK, "tool": TOOLS}


@pytest.mark.parametrize("name", TABLE)
def test_mask_is_what_the_assistant_writes(name, sources, data_dir):
    template = template_of(data_dir, sources[name])
    for kind, conversation in KINDS.items():
        reason = getattr(TABLE[name], kind)
        if reason == EXACT:
            got = [trained(e, template.tokenizer) for e in template.examples(conversation)]
            assert got == expected(name, kind), kind
        else:
            with pytest.raises(ChatError, match=re.escape(reason)):
                template.examples(conversation)


def test_every_template_is_in_the_table(sources):
    assert set(sources) == set(TABLE)
