"""The preview shows the batch as it is: every token, its colour, and text that cannot do harm."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.plan import BatchConfig, Plan
from posttrain.data.preview import (
    REST,
    preview,
    rows_in_use,
    to_html,
    to_pieces,
    to_terminal,
    visible,
)
from posttrain.types import Example

NASTY = "</script><img src=x onerror=alert(1)> & \"q\" 's' $rows\x00\u200b"
TEXTS = [
    ("<|im_start|>user\nAdd 2 and 3.<|im_end|>\n", "It is 5.\n\tDone<|im_end|>"),
    ("漢字 🎉?", "Ünïcödé, и ещё 日本語"),
    (NASTY, NASTY),
    ("a b", "  c"),
]


@pytest.fixture(scope="module", params=["gpt2", "minimind", "phi-3-mini"])
def tokenizer(request, data_dir) -> Tokenizer:
    """Two byte-level vocabularies, and one that writes bytes as <0xE6> and drops leading spaces."""
    return Tokenizer.load(data_dir / "data/tokenizers" / request.param)


@pytest.fixture(scope="module")
def byte_level(data_dir) -> Tokenizer:
    return Tokenizer.load(data_dir / "data/tokenizers/minimind")


class Examples:
    """TEXTS as examples: the first text is context, the second is trained."""

    def __init__(self, tokenizer: Tokenizer):
        self.examples = []
        for prompt, answer in TEXTS:
            context, trained = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
            weights = [0.0] * len(context) + [1.0] * len(trained)
            self.examples.append(
                Example(np.array(context + trained, np.int32), np.array(weights, np.float32))
            )
        self.lengths = np.array([len(e.tokens) for e in self.examples], np.int32)
        self.trained = np.array([(e.loss_weights > 0).sum() for e in self.examples], np.int32)
        self.source_ids = np.array([0, 1, 1, 0], np.int32)
        self.source_names = ["sums", "<b>odd</b>"]
        self.sides = 1

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]

    def read(self, ids) -> list[Example]:
        return [self[i] for i in ids]

    def place(self, i: int) -> str:
        return f"<file>.jsonl:{i + 1}"


def plan_of(examples: Examples, **batch) -> Plan:
    batch = {"rows": 2, "order": "sequential"} | batch
    seq_len = int(examples.lengths.max()) + 5
    return Plan(examples, BatchConfig(**batch), seq_len=seq_len, seed=0, epochs=1)


def test_pieces_spell_the_text(tokenizer):
    """The texts of a segment's tokens, joined, are its text, whatever the tokens cut through."""
    for prompt, answer in TEXTS:
        text = prompt + answer
        ids = tokenizer.encode(text).ids
        pieces = to_pieces(tokenizer, ids, [0.0] * len(ids), list(range(len(ids))))
        assert [piece.token_id for piece in pieces] == ids
        assert "".join(piece.text for piece in pieces).strip() == text.strip()
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_character_of_several_tokens_goes_to_the_first_of_them(byte_level):
    ids = byte_level.encode("x🎉y").ids
    assert len(ids) > 3  # or the vocabulary knows the character and the test says nothing
    texts = [piece.text for piece in to_pieces(byte_level, ids, [0.0] * len(ids), ids)]
    assert texts == ["x", "🎉"] + [""] * (len(ids) - 3) + ["y"]


def test_bytes_that_make_no_character_show_as_the_vocabulary_writes_them(byte_level):
    cut = byte_level.encode("🎉").ids[:-1]
    end = byte_level.encode("<|im_end|>").ids
    assert len(end) == 1
    pieces = to_pieces(byte_level, [*cut, *end], [0.0] * (len(cut) + 1), range(len(cut) + 1))
    assert [piece.text for piece in pieces] == [byte_level.token(i) for i in [*cut, *end]]
    assert [piece.special for piece in pieces] == [False] * len(cut) + [True]


def test_white_space_and_unprintable_characters_are_made_visible():
    seen = visible("a b\n\tc\x00\u200b", lambda mark: f"[{mark}]", lambda text: f"({text})")
    assert seen == "(a)[·](b)[↵\n]()[⇥\t](c)[\\x00]()[\\u200b]()"
    assert visible("", str, str) == REST


def test_rows_are_those_of_the_batches(byte_level):
    examples = Examples(byte_level)
    plan = plan_of(examples, rows=1)
    rows = rows_in_use(examples, plan, byte_level, count=100)
    assert len(rows) == plan.steps > 1
    shown = [segment.example for row in rows for segment in row.segments]
    assert sorted(shown) == [0, 1, 2, 3]
    for row in rows:
        held = sum(len(segment.pieces) for segment in row.segments)
        assert held + row.padding == plan.seq_len
        for segment in row.segments:
            want = examples[segment.example]
            assert [p.token_id for p in segment.pieces] == want.tokens.tolist()
            assert [p.weight for p in segment.pieces] == want.loss_weights.tolist()
            assert [p.position for p in segment.pieces] == list(range(len(want.tokens)))
            assert segment.trained == examples.trained[segment.example]
            assert segment.source == examples.source_names[examples.source_ids[segment.example]]
    assert [row.step for row in rows_in_use(examples, plan, byte_level, step=1, count=1)] == [1]
    with pytest.raises(ValueError, match="the plan has steps 0 to"):
        rows_in_use(examples, plan, byte_level, step=plan.steps)


class Page(HTMLParser):
    """What a browser makes of the page: tags, and each token's classes, tip and text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[set[str], str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "wbr"):
            self._open.append(tag)
        if tag == "b" and "data-tip" in found:
            self.tokens.append((set(found["class"].split()), found["data-tip"], ""))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)
        if "pre" in self._open:
            classes, tip, text = self.tokens[-1]
            self.tokens[-1] = (classes, tip, text + data)


def test_the_page_shows_every_token_and_runs_none_of_them(byte_level):
    examples = Examples(byte_level)
    plan = plan_of(examples)
    rows = rows_in_use(examples, plan, byte_level, count=100)
    page = Page(to_html(rows, "about <this> run"))
    assert set(page.tags) == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "u", "wbr",
        "section", "div", "i", "pre", "script",
    }  # fmt: skip
    assert page.tags.count("script") == 1
    assert not page.addresses  # nothing to be fetched
    assert "about <this> run" in page.texts["p"]
    assert any("<b>odd</b>, <file>.jsonl:3" in text for text in page.texts["h3"])

    pieces = [piece for row in rows for segment in row.segments for piece in segment.pieces]
    assert len(page.tokens) == len(pieces) == examples.lengths.sum()
    for (classes, tip, text), piece in zip(page.tokens, pieces, strict=True):
        assert ("t" in classes) == (piece.weight > 0)
        assert ("s" in classes) == piece.special
        assert tip == f"{piece.token_id} {piece.weight:g} {piece.position} {piece.token}"
        assert text == visible(piece.text, str, str)


def test_an_uncommon_weight_has_its_own_shade(byte_level):
    examples = Examples(byte_level)
    examples[0].loss_weights[-1] = 0.25
    rows = rows_in_use(examples, plan_of(examples), byte_level, count=100)
    page = to_html(rows, "")
    assert page.count('style="--w:0.25"') == 1
    assert page.count("--w:") == 1


def test_the_terminal_shows_the_text_in_colour(byte_level):
    examples = Examples(byte_level)
    rows = rows_in_use(examples, plan_of(examples), byte_level, count=100)
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    to_terminal(rows, console)
    shown = console.file.getvalue()
    assert "\x1b[30;42mIt·is·5.↵\x1b[0m" in shown  # trained: black on green
    assert "Add·2·and·3." in shown
    assert "\x1b[30;42mAdd" not in shown
    assert "\x1b[1;35m<|im_start|>\x1b[0muser↵" in shown
    assert "\x1b[1;97;42m<|im_end|>\x1b[0m" in shown
    assert "\x00" not in shown
    assert f"padding x {rows[-1].padding}" in shown


def test_preview_prints_and_writes_the_page(byte_level, tmp_path):
    examples = Examples(byte_level)
    plan = plan_of(examples)
    console = Console(file=io.StringIO(), width=120)
    preview(examples, plan, byte_level, count=1, page=tmp_path / "p.html", console=console)
    said = console.file.getvalue()
    assert plan.describe().splitlines()[0] in said
    assert said.count("step 0, micro-batch 0, row ") == 1
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 1
    assert plan.describe().splitlines()[1] in page
