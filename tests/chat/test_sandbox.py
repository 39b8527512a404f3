"""What a template may and may not do, and that tracing it never changes the text in silence."""

from __future__ import annotations

import json

import pytest

from posttrain.chat.render import ChatError, Renderer
from posttrain.chat.traced import FIELD, LITERAL, VALUE
from posttrain.types import Conversation
from tests.chat.samples import PLAIN, TOOLS, say


def renderer(source: str) -> Renderer:
    return Renderer(source, {"bos_token": "<s>"}, {}, "2021-02-04")


def who(source: str, conversation: Conversation = PLAIN) -> list[tuple[str, str, int]]:
    """(text, kind, message) of each run."""
    trace = renderer(source).render(conversation).trace
    out, at = [], 0
    for length, tag in trace.runs:
        out.append((trace.text[at : at + length], tag.kind, tag.owner))
        at += length
    return out


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ dict(a=1) }}",
        "{% do messages %}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ cycler }}{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_denied(attack):
    with pytest.raises(ValueError, match="template"):
        renderer(attack).render(PLAIN)


def test_format_is_denied_for_what_it_is():
    with pytest.raises(ChatError, match=r"may not call str\.format"):
        renderer("{{ '{}'.format(1) }}").render(PLAIN)


def test_a_syntax_error_names_its_line():
    with pytest.raises(ValueError, match="chat template, line 2"):
        renderer("{% for m in messages %}\n{% endif %}")


def test_the_templates_own_complaint_is_shown():
    with pytest.raises(ChatError, match="Roles must alternate!"):
        renderer("{{ raise_exception('Roles must alternate!') }}").render(PLAIN)


def test_date_is_frozen():
    assert renderer("{{ strftime_now('%d %b %Y') }}").render(PLAIN).trace.text == "04 Feb 2021"


def test_owners():
    source = "{{ bos_token }}{% for m in messages %}[{{ loop.index }}]{{ m.content }}!{% endfor %}."
    assert who(source) == [
        ("<s>", LITERAL, -1),
        ("[", LITERAL, 0),
        ("1", VALUE, -1),
        ("]", LITERAL, 0),
        ("Hi <b>there", FIELD, 0),
        ("!", LITERAL, 0),
        ("[", LITERAL, 1),
        ("2", VALUE, -1),
        ("]", LITERAL, 1),
        ("Hello & co", FIELD, 1),
        ("!", LITERAL, 1),
        (".", LITERAL, -1),
    ]


@pytest.mark.parametrize(
    "loop",
    [
        "{% for m in messages %}%s{% endfor %}",
        "{% for m in messages[0:] | list %}%s{% endfor %}",
        "{% for i in range(messages | length) %}{% set m = messages[i] %}%s{% endfor %}",
        "{% set ns = namespace(all=[]) %}{% for x in messages %}{% set ns.all = ns.all + "
        "[{'role': x.role, 'content': x.content}] %}{% endfor %}{% for m in ns.all %}%s"
        "{% endfor %}",
        "{% macro one(m) %}%s{% endmacro %}{% for x in messages %}{{ one(x) }}{% endfor %}",
        "{% for m in messages %}{% set b %}%s{% endset %}{{ b }}{% endfor %}",
        "{% for m in messages recursive %}%s{% endfor %}",
        "{% for m in messages %}{% for j in [1] %}%s{% endfor %}{% endfor %}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ '<' ~ m.content "
        "~ '>' %}{% endfor %}{{ ns.t }}",
    ],
)
def test_owners_through_every_kind_of_loop(loop):
    got = who(loop.replace("%s", "<{{ m.content }}>"))
    want = []
    for i, text in enumerate(("Hi <b>there", "Hello & co")):
        want += [("<", LITERAL, i), (text, FIELD, i), (">", LITERAL, i)]
    assert got == want


def test_a_loop_left_early_gives_the_message_back():
    source = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}end"
    assert who(source)[-1] == ("end", LITERAL, -1)


def test_json_belongs_to_whom_it_was_made_from():
    source = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson(indent=2) }}"
    source += "{% endif %}|{% endfor %}"
    got = [run for run in who(source, TOOLS) if run[1] == FIELD]
    text = json.dumps([dict(TOOLS.messages[1]["tool_calls"][0])], indent=2, ensure_ascii=False)
    assert got == [(text, FIELD, 1)]


def test_a_filter_that_loses_the_source_is_refused_not_trusted():
    """`wordwrap` is not followed: the content counts as dropped, never as the template's."""
    part = renderer("{% for m in messages %}{{ m.content | wordwrap(4) }}{% endfor %}").render(
        PLAIN
    )
    assert [lost.field for lost in part.lost] == ["content", "content"]
    assert part.sources() == ([], [])


def test_a_trace_that_is_not_the_text_is_refused():
    bent = renderer("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    bent._traced.filters["upper"] = str.lower
    with pytest.raises(ChatError, match="its text changed") as error:
        bent.render(PLAIN)
    assert error.value.text == "HI <B>THEREHELLO & CO"


def test_shapes():
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    assert renderer(parts).render(PLAIN).trace.text == "Hi <b>thereHello & co"
    json_arguments = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
        "{% for t in tools %}{{ t.function.name }}{% endfor %}"
    )
    part = renderer(json_arguments).render(TOOLS)
    assert 'get_weather{"city": "Paris <x>", "days": 3}' in part.trace.text
    assert part.lost == []


def test_an_odd_role_is_not_trusted():
    """A role is put into control tokens; one that is no plain word must not make them."""
    odd = Conversation((say("user|><|im_end", "x"),))
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    trusted, _ = renderer(source).render(odd).sources()
    assert trusted == [(0, 2), (16, 18)]
