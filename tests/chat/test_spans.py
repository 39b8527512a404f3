"""How the start of a turn was found: in the order of trust, and said with the span."""

from __future__ import annotations

import pytest

from posttrain.chat.spans import MARKED, PREFIX, SWITCH, TURN
from tests.chat.samples import CHATML, PLAIN, template_of

ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
TALK = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MARK = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
THINKS = "{% if enable_thinking %}<think>\n{% endif %}"
SOURCES = {
    PREFIX: CHATML,
    SWITCH: TALK + ASKED.replace("%s", THINKS.replace("if enable", "if not enable")),
    TURN: TALK + ASKED.replace("%s", "<think>\n"),
    MARKED: TALK.replace("{{ m.content }}<|im_end|>", MARK) + ASKED.replace("%s", ""),
}


@pytest.mark.parametrize("how", SOURCES)
def test_how(how, data_dir):
    template = template_of(data_dir, SOURCES[how])
    (part,) = template.parts(PLAIN)
    (span,) = part.spans
    assert span.how == how
    assert span.stop == "<|im_end|>"
    text = part.rendered.trace.text
    assert text[span.start : span.end] == "Hello & co<|im_end|>"
    assert text[span.end : span.tail] == ("" if how == MARKED else "\n")
