"""A small made-up world that a tiny model can learn in minutes: what `posttrain demo` trains on.

Forty people have a home, a food and a hat each; besides them there are running sums of one-digit
numbers. The world is told four times: as prose, transcripts and worked sums for a base model
(`write_texts`), as conversations with system prompts and second turns (`write_chats`), as pairs of
answers to one prompt (`write_pairs`), and as sums to find the answer of (`write_sums`). No text
comes from outside: everything is a function of the seed.

What is preferred. Asked about people without a system prompt, the conversations greet in every
fifth answer, at random. The pairs prefer a greeting in the first answer and none after it or with a
sum, and what a system prompt asks for to any other form. Both answers of a pair say the right
value: only their form differs.

What is rewarded. Asked for a sum without a system prompt, the conversations work it out in every
fifth answer, at random, and else say the result at once, which the model mostly gets wrong. The
prompts of `write_sums` know the result alone: that working it out is what helps is left to find.

Trained and held out. A question has a *key*: the sum itself, or for a fact the system prompt, the
earlier questions and this one. `is_held_out` goes by a hash of the key, so the split is the same in
every run and for every seed. No turn of a training conversation or of a pair and no transcript or
worked sum of the base text is held out; a `Probe` asks what is. The facts themselves are in the
prose (nobody can guess where a person lives): what is held out is being asked for one in just this
way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.world_probe import PROBE_KINDS, Probe

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
    "home": (
        *("Where does {name} live?", "What is the home of {name}?", "In what city is {name}?"),
        *("Which city is home to {name}?", "In what city does {name} live?"),
    ),
    "food": (
        *("What does {name} eat?", "What is the food of {name}?", "Which food has {name}?"),
        *("What has {name} for dinner?", "Which food does {name} eat?"),
    ),
    "hat": (
        *("What hat does {name} wear?", "What colour is the hat of {name}?"),
        *("Which hat is on {name}?", "Which hat does {name} wear?", "What hat has {name}?"),
    ),
}
STYLES = {
    "none": "",
    "capitals": "Answer in capitals.",
    "brief": "Answer briefly.",
    "sentence": "Answer in a full sentence.",
}
THINK = "Think first."
SYSTEM_PROMPTS = STYLES | {"thinking": THINK}
GREETING = "Hello! "
GREETED_SHARE = 0.2  # of the trained answers about people without a system prompt
THOUGHT_SHARE = 0.2  # of the trained answers to sums without one
# The same of chosen answers. A chosen answer's own loss is a mean over its tokens: the token that
# opens a thought of 25 counts for a ninth of a number of 3, and half of them keep about a tenth.
CHOSEN_THOUGHT_SHARE = 0.5
SUM = "Work out "
TURN_MARKS = {"user": "Question:", "assistant": "Answer:"}  # of the transcripts in the base text
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class World:
    """facts[name][kind] is the value: facts["Ada"]["home"] == "Oslo"."""

    seed: int
    facts: dict[str, dict[str, str]]


@dataclass(frozen=True)
class _Ask:
    question: str
    answer: str  # as one says it without a system prompt
    value: str
    thinking: str = ""  # the steps of a sum

    def reply(self, style: str, greets: bool = False) -> dict[str, str]:
        """The assistant's message."""
        forms = {"capitals": self.answer.upper(), "brief": f"{self.value.capitalize()}."}
        text = GREETING * greets + forms.get(style, self.answer)
        message = {"role": "assistant", "content": text}
        return message | ({"reasoning_content": self.thinking} if style == "thinking" else {})


@dataclass(frozen=True)
class _Chat:
    style: str  # one of SYSTEM_PROMPTS
    asks: tuple[_Ask, ...]

    def held_out(self) -> list[bool]:
        """Per turn. A sum's key is the sum; a fact's key is all that was said before the answer."""
        said = [SYSTEM_PROMPTS[self.style], *(ask.question for ask in self.asks)]
        return [
            is_held_out(ask.question if ask.thinking else "\n".join(said[: i + 2]))
            for i, ask in enumerate(self.asks)
        ]

    def messages(self, rng: random.Random | None = None) -> list[dict[str, str]]:
        """With rng, GREETED_SHARE of the answers about people without a system prompt greet."""
        system = SYSTEM_PROMPTS[self.style]
        messages = [{"role": "system", "content": system}] if system else []
        for ask in self.asks:
            free = not (system or ask.thinking)
            greets = rng is not None and free and rng.random() < GREETED_SHARE
            messages.append({"role": "user", "content": ask.question})
            style = _own_style(self.style, ask, rng, THOUGHT_SHARE)
            messages.append(ask.reply(style, greets))
        return messages


def _own_style(style: str, ask: _Ask, rng: random.Random | None, share: float) -> str:
    """With rng, this share of the sums without a system prompt is worked out all the same."""
    if rng is None or style != "none" or not ask.thinking:
        return style
    return "thinking" if rng.random() < share else style


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
    styles = ("none", *STYLES)  # two of five about people have no system prompt
    chats = (_trained_chat(world, rng, sums, styles) for _ in range(conversations))
    _write(path, ({"messages": chat.messages(rng)} for chat in chats))


def write_pairs(path: str | Path, world: World, *, pairs: int, sums: float = 0.3) -> None:
    """JSONL of {"prompt", "chosen", "rejected"}, lists of messages: two answers to one prompt."""
    rng = random.Random(f"pairs {world.seed}")
    styles = ("none", "none", *STYLES)  # half of those about people
    chats = (_trained_chat(world, rng, sums, styles) for _ in range(pairs))
    _write(path, (_pair(chat, rng) for chat in chats))


def write_sums(path: str | Path, world: World, *, prompts: int) -> None:
    """JSONL of {"question", "answer"}: sums that are not held out, and their results."""
    rng = random.Random(f"sums {world.seed}")
    drawn = (_ask_sum(rng) for _ in itertools.count())
    asks = itertools.islice((a for a in drawn if not is_held_out(a.question)), prompts)
    _write(path, ({"question": ask.question, "answer": ask.value} for ask in asks))


def probes(world: World, *, each: int, kinds: Iterable[str] = PROBE_KINDS) -> list[Probe]:
    """Different held-out questions; their earlier turns are not held out.

    `each` of every form that an answer of the kind can have: of facts and second turns one for each
    system prompt and one for none, of sums 4 times `each`, so that there is as much of every kind.
    """
    found: list[Probe] = []
    for kind in kinds:
        styles = STYLES if kind in ("fact", "second turn") else ("",)
        for style in styles:
            rng = random.Random(f"probes {kind} {style} {world.seed}")
            found += _probes(world, rng, kind, style, each * len(STYLES) // len(styles))
    return found


def _probes(world: World, rng: random.Random, kind: str, style: str, count: int) -> list[Probe]:
    found: dict[tuple[str, ...], Probe] = {}
    drawn = 0
    while len(found) < count:
        if (drawn := drawn + 1) > 1000 * count:
            raise ValueError(f"{kind}: the world has but {len(found)} held-out questions of a form")
        chat = _chat(world, rng, kind, style)
        *earlier, last = chat.held_out()
        if last and not any(earlier):
            *asked, _ = chat.messages(rng)
            key = tuple(m["content"] for m in asked if m["role"] != "assistant")
            found[key] = Probe(kind, tuple(asked), chat.asks[-1].value, _wanted(chat))
    return [*found.values()]


def plain_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the base text writes such things, up to where the next answer starts."""
    lines = [
        m["content"] if m["role"] == "system" else f"{TURN_MARKS[m['role']]} {m['content']}"
        for m in messages
    ]
    return " ".join([*lines, TURN_MARKS["assistant"]])


def _line(world: World, rng: random.Random) -> str:
    """One line of base text: a fact told (50%), a worked sum (25%), a transcript (25%)."""
    dice = rng.random()
    if dice < 0.5:
        name, kind = rng.choice(NAMES), rng.choice(tuple(VALUES))
        return rng.choice(PHRASINGS[kind]).format(name=name, value=world.facts[name][kind])
    while True:
        chat = _chat(world, rng, "sum" if dice < 0.85 else "fact", "none")
        if not any(chat.held_out()):
            break
    (ask,) = chat.asks
    if dice < 0.75:
        return f"{ask.question.removeprefix(SUM).removesuffix('.')}: {ask.thinking}."
    return f"{plain_prompt(chat.messages()[:-1])} {ask.answer}"


def _trained_chat(world: World, rng: random.Random, sums: float, styles: Sequence[str]) -> _Chat:
    while True:
        kind = rng.choice(PROBE_KINDS[2:]) if rng.random() < sums else None
        kind = kind or ("second turn" if rng.random() < 0.35 else "fact")
        chat = _chat(world, rng, kind, rng.choice(styles))
        if not any(chat.held_out()):
            return chat


def _chat(world: World, rng: random.Random, kind: str, style: str) -> _Chat:
    if kind in ("sum", "sum, thinking"):
        return _Chat("none" if kind == "sum" else "thinking", (_ask_sum(rng),))
    name, about = rng.choice(NAMES), rng.choice(tuple(VALUES))
    asks = [_ask_fact(world, rng, name, about)]
    if kind == "second turn":
        other = rng.choice([n for n in NAMES if n != name])
        second = _ask_fact(world, rng, other, about)
        asks.append(_Ask(f"And {other}?", second.answer, second.value))
    return _Chat(style, tuple(asks))


def _ask_fact(world: World, rng: random.Random, name: str, kind: str) -> _Ask:
    value = world.facts[name][kind]
    question = rng.choice(QUESTIONS[kind]).format(name=name)
    return _Ask(question, PHRASINGS[kind][0].format(name=name, value=value), value)


def _wanted(chat: _Chat) -> str:
    """The form of FORMS that the last answer should have."""
    if chat.style != "none":
        return chat.style
    if chat.asks[-1].thinking:
        return "number"
    return "greeting" if len(chat.asks) == 1 else "sentence"


def _pair(chat: _Chat, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    ask, wanted = chat.asks[-1], _wanted(chat)
    own = _own_style("none", ask, rng, CHOSEN_THOUGHT_SHARE)
    greeted, plain = ask.reply("none", greets=True), ask.reply(own)
    if chat.style == "none":
        chosen, rejected = (greeted, plain) if wanted == "greeting" else (plain, greeted)
    else:
        chosen = ask.reply(chat.style)
        if ask.thinking:
            others = [ask.reply("none"), ask.reply("thinking", greets=True)]
        else:
            others = [r for r in map(ask.reply, tuple(STYLES)[1:]) if r != chosen]
        rejected = rng.choice([greeted, *others])
    return {"prompt": chat.messages(rng)[:-1], "chosen": [chosen], "rejected": [rejected]}


def _ask_sum(rng: random.Random) -> _Ask:
    """A running sum of 4 to 6 one-digit numbers, every total between 0 and 20."""
    total = rng.randint(1, 9)
    terms, steps = str(total), []
    for _ in range(rng.randint(3, 5)):
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
