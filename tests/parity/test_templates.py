"""Rendered text, ids and masks against transformers' apply_chat_template."""

from __future__ import annotations

import datetime
import json

import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.render import ChatError, Renderer
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.types import Conversation
from tests.chat.samples import PLAIN, SYSTEM, THINK, TOOLS, say

pytestmark = pytest.mark.parity

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ODD = Conversation(
    (
        say("system", "  Spaces & <tags> </think> \n"),
        say("user", "\n<|im_end|>\tü𝄞 'quotes' \"double\"\r\n"),
        say("assistant", "<think>\ninline\n</think>\n\n {{ braces }} "),
        say("user", "again again again"),
        say("assistant", "again"),
    )
)
CALLED = Conversation(
    (
        *TOOLS.messages[:2],
        say("tool", '{"t": "ü"}', name="get_weather", tool_call_id="abcdefghi"),
        say("assistant", "With é.", reasoning_content="thought"),
    ),
    TOOLS.tools,
)
KINDS = {
    "plain": PLAIN,
    "system": SYSTEM,
    "think": THINK,
    "tool": TOOLS,
    "odd": ODD,
    "called": CALLED,
    "prompted": Conversation(SYSTEM.messages[:4]),
}


@pytest.fixture(scope="module")
def templates(data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["name"]: row["chat_template"] for row in map(json.loads, lines)}
    assert len(rows) == 54
    return rows


def theirs(source, messages, tools, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    text, _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        **TOKENS,
    )
    return text[0]


def raises_everywhere(source, conversation, prompt):
    """Whether transformers raises with content as text and as parts."""
    for parts in (False, True):
        messages = [dict(m) for m in conversation.messages]
        if parts:
            for m in messages:
                m["content"] = [{"type": "text", "text": m["content"]}]
        try:
            theirs(source, messages, list(conversation.tools) or None, prompt)
        except Exception:
            continue
        return False
    return True


def test_text_of_54_templates(templates):
    """Character by character: 54 templates, 7 conversations, with and without the prompt."""
    today = datetime.date.today().isoformat()
    same = refused = 0
    for name, source in templates.items():
        renderer = Renderer(source, TOKENS, {}, today)
        for kind, conversation in KINDS.items():
            for prompt in (False, True):
                try:
                    part = renderer.render(conversation, prompt=prompt)
                except ChatError:
                    assert raises_everywhere(source, conversation, prompt), (name, kind)
                    refused += 1
                    continue
                tools = list(conversation.tools) or None
                want = theirs(source, part.messages, tools, prompt)
                assert part.trace.text == want, (name, kind, prompt)
                same += 1
    assert same > 500, (same, refused)


def folder_with_template(data_dir, tmp_path, name, source):
    folder = tmp_path / name
    Tokenizer.load(data_dir / "data/tokenizers" / name).save(folder)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["minimind", "phi-3-mini", "gpt2"])
def test_ids_of_a_saved_tokenizer_with_its_template(name, data_dir, tmp_path):
    """What `save` writes opens in transformers, and apply_chat_template gives our ids."""
    from transformers import AutoTokenizer

    folder = data_dir / "data/tokenizers" / name
    tokenizer = Tokenizer.load(folder)
    source = tokenizer.chat_template or (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    saved = folder_with_template(data_dir, tmp_path, name, source)
    reference = AutoTokenizer.from_pretrained(saved)
    template = ChatTemplate.load(saved, Tokenizer.load(saved), ChatConfig())
    for conversation in (PLAIN, Conversation(SYSTEM.messages[:4])):
        messages = list(conversation.messages)
        for prompt in (False, True):
            want = reference.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
            text = template.render(conversation, add_generation_prompt=prompt)
            assert template.tokenizer.encode(text).ids == want
        prompt_ids = template.generation_prompt(messages)
        assert prompt_ids == reference.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )


def test_assistant_mask_of_generation_blocks(data_dir):
    """The mask of {% generation %} blocks is transformers' own, turn by turn."""
    from transformers import AutoTokenizer

    folder = data_dir / "golden/model"
    reference = AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.load(folder, Tokenizer.load(folder), ChatConfig())
    for conversation in (PLAIN, SYSTEM):
        want = reference.apply_chat_template(
            list(conversation.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (example,) = template.examples(conversation)
        assert example.tokens.tolist() == want["input_ids"]
        assert example.loss_weights.tolist() == want["assistant_masks"]
        assert 0 < example.loss_weights.sum() < len(example.tokens)
