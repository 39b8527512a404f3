"""A small made-up world that a tiny model can learn in minutes: what `posttrain demo` trains on.

Forty people have a home, a food and a hat each; besides them there are running sums of one-digit
numbers. The world is told twice: as prose, transcripts and worked sums for a base model
(`write_texts`), and as conversations with system prompts and second turns (`write_chats`). No text
comes from outside: everything is a function of the seed.

Trained and held out. A question has a *key*: the sum itself, or for a fact the system prompt, the
earlier questions and this one. `is_held_out` goes by a hash of the key, so the split is the same in
every run and for every seed. No turn of a training conversation and no transcript or worked sum of
the base text is held out; a `Probe` asks what is. The facts themselves are in the prose (nobody can
guess where a person lives): what is held out is being asked for one in just this way.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ivo", "Jan"),
    *("Kim", "Lea", "Max", "Nora", "Otto", "Pia", "Quinn", "Rosa", "Sam", "Tess"),
    *("Ugo", "Vera", "Will", "Xena", "Yara", "Zoe", "Abe", "Bela", "Carl", "Dora"),
    *("Emil", "Faye", "Gus", "Hugo", "Iris", "Joel", "Kate", "Lars", "Mona", "Nils"),
)
VALUES = {
    "home": ("Rome", "Oslo", "Paris", "Cairo", "Lima", "Delhi", "Quito", "Tokyo"),
    "food": ("soup", "rice", "bread", "plums", "fish", "beans", "cake", "eggs"),
    "hat": ("red", "blue", "green", "black", "white", "pink", "brown", "grey"),
}
# the first phrasing of each kind is the one that a chat answer uses
PHRASINGS = {
    "home": (
        "{name} lives in {value}.",
        "The home of {name} is in {value}.",
        "{value} is home to {name}.",
    ),
    "food": (
        "{name} eats {value}.",
        "The food of {name} is {value}.",
        "For dinner {name} has {value}.",
    ),
    "hat": (
        "{name} wears a {value} hat.",
        "The hat of {name} is {value}.",
        "A {value} hat is on {name}.",
    ),
}
QUESTIONS = {
    "home": ("Where does {name} live?", "What is the home of {name}?", "In what city is {name}?"),
    "food": ("What does {name} eat?", "What is the food of {name}?", "Which food has {name}?"),
    "hat": (
        "What hat does {name} wear?",
        "What colour is the hat of {name}?",
        "Which hat is on {name}?",
    ),
}
STYLES = {
    "none": "",
    "capitals": "Answer in capitals.",
    "brief": "Answer briefly.",
    "sentence": "Answer in a full sentence.",
}
THINK = "Think first."
SUM = "Work out "
TURN_MARKS = {"user": "Question:", "assistant": "Answer:"}  # of the transcripts in the base text
PROBE_KINDS = ("fact", "second turn", "sum", "sum, thinking")
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class World:
    """facts[name][kind] is the value: facts["Ada"]["home"] == "Oslo"."""

    seed: int
    facts: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Probe:
    """A held-out question: the messages to answer, the right value, the whole right reply."""

    kind: str  # one of PROBE_KINDS
    messages: tuple[dict[str, str], ...]
    value: str
    reply: str  # what training would have shown, without the thinking


@dataclass(frozen=True)
class _Ask:
    question: str
    reply: str
    value: str
    thinking: str = ""  # the steps of a sum


@dataclass(frozen=True)
class _Chat:
    system: str
    asks: tuple[_Ask, ...]

    def held_out(self) -> list[bool]:
        """Per turn. A sum's key is the sum; a fact's key is all that was said before the answer."""
        questions = [ask.question for ask in self.asks]
        return [
            is_held_out(
                ask.question if ask.thinking else "\n".join([self.system, *questions[: i + 1]])
            )
            for i, ask in enumerate(self.asks)
        ]

    def messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for ask in self.asks:
            messages.append({"role": "user", "content": ask.question})
            answer = {"role": "assistant", "content": ask.reply}
            if self.system == THINK:
                answer["reasoning_content"] = ask.thinking
            messages.append(answer)
        return messages


def make_world(seed: int = 0) -> World:
    """The same seed gives the same world, on any machine."""
    rng = random.Random(f"world {seed}")
    return World(
        seed,
        {name: {kind: rng.choice(values) for kind, values in VALUES.items()} for name in NAMES},
    )


def is_held_out(key: str) -> bool:
    """One key in HELD_OUT_SHARE, by its hash alone."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def write_texts(path: str | Path, world: World, *, documents: int, lines: int = 1000) -> None:
    """JSONL of {"text": ...}: long documents of prose, transcripts and worked sums.

    The documents are long on purpose: a base model sees text that goes on, and hardly ever an end.
    """
    rng = random.Random(f"texts {world.seed}")
    texts = (" ".join(_line(world, rng) for _ in range(lines)) for _ in range(documents))
    _write(path, ({"text": text} for text in texts))


def write_chats(path: str | Path, world: World, *, conversations: int, sums: float = 0.4) -> None:
    """JSONL of {"messages": [...]} to train on; `sums` is the share that asks for a sum."""
    rng = random.Random(f"chats {world.seed}")

    def trained() -> dict[str, list[dict[str, str]]]:
        while True:
            kind = rng.choice(PROBE_KINDS[2:]) if rng.random() < sums else None
            chat = _chat(world, rng, kind or ("second turn" if rng.random() < 0.35 else "fact"))
            if not any(chat.held_out()):
                return {"messages": chat.messages()}

    _write(path, (trained() for _ in range(conversations)))


def probes(world: World, *, each: int, kinds: Iterable[str] = PROBE_KINDS) -> list[Probe]:
    """`each` different held-out questions of every kind; their earlier turns are not held out."""
    found: list[Probe] = []
    for kind in kinds:
        rng = random.Random(f"probes {kind} {world.seed}")
        of_kind: dict[tuple[str, ...], Probe] = {}
        while len(of_kind) < each:
            chat = _chat(world, rng, kind)
            *earlier, last = chat.held_out()
            if last and not any(earlier):
                *asked, _ = chat.messages()
                ask = chat.asks[-1]
                of_kind[tuple(m["content"] for m in asked)] = Probe(
                    kind, tuple(asked), ask.value, ask.reply
                )
        found += of_kind.values()
    return found


def plain_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the base text writes such things, up to where the next answer starts."""
    lines = [
        m["content"] if m["role"] == "system" else f"{TURN_MARKS[m['role']]} {m['content']}"
        for m in messages
    ]
    return " ".join([*lines, TURN_MARKS["assistant"]])


def is_right(reply: str, probe: Probe) -> bool:
    """Does the first sentence of the reply say the right value, whatever its form?"""
    first = reply.strip().split(".")[0]
    return probe.value.lower() in re.findall(r"[a-z]+|-?[0-9]+", first.lower())


def is_as_asked(reply: str, probe: Probe) -> bool:
    """Is the reply right to the letter: the value, in the form that the system prompt wants?"""
    return reply.strip() == probe.reply


def _line(world: World, rng: random.Random) -> str:
    """One line of base text: a fact told (50%), a worked sum (25%), a transcript (25%)."""
    dice = rng.random()
    if dice < 0.5:
        name, kind = rng.choice(NAMES), rng.choice(tuple(VALUES))
        return rng.choice(PHRASINGS[kind]).format(name=name, value=world.facts[name][kind])
    while True:
        chat = _Chat("", (_ask_sum(rng) if dice < 0.85 else _ask_fact(world, rng),))
        if not any(chat.held_out()):
            break
    (ask,) = chat.asks
    if dice < 0.75:
        return f"{ask.question.removeprefix(SUM).removesuffix('.')}: {ask.thinking}."
    return f"{plain_prompt(chat.messages()[:-1])} {ask.reply}"


def _chat(world: World, rng: random.Random, kind: str) -> _Chat:
    if kind in ("sum", "sum, thinking"):
        return _Chat("" if kind == "sum" else THINK, (_ask_sum(rng),))
    style = rng.choice(tuple(STYLES))
    name, about = rng.choice(NAMES), rng.choice(tuple(VALUES))
    asks = [_ask_fact(world, rng, style, name, about)]
    if kind == "second turn":
        other = rng.choice([n for n in NAMES if n != name])
        reply = _reply(world, style, other, about)
        asks.append(_Ask(f"And {other}?", reply, world.facts[other][about]))
    return _Chat(STYLES[style], tuple(asks))


def _ask_fact(
    world: World, rng: random.Random, style: str = "none", name: str = "", kind: str = ""
) -> _Ask:
    name, kind = name or rng.choice(NAMES), kind or rng.choice(tuple(VALUES))
    question = rng.choice(QUESTIONS[kind]).format(name=name)
    return _Ask(question, _reply(world, style, name, kind), world.facts[name][kind])


def _reply(world: World, style: str, name: str, kind: str) -> str:
    value = world.facts[name][kind]
    sentence = PHRASINGS[kind][0].format(name=name, value=value)
    if style == "brief":
        return f"{value.capitalize()}."
    return sentence.upper() if style == "capitals" else sentence


def _ask_sum(rng: random.Random) -> _Ask:
    """A running sum of 3 to 5 one-digit numbers, every total between 0 and 20."""
    total = rng.randint(1, 9)
    terms, steps = str(total), []
    for _ in range(rng.randint(2, 4)):
        number, sign = rng.randint(1, 9), rng.choice("+-")
        if not 0 <= total + int(sign + str(number)) <= 20:
            sign = "-" if sign == "+" else "+"
        after = total + int(sign + str(number))
        terms += f"{sign}{number}"
        steps.append(f"{total}{sign}{number}={after}")
        total = after
    return _Ask(f"{SUM}{terms}.", f"{total}.", str(total), " ".join(steps))


def _write(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Written beside and renamed, so that a file that exists is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
    beside.replace(path)
