"""Traced strings: the text of every operation is a str's, each character keeps its source."""

from __future__ import annotations

import markupsafe
import pytest

from posttrain.chat.traced import (
    FIELD,
    UNKNOWN,
    Tag,
    Traced,
    concat,
    escape,
    mark_safe,
    runs_of,
    tagged,
)


def sample(text: str) -> tuple[Traced, dict[str, Tag]]:
    """A string whose every character has its own tag (characters must differ)."""
    tags = {character: Tag(FIELD, i, text=character) for i, character in enumerate(text)}
    return concat([tagged(character, tags[character]) for character in text]), tags


def sources(text: str) -> list[Tag]:
    return [tag for length, tag in runs_of(text) for _ in range(length)]


TEXT = " aBc\nd,e\tf G "

OPERATIONS = {
    "slice": lambda s: s[2:7],
    "backwards": lambda s: s[::-1],
    "step": lambda s: s[1:9:3],
    "negative": lambda s: s[-4:-1],
    "index": lambda s: s[3],
    "last": lambda s: s[-1],
    "strip": lambda s: s.strip(),
    "strip chars": lambda s: s.strip(" aG"),
    "lstrip": lambda s: s.lstrip(),
    "rstrip": lambda s: s.rstrip(),
    "removeprefix": lambda s: s.removeprefix(" a"),
    "removesuffix": lambda s: s.removesuffix("G "),
    "split": lambda s: s.split(),
    "split sep": lambda s: s.split(","),
    "split limit": lambda s: s.split(None, 1),
    "rsplit": lambda s: s.rsplit(None, 2),
    "rsplit sep": lambda s: s.rsplit("c\n", 1),
    "partition": lambda s: s.partition("d,"),
    "rpartition": lambda s: s.rpartition(" "),
    "no partition": lambda s: s.partition("zz"),
    "splitlines": lambda s: s.splitlines(),
    "keepends": lambda s: s.splitlines(True),
    "lower": lambda s: s.lower(),
    "upper": lambda s: s.upper(),
    "title": lambda s: s.title(),
    "capitalize": lambda s: s.capitalize(),
    "iterate": lambda s: list(s),
    "add": lambda s: s + s,
    "times": lambda s: s * 2,
    "replace by own": lambda s: s.replace("B", s[8:9]),
    "replace away": lambda s: s.replace("d,e", ""),
    "replace nothing": lambda s: s.replace("zz", "y"),
    "join": lambda s: s[1:2].join([s[3:5], s[5:8]]),
    "str": lambda s: str(s),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    operation = OPERATIONS[name]
    string, tags = sample("".join(dict.fromkeys(TEXT)))
    plain = str.__str__(string)
    got, want = operation(string), operation(plain)
    if isinstance(want, str):
        got, want = [got], [want]
    assert [str.__str__(part) for part in got] == list(want)
    back = {c.lower(): tag for c, tag in tags.items()}
    for part in got:
        assert len(sources(part)) == len(part)
        assert sources(part) == [back[c.lower()] for c in part]


def test_plain_text_beside_it_is_unknown():
    string, _ = sample("ab")
    for text in ("x" + string, string + "x", string.replace("a", "x"), string.join(["x", "y"])):
        assert isinstance(text, Traced)
        assert [tag is UNKNOWN for tag in sources(text)] == [c in "xy" for c in text]


def test_bad_indices_raise_as_a_str_does():
    string, _ = sample("ab")
    with pytest.raises(IndexError):
        string[2]
    with pytest.raises(TypeError):
        string["a"]
    with pytest.raises(TypeError):
        string + 1  # pyright: ignore


def test_markup_escapes_what_is_put_beside_it():
    string, _ = sample("a<b>&'")
    other, tags = sample('"<x')
    safe, reference = mark_safe(string), markupsafe.Markup("a<b>&'")
    for got, want in (
        (other + safe, '"<x' + reference),
        (safe + other, reference + '"<x'),
        (safe.join([other, safe]), reference.join(['"<x', reference])),
        (safe.replace("b", other), reference.replace("b", '"<x')),
        (safe.split("b")[1] + other, reference.split("b")[1] + '"<x'),
        (escape(string), markupsafe.escape("a<b>&'")),
    ):
        assert str.__str__(got) == str.__str__(str(want))
        assert sum(length for length, _ in runs_of(got)) == len(got)
    assert sources(escape(other))[:5] == [tags['"']] * 5  # &#34;
