"""A trace reused for another conversation is the trace that following it would have given."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from posttrain.chat.jinja import ChatEnvironment
from posttrain.chat.render import ChatError, Renderer
from posttrain.chat.steady import is_steady
from posttrain.types import Conversation

GOLDEN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|a|>' }}"
    "{% generation %}{{ m['content'] + '<|e|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|e|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ bos }}{{ m.role ~ ':' ~ m.content }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
)
EACH = {  # in a loop over the messages
    "a branch on the content": "{% if m.content == 'x' %}x{% else %}{{ m.content }}{% endif %}",
    "a branch on the text's length": "{% if m.content | length > 1 %}a{% endif %}{{ m.content }}",
    "a filter": "{{ m.content | trim }}",
    "a method": "{{ m.content.strip() }}",
    "a slice": "{{ m.content[1:] }}",
    "a choice in the output": "{{ 'x' if m.content else m.content }}",
    "the message whole": "{% if m == x %}a{% endif %}{{ m.content }}",
    "a key that is worked out": "{{ m[key] }}",
}
NOT_STEADY = {
    **{name: "{% for m in messages %}" + body + "{% endfor %}" for name, body in EACH.items()},
    "an order by content": "{% for m in messages | sort(attribute='content') %}"
    "{{ m.content }}{% endfor %}",
    "a test in the loop": "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "a variable of the content": "{% set x = messages[0].content %}{% if x == 'y' %}y{% endif %}",
    "another list": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "a macro": "{% macro f(m) %}{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ f(m) }}{% endfor %}",
}
TEXTS = ["", "x", "xx", "<|e|>", "a\nb", " x ", "|>:"]


def renderer(source: str) -> Renderer:
    return Renderer(source, {"bos": "<s>"}, {}, "2025-01-01")


def seen(rendered) -> tuple:
    runs = [(n, t.kind, t.owner, t.field, t.text, t.block) for n, t in rendered.trace.runs]
    return rendered.trace.text, runs, dict(rendered.trace.blocks), rendered.roles, rendered.messages


TWICE = (
    "{% for m in messages %}{{ m.content }}{{ m.content }}{{ between }}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "known"), [(GOLDEN, 4), (PLAIN, 4), (TWICE, 0)], ids=["golden", "plain", "twice"]
)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_reused_trace_is_the_trace(source: str, known: int, prompt: bool) -> None:
    """Every pair of texts, after others of the same structure, against a renderer that is new."""
    used = renderer(source)
    for user, answer in itertools.product(TEXTS, TEXTS):
        messages = (
            {"role": "system", "content": "s"},
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer, "weight": 0.5},
        )
        talk = Conversation(messages)
        fresh = renderer(source)
        assert seen(used.render(talk, prompt=prompt)) == seen(fresh.render(talk, prompt=prompt))
    assert len(used._known) == known  # with and without text, of the user and of the assistant


def test_the_trace_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    used = renderer(GOLDEN)

    def talk(a, b):
        return Conversation(({"role": "user", "content": a}, {"role": "assistant", "content": b}))

    used.render(talk("a", "b"))
    monkeypatch.setattr(used._traced, "trace", None)  # following another would raise
    assert used.render(talk("c", "dd")).trace.text == "<|user|>c<|e|><|a|>dd<|e|>\n"
    with pytest.raises(ChatError, match="cannot be followed"):
        used.render(talk("", "dd"))


@pytest.mark.parametrize("name", NOT_STEADY)
def test_a_template_that_looks_at_contents_is_followed_each_time(name: str) -> None:
    assert not is_steady(ChatEnvironment("2025-01-01").parse(NOT_STEADY[name]))


def test_the_golden_templates_kind_is_steady_and_tools_or_variables_are_followed(
    data_dir: Path,
) -> None:
    source = (data_dir / "golden" / "model" / "chat_template.jinja").read_text()
    assert is_steady(ChatEnvironment("2025-01-01").parse(source))
    used = renderer(source)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    used.render(Conversation(messages, template_kwargs={"x": 1}))
    named = tuple({**m, "name": "n"} for m in messages)
    used.render(Conversation(named))
    assert not used._known


def test_every_steady_template_of_real_models_gives_the_same_when_reused(data_dir: Path) -> None:
    lines = (data_dir / "data" / "chat_templates.jsonl").read_text().splitlines()
    environment, steady = ChatEnvironment("2025-01-01"), []
    for source in (json.loads(line)["chat_template"] for line in lines):
        if is_steady(environment.parse(source)):
            steady.append(source)
    assert steady
    for source in steady:
        used = renderer(source)
        for text in TEXTS[1:]:
            talk = Conversation(
                ({"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]})
            )
            assert seen(used.render(talk)) == seen(renderer(source).render(talk))


def test_what_does_not_fit_the_rendered_text_is_not_reused() -> None:
    used = renderer(GOLDEN)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    used.render(Conversation(tuple(messages)))
    (known,) = used._known.values()
    assert known.fill(messages, "<|user|>a<|e|><|a|>b<|e|>\n") is not None
    assert known.fill(messages, "<|user|>b<|e|><|a|>a<|e|>\n") is None
