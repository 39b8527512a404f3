"""What check() says of a template: where training and generation disagree, what is refused."""

from __future__ import annotations

import json

import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from tests.chat.samples import CHATML, byte_tokenizer, template_of


@pytest.fixture(scope="module")
def sources(data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row["chat_template"] for row in map(json.loads, lines)}


def has(lines: list[str], *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in lines)


def test_dropped_fields_are_said(data_dir):
    lines = template_of(data_dir, CHATML).check()
    assert has(lines, "thinking conversations are refused", "drops the thinking")
    assert has(lines, "tool conversations are refused", "tool_calls of message 1")
    assert len(lines) == 2


def test_no_prefix_in_text(sources, data_dir):
    """The prompt opens thinking, the training text has none."""
    name = "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Llama-8B"
    lines = template_of(data_dir, sources[name]).check()
    assert has(lines, "plain", "no prefix of the training text", "First answer.")


def test_no_prefix_in_tokens(data_dir):
    """Text is a prefix, tokens are not: the prompt ends with a space that joins the next word."""
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = template_of(data_dir, source)
    lines = template.check()
    assert has(lines, "plain", "tokens of the generation prompt are no prefix")
    clean = template_of(data_dir, source.replace(": ", ":\n")).check()
    assert not has(clean, "no prefix")


def test_thinking_switch(data_dir):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
    )
    assert has(template_of(data_dir, source).check(), "another thinking mode")


def test_generation_blocks(data_dir):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %} {{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    lines = template_of(data_dir, source).check()
    assert has(lines, "plain", "ends with no stop token")
    moved = source.replace("{% generation %} ", " {% generation %}")
    lines = template_of(data_dir, moved).check()
    assert has(lines, "plain", "block begins with 'First answer.", "generation with ' First")


def test_tokens_that_the_vocabulary_lacks(data_dir):
    template = ChatTemplate(
        CHATML.replace("im_end", "done"), byte_tokenizer(data_dir), ChatConfig()
    )
    assert has(template.check(), "'<|done|>', which is no token of the tokenizer")


def test_bos_that_the_template_leaves_out(data_dir):
    tokenizer = Tokenizer.load(data_dir / "data/models/stories260K")
    tokenizer = tokenizer.with_added_tokens(["<|im_start|>", "<|im_end|>"])
    lines = ChatTemplate(CHATML, tokenizer, ChatConfig()).check()
    assert has(lines, "begins a text with BOS ('<s>'), the template does not")


def test_a_tokenizer_class_with_a_pipeline_of_its_own(data_dir):
    folder = data_dir / "data/tokenizers/phi-3-mini"
    template = ChatTemplate.load(folder, Tokenizer.load(folder), ChatConfig())
    assert has(template.check(), "LlamaTokenizer with legacy: false")
