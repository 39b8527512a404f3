"""What a batch really holds, in colour: on the terminal and as one HTML page that needs no network.

The rows come from `make_rows`, so what is shown is what the model would be given, not what the data
should have become. White space is visible; a token that is a part of a character shows sensibly.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.pipeline import make_rows
from posttrain.data.plan import Plan
from posttrain.data.rows import SIDES
from posttrain.types import TWIN, Example

REST = "\N{TWO DOT LEADER}"  # stands for the further tokens of a character that several make up
LONGEST_CHARACTER = 8  # tokens tried for one character: UTF-8 has at most 4 bytes
LABELS = {1: "desirable", 0: "undesirable", TWIN: "mismatched twin"}
MARKS = {" ": "·", "\n": "↵\n", "\t": "⇥\t"}


@runtime_checkable
class Examples(Protocol):
    """What the preview reads: a cache that also knows where an example came from."""

    def read(self, ids: Sequence[int], /) -> list[Example]: ...

    def place(self, i: int, /) -> str: ...


@dataclass(frozen=True)
class Piece:
    """One token of a row. `text` is what it adds to the text, "" if an earlier token has it."""

    token_id: int
    token: str  # as it stands in the vocabulary
    text: str
    weight: float
    position: int
    special: bool


@dataclass(frozen=True)
class Segment:
    number: int
    example: int
    source: str
    place: str
    pieces: list[Piece]
    side: str = ""  # of a pair: "pair 3, chosen"; of a labelled answer: "desirable"

    @property
    def trained(self) -> int:
        return sum(piece.weight > 0 for piece in self.pieces)


@dataclass(frozen=True)
class Row:
    """A row in use, and where it lies in its step."""

    step: int
    micro_batch: int
    index: int
    segments: list[Segment]
    padding: int

    @property
    def trained(self) -> int:
        return sum(segment.trained for segment in self.segments)

    def title(self) -> str:
        where = f"step {self.step}, micro-batch {self.micro_batch}, row {self.index}"
        total = self.padding + sum(len(segment.pieces) for segment in self.segments)
        return (
            f"{where}: {_count(len(self.segments), 'segment')}, {self.trained:,} trained tokens "
            f"({self.trained / total:.1%}), {self.padding:,} padding ({self.padding / total:.1%})"
        )


def rows_in_use(
    examples: Examples, plan: Plan, tokenizer: Tokenizer, *, step: int = 0, count: int = 4
) -> list[Row]:
    """The first `count` rows in use from `step` on, as the model gets them.

    Raises ValueError where the plan has no such step.
    """
    if not 0 <= step < plan.steps:
        raise ValueError(f"step {step}: the plan has steps 0 to {plan.steps - 1}")
    rows: list[Row] = []
    for number in range(step, plan.steps):
        layout = plan.layout(number)
        for a, b in zip(*np.nonzero(layout[..., 0] >= 0), strict=True):
            if len(rows) == count:
                return rows
            rows.append(_read_row(examples, plan, tokenizer, number, int(a), int(b), layout[a, b]))
    return rows


def _read_row(
    examples: Examples, plan: Plan, tokenizer: Tokenizer, step: int, a: int, b: int, ids: np.ndarray
) -> Row:
    batch = make_rows(examples, ids, plan.index.source_ids, plan.seq_len)
    segments = []
    for s in range(batch.segment_ids.max()):
        where = batch.segment_ids == s + 1
        example = int(batch.example_ids[s])
        arrays = (batch.tokens, batch.loss_weights, batch.positions)
        pieces = to_pieces(tokenizer, *(array[where].tolist() for array in arrays))
        source = plan.index.source_names[batch.source_ids[s]]
        side = f"pair {example // 2}, {SIDES[example % 2]}" if plan.sides == 2 else ""
        side = LABELS.get(int(batch.labels[s]), side)
        segments.append(Segment(s + 1, example, source, examples.place(example), pieces, side))
    return Row(step, a, b, segments, int((batch.segment_ids == 0).sum()))


def to_pieces(
    tokenizer: Tokenizer, ids: Sequence[int], weights: Sequence[float], positions: Sequence[int]
) -> list[Piece]:
    """Tokens with the text that each adds.

    A character that takes several tokens goes whole to the first of them; bytes that never become
    a character are given as the vocabulary writes them.
    """
    texts: list[str] = []
    before: list[int] = []  # the tokens of the last finished text: some decoders look back
    start = 0
    while start < len(ids):
        special = ids[start] in tokenizer.special_ids
        found = None if special else _next_text(tokenizer, before, ids, start)
        end, text = found or (start + 1, tokenizer.token(ids[start]))
        texts += [text] + [""] * (end - start - 1)
        before, start = list(ids[start:end]) if found or special else [], end
    return [
        Piece(i, tokenizer.token(i), text, weight, position, i in tokenizer.special_ids)
        for i, text, weight, position in zip(ids, texts, weights, positions, strict=True)
    ]


def _next_text(
    tokenizer: Tokenizer, before: list[int], ids: Sequence[int], start: int
) -> tuple[int, str] | None:
    """The end of the shortest run of tokens from `start` that is whole characters, and its text;
    None where there is no such run."""
    known = tokenizer.decode(before) if before else ""
    for end in range(start + 1, min(start + LONGEST_CHARACTER, len(ids)) + 1):
        if ids[end - 1] in tokenizer.special_ids:
            break
        text = tokenizer.decode([*before, *ids[start:end]])
        text = text[len(known) :] if text.startswith(known) else tokenizer.decode(ids[start:end])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            return end, text
    return None


def visible(text: str, mark: Callable[[str], str], plain: Callable[[str], str]) -> str:
    """The text with white space and unprintable characters made visible, and REST for no text.

    `mark` formats what stands for a character, `plain` a stretch of ordinary text.
    """
    if not text:
        return mark(REST)
    out, run = [], ""
    for character in text:
        if character.isprintable() and character not in MARKS:
            run += character
            continue
        out.append(plain(run))
        out.append(mark(MARKS.get(character) or ascii(character)[1:-1]))
        run = ""
    return "".join([*out, plain(run)])


def to_terminal(rows: Sequence[Row], console: Console) -> None:
    """Prints the rows in colour."""
    trained, context, padding = "black on green", "", "bright_black"
    special, both = "bold magenta", "bold bright_white on green"
    legend = Text("legend: ")
    for name, style in [
        ("trained", trained),
        ("context", context),
        ("special", special),
        ("special, trained", both),
        ("padding ░", padding),
    ]:
        legend.append(name, style).append("  ")
    console.print(legend)
    for row in rows:
        console.print(Rule(Text(row.title(), "bold"), characters="═", style="default"))
        for segment in row.segments:
            console.print(Text(f"── {_heading(segment)}", "bold cyan"))
            line = Text(overflow="fold")
            kinds = groupby(segment.pieces, lambda piece: (piece.special, piece.weight > 0))
            for (is_special, is_trained), run in kinds:
                style = special if is_special else context
                if is_trained:
                    style = both if is_special else trained
                line.append("".join(visible(piece.text, str, str) for piece in run), style)
            if line.plain.endswith("\n"):
                line.right_crop(1)
            console.print(line)
        if row.padding:
            console.print(Text(f"{'░' * min(row.padding, 40)} padding x {row.padding:,}", padding))


def _heading(segment: Segment) -> str:
    return (
        f"segment {segment.number}: {segment.side or f'example {segment.example}'}, "
        f"{segment.source}, {segment.place}, {_count(len(segment.pieces), 'token')}, "
        f"{segment.trained:,} trained"
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def to_html(rows: Sequence[Row], about: str) -> str:
    """One self-contained page; `about` is text for its head (the plan's description)."""
    return _PAGE.substitute(about=html.escape(about), rows="\n".join(map(_html_row, rows)))


def _html_row(row: Row) -> str:
    bar = "".join(
        f'<i class="{"bt" if trained else "bc"}{" first" if k == 0 else ""}" '
        f'style="flex:{len(list(run))}"></i>'
        for segment in row.segments
        for k, (trained, run) in enumerate(groupby(segment.pieces, lambda piece: piece.weight > 0))
    )
    if row.padding:
        bar += f'<i class="bp first" style="flex:{row.padding}"></i>'
    body = "".join(
        f'<h3>{html.escape(_heading(segment))}</h3><pre data-segment="{segment.number}">'
        f"{''.join(map(_html_piece, segment.pieces))}</pre>"
        for segment in row.segments
    )
    if row.padding:
        body += f'<p class="padding">padding x {row.padding:,}</p>'
    return (
        f'<section><h2>{html.escape(row.title())}</h2><div class="bar">{bar}</div>{body}</section>'
    )


def _html_piece(piece: Piece) -> str:
    classes = "s" * piece.special + " t" * (piece.weight > 0)
    # A weight other than 1 is seen as a paler or a darker green.
    shade = f' style="--w:{min(piece.weight, 2):.2g}"' if piece.weight not in (0, 1) else ""
    tip = f"{piece.token_id} {piece.weight:.4g} {piece.position} {piece.token}"
    text = visible(piece.text, _html_mark, html.escape)
    return f'<b class="{classes.strip()}" data-tip="{html.escape(tip)}"{shade}>{text}</b>'


def _html_mark(mark: str) -> str:
    return f"<u>{mark}</u>" + "<wbr>" * (mark == MARKS[" "])  # lines break at spaces, seen or not


def preview(
    examples: Examples,
    plan: Plan,
    tokenizer: Tokenizer,
    *,
    step: int = 0,
    count: int = 4,
    page: str | Path | None = None,
    console: Console | None = None,
) -> None:
    """Shows `count` rows from `step` on, on the terminal and in the HTML file `page`."""
    rows = rows_in_use(examples, plan, tokenizer, step=step, count=count)
    console = console or Console()
    to_terminal(rows, console)
    console.print(Text(plan.describe()))
    if page is not None:
        Path(page).write_text(to_html(rows, plan.describe()), encoding="utf-8")
        console.print(Text(f"wrote {page}"))


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>posttrain: data preview</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { --back: #fff; --text: #1c2024; --soft: #6b7280; --line: #d6dae0; --green: 34 160 84;
  --special: #8e3bc0; --segment: #2466c8; --card: #f7f8fa; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e3e6ea; --soft: #8d96a3;
  --line: #363c45; --green: 50 170 95; --special: #d08cf7; --segment: #79adff; --card: #1b1f25 } }
body { margin: 0 auto; max-width: 1100px; padding: 24px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 20px; margin: 0 0 8px } h2 { font-size: 15px; margin: 0 0 8px }
h3 { font-size: 12px; font-weight: 600; color: var(--segment); margin: 14px 0 0;
  border-top: 2px solid var(--segment); padding-top: 4px; overflow-wrap: anywhere }
.about { white-space: pre-line; color: var(--soft); margin: 0 0 12px }
section { border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 20px 0;
  background: var(--card) }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.75 ui-monospace, Menlo, Consolas, monospace }
b { font-weight: 400; border-right: 1px solid rgb(128 128 128 / .28); padding: 2px 0 }
b:hover { outline: 2px solid var(--segment) }
u { text-decoration: none; color: var(--soft); opacity: .7 }
.t { background: rgb(var(--green) / calc(.15 + .22 * var(--w, 1))) }
.s { color: var(--special); font-weight: 700; box-shadow: inset 0 0 0 1px var(--special);
  border-radius: 3px; padding: 2px }
.padding, .bp { background: repeating-linear-gradient(45deg, transparent 0 5px,
  rgb(128 128 128 / .35) 5px 7px) }
.padding { color: var(--soft); border: 1px dashed var(--line); margin: 14px 0 0; padding: 2px 8px;
  font-size: 13px }
.bar { display: flex; height: 12px; border: 1px solid var(--line); border-radius: 3px;
  overflow: hidden } .bar i { min-width: 0 } .bt { background: rgb(var(--green)) }
.bc { background: rgb(128 128 128 / .3) }
.bar .first { border-left: 2px solid var(--segment) }
.legend { font-size: 13px } .legend b { border: 0; padding: 2px 6px; margin-right: 6px }
.legend .padding { display: inline; padding: 2px 6px }
#tip { position: fixed; display: none; pointer-events: none; background: var(--text);
  color: var(--back); font: 12px/1.45 ui-monospace, Menlo, Consolas, monospace; padding: 6px 9px;
  border-radius: 5px; white-space: pre; max-width: 90vw; z-index: 1 }
</style></head><body>
<h1>What the model is given</h1>
<p class="about">$about</p>
<p class="legend"><b class="t">trained</b><b>context</b><b class="s">special</b><b
class="s t">special, trained</b><b class="padding">padding</b> a blue line begins a segment;
<u>·</u> space, <u>↵</u> line feed, <u>⇥</u> tab, <u>‥</u> a further token of the
character before; a paler or darker green is a weight other than 1; hover over a token
for its numbers</p>
$rows
<div id="tip"></div>
<script>
const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {
  const token = event.target.closest("b[data-tip]");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  const [id, weight, position, ...text] = token.dataset.tip.split(" ");
  tip.textContent = "token    " + id + "  " + JSON.stringify(text.join(" ")) + "\\nweight   " +
    weight + "\\nposition " + position + "\\nsegment  " + token.parentElement.dataset.segment;
});
document.addEventListener("mousemove", event => {
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8) + "px";
});
</script></body></html>
""")
