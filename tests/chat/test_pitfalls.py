"""Errors that bit other projects, one test each; the numbers are those of the public reports."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.types import Conversation, Text
from tests.chat.samples import (
    CHATML,
    PLAIN,
    SYSTEM,
    THINK,
    TOOLS,
    byte_tokenizer,
    say,
    template_of,
    trained,
)


@pytest.fixture(scope="module")
def sources(data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row["chat_template"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def chatml(data_dir):
    return template_of(data_dir, CHATML)


def test_pad_equal_to_eos_does_not_mask_eos(data_dir):
    """trl #6357, #1623, #3091: masking PAD by its id masks the stop token too."""
    text = (data_dir / "data/tokenizers/minimind/tokenizer.json").read_text("utf-8")
    tokenizer = Tokenizer(text, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    assert tokenizer.pad_id == tokenizer.eos_id
    (example,) = ChatTemplate(CHATML, tokenizer, ChatConfig()).examples(SYSTEM)
    ends = example.loss_weights[example.tokens == tokenizer.eos_id]
    assert ends.tolist() == [0, 0, 1, 0, 1, 0, 1]


def test_template_without_generation_blocks_has_a_mask(chatml):
    """trl #4201, marin #7237: the mask was all zeros, in silence."""
    assert "generation %}" not in CHATML
    (example,) = chatml.examples(PLAIN)
    assert trained(example, chatml.tokenizer) == ["Hello & co<|im_end|>"]


def test_stop_token_is_trained(sources, data_dir):
    """trl #5988. Phi-3 ends each turn with one token and the conversation with another (#5109)."""
    phi = template_of(data_dir, sources["llamacpp__microsoft-Phi-3.5-mini-instruct"])
    (example,) = phi.examples(SYSTEM)
    want = [f"Answer {letter}<|end|>" for letter in "ABC"]
    assert trained(example, phi.tokenizer) == want
    assert phi.tokenizer.token_id("<|end|>") in phi.stop_ids


def test_bos_is_never_doubled(data_dir):
    """trl #1400, #1114, #3328; open-r1 #462."""
    folder = data_dir / "data/models/stories260K"
    tokenizer = Tokenizer.load(folder).with_added_tokens(["<|im_start|>", "<|im_end|>"])
    assert tokenizer.adds_bos
    template = ChatTemplate("{{ bos_token }}" + CHATML, tokenizer, ChatConfig())
    (example,) = template.examples(PLAIN)
    assert example.tokens.tolist().count(1) == 1
    assert template.generation_prompt([PLAIN.messages[0]]).count(1) == 1
    assert not [line for line in template.check() if "BOS" in line]
    for text in ("Once upon a time", "<s>Once upon a time"):
        opened = ChatTemplate(CHATML, tokenizer, ChatConfig(text_control_tokens=True))
        tokens = opened.text_example(Text(text)).tokens.tolist()
        assert tokens.count(1) == 1
        assert tokens[0] == 1
        assert tokens[-1] == tokenizer.eos_id
    doubled = ChatTemplate("<s>{{ bos_token }}" + CHATML, tokenizer, ChatConfig())
    assert any("twice" in line for line in doubled.check())


def test_dropped_thinking_is_split_or_refused(sources, data_dir):
    """verl #6854, trl #6124: history loses its thinking, so a prefix is no prefix."""
    qwen = template_of(data_dir, sources["trl__qwen3"])
    first, second = qwen.examples(THINK)
    assert trained(first, qwen.tokenizer) == ["<think>\nhmm one\n</think>\n\nAnswer A<|im_end|>"]
    assert trained(second, qwen.tokenizer) == ["<think>\nhmm two\n</think>\n\nAnswer B<|im_end|>"]
    assert "hmm one" not in qwen.tokenizer.decode(second.tokens)
    # each begins with the very prompt that the model will be asked with
    for k, example in ((1, first), (3, second)):
        prompt = qwen.generation_prompt(THINK.messages[:k])
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.loss_weights[: len(prompt)].any()
    strict = template_of(data_dir, sources["trl__qwen3"], dropped_thinking="refuse")
    with pytest.raises(ChatError, match=r"drops the thinking of messages \[1\]"):
        strict.examples(THINK)


def test_spans_are_mapped_by_offsets_not_by_decoding(chatml):
    """MaxText's prompt masking: text decoded and encoded again drifts by a token."""
    user, answer = "  naïve 𝄞\r\n中文 \u200d", "é𝄞 — 中文\n\n  ok 🧑‍🚀"
    (example,) = chatml.examples(Conversation((say("user", user), say("assistant", answer))))
    assert trained(example, chatml.tokenizer) == [answer + "<|im_end|>"]
    prompt = chatml.generation_prompt([say("user", user)])
    assert np.flatnonzero(example.loss_weights)[0] == len(prompt)


def test_default_system_prompt_is_not_repeated_and_tool_text_does_not_vanish(sources, data_dir):
    """MaxText: each turn rendered alone repeats BOS and the default system prompt."""
    qwen = template_of(data_dir, sources["chujiezheng__qwen2.5-instruct"])
    (example,) = qwen.examples(Conversation(SYSTEM.messages[1:]))
    text = qwen.tokenizer.decode(example.tokens)
    assert text.count("<|im_start|>system") == 1
    (example,) = qwen.examples(TOOLS)
    assert '{"t": 21}' in qwen.tokenizer.decode(example.tokens)
    chatty = "{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ChatError, match="drops"):
        template_of(data_dir, chatty).examples(TOOLS)


def test_tool_text_is_not_trained(sources, data_dir):
    """Search-R1 #21: tokens that a tool returned counted in the loss."""
    for name in ("trl__qwen3", "mistral-common__v13", "llamacpp__meta-llama-Llama-3.1-8B-Instruct"):
        template = template_of(data_dir, sources[name])
        for example in template.examples(TOOLS):
            assert "21}" not in "".join(trained(example, template.tokenizer))


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
TURN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BEFORE = "{% if loop.index0 %}{{ messages[loop.index0 - 1].content }}{% endif %}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Re: " + BEFORE + " {{ m.content }}", r"message 0 \(user\) stands inside the turn"),
        ("{% generation %}" + BEFORE + "{{ m.content }}{% endgeneration %}", "message 0"),
        ("{{ m.content }} re " + BEFORE, "no stop token"),
        ("{{ m.content }}{% if loop.first %}{{ messages[1].content }}{% endif %}", "matches"),
        ("{{ m.content }}<|im_end|> again {{ m.content }}", "in the middle of message 1"),
    ],
)
def test_text_of_another_in_a_turn_is_refused(body, reason, data_dir):
    """And the assistant's own text outside its turn."""
    with pytest.raises(ChatError, match=reason):
        template_of(data_dir, TURN.replace("%s", body)).examples(PLAIN)


def test_a_turn_ends_with_its_first_stop(data_dir):
    twice = template_of(data_dir, TURN.replace("%s", "{{ m.content }}<|im_end|> "))
    (example,) = twice.examples(PLAIN)
    assert trained(example, twice.tokenizer) == ["Hello & co<|im_end|>"]


def test_the_first_token_has_no_weight(data_dir):
    """Nothing comes before it that it could be predicted from."""
    template = template_of(data_dir, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    (example,) = template.examples(Conversation((say("assistant", "Hello there"),)))
    assert example.loss_weights[0] == 0
    assert example.loss_weights[1:].all()


def test_generation_prompts_drop_nothing_either(chatml):
    with pytest.raises(ChatError, match="drops the tools"):
        chatml.generation_prompt([say("user", "Hi")], tools=TOOLS.tools)


def test_typed_control_tokens_are_text(chatml):
    """A text smuggles no control token (see test_control_tokens for every way to try)."""
    talk = Conversation((say("user", "a<|im_end|>b"), say("assistant", "c")))
    (example,) = chatml.examples(talk)
    assert example.tokens.tolist().count(chatml.tokenizer.token_id("<|im_end|>")) == 2


@pytest.mark.parametrize("cfg", [{"train_on": "last"}, {}])
def test_a_row_with_nothing_to_train_is_an_error(cfg, data_dir):
    """trl #3382, #6548, open-instruct #1625: it became a NaN."""
    template = template_of(data_dir, CHATML, **cfg)
    muted = Conversation((say("user", "Hi"), say("assistant", "Hello", weight=0)))
    silent = Conversation((say("user", "Hi there"),))
    for talk in (muted, silent):
        with pytest.raises(ChatError, match="nothing to train") as error:
            template.examples(talk)
        assert "Hi" in error.value.text
    with pytest.raises(ChatError, match="nothing to train"):
        template.text_example(Text(completion="", prompt="Hi"))


def test_golden_ids_and_masks(data_dir):
    """20 conversations through the golden model's own template and tokenizer, made by TRL."""
    folder = data_dir / "golden"
    template = ChatTemplate.load(folder / "model", Tokenizer.load(folder / "model"), ChatConfig())
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text("utf-8").splitlines()]
    golden = json.loads((folder / "logps_20.json").read_text("utf-8"))
    assert len(golden) == 20
    for want in golden:
        talk = Conversation(tuple(rows[want["index"]]["messages"]))
        (example,) = template.examples(talk)
        assert example.tokens.tolist() == want["input_ids"]
        assert example.loss_weights.tolist() == want["assistant_mask"]
        (batched,) = template.examples_batch([talk])[0]  # pyright: ignore
        assert batched.tokens.tolist() == want["input_ids"]
        assert batched.loss_weights.tolist() == want["assistant_mask"]


def test_a_tokenizer_without_eos_cannot_end_a_text(data_dir):
    template = ChatTemplate(CHATML, byte_tokenizer(data_dir, eos=""), ChatConfig())
    with pytest.raises(ChatError, match="no EOS token"):
        template.text_example(Text("a"))
