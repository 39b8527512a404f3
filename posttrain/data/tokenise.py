"""The part of prepare and check that runs in worker processes: a block of rows in, arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.data.config import SourceConfig, TooLong
from posttrain.data.fit import by_label, fit, fit_pair, prompts_differ, same, trained, with_twins
from posttrain.data.formats import get_format
from posttrain.data.formats.base import margin_of
from posttrain.data.report import SourceReport
from posttrain.data.rows import SIDES, Defect, RowError
from posttrain.data.sources import Block
from posttrain.types import (
    EXAMPLES_OF,
    Conversation,
    DataKind,
    Example,
    Labelled,
    Pair,
    Sample,
    Text,
)

TOO_LONG = "over data.seq_len"
"""In the `found` of a row that is too long."""


@dataclass(frozen=True)
class Task:
    """A block, whose it is, and its format (None: no row of it can be read)."""

    source_id: int
    format: str | None
    block: Block


@dataclass
class Result:
    """What became of a block. tokens, weights: all its examples, one after another; of pairs the
    chosen side, then the rejected one."""

    source_id: int
    file: str
    read: int
    tokens: np.ndarray  # int32 [sum(lengths)]
    weights: np.ndarray  # float32 [sum(lengths)]
    lengths: np.ndarray  # int32 [n]
    lines: np.ndarray  # int64 [n]
    margins: np.ndarray  # float32 [n]
    labels: np.ndarray  # int8 [n]
    whole_lengths: np.ndarray  # int32 [m], before anything was cut
    report: SourceReport
    defects: list[Defect] = field(default_factory=list)
    too_long: list[Defect] = field(default_factory=list)  # under too_long: error


@dataclass(frozen=True)
class Job:
    """What is done to each block. `chat` None: rows are checked for their form alone.

    kl_block: of twinned data, the rows that lend each other their answers.
    """

    sources: tuple[SourceConfig, ...]
    chat: ChatTemplate | None
    seq_len: int
    too_long: TooLong
    kind: DataKind = "samples"
    kl_block: int = 8

    def run(self, task: Task) -> Result:
        """Raises ValueError where the config, not a row, is at fault."""
        block = task.block
        done = _Done(block.file)
        lines: list[int] = []
        samples: list[Sample] = []  # of pairs: chosen, rejected, chosen ...
        said: list[Any] = []  # of pairs: the margin; of labelled answers: the label
        unpaired = 0
        for row in block.rows():
            done.report.rows += 1
            problems = row.problems
            if not problems:
                try:
                    made = self._convert(task, row.value)
                    if isinstance(made, Pair):
                        samples += [made.chosen, made.rejected]
                        judged = self.kind != "pairs"
                        said += [True, False] if judged else [made.margin]
                        lines += [row.line] * judged
                        unpaired += judged
                    elif isinstance(made, Labelled):
                        samples.append(made.sample)
                        said.append(made.label)
                    else:
                        samples.append(made)
                    lines.append(row.line)
                except RowError as error:
                    problems = error.problems
                except Exception as error:
                    place = f"{row.file}:{row.line}"
                    raise ValueError(f"{place}: format {task.format}: {error!r}") from error
            if problems:
                done.bad(Defect(row.file, row.line, p.field, p.found, p.fix) for p in problems)
        done.report.rows += unpaired
        done.report.unpaired = unpaired
        if self.kind == "twinned" and 2 * unpaired == len(lines):
            order = by_label(unpaired, self.kl_block)
            lines, said = [lines[i] for i in order], [said[i] for i in order]
            samples = [samples[i] for i in order]
        if self.chat is not None:
            examples = self._examples(samples)
            if self.kind == "pairs":
                for k, line in enumerate(lines):
                    pair = Pair(samples[2 * k], samples[2 * k + 1], said[k])
                    self._keep_pair(done, line, pair, examples[2 * k : 2 * k + 2])
            elif self.kind == "samples":
                for line, made in zip(lines, examples, strict=True):
                    self._keep(done, line, made)
            else:
                for line, made, label in zip(lines, examples, said, strict=True):
                    self._keep_labelled(done, line, made, label)
        if self.kind == "twinned":
            made = with_twins(done.kept, done.lines, self.kl_block, self.seq_len)
            done.kept, done.lines, done.report.twins_cut = made.examples, made.lines, made.cut
            if made.alone:
                done.report.dropped["no answer to another prompt in its block"] += made.alone
        return done.result(task.source_id, block.read, EXAMPLES_OF[self.kind])

    def _keep(self, done: _Done, line: int, made: list[Example] | ValueError) -> None:
        """The examples of one row, as far as they are kept."""
        if isinstance(made, ValueError):
            done.bad([_refused(done.file, line, made)])
            return
        for example in made:
            done.whole.append(len(example.tokens))
            if not trained(example):
                done.bad([_untrained(done.file, line)])
            elif len(example.tokens) > self.seq_len and self.too_long == "error":
                done.bad([], [self._over(done.file, line, example)])
            else:
                done.keep(line, self._fit(example, done.report))

    def _keep_labelled(
        self, done: _Done, line: int, made: list[Example] | ValueError, label: bool
    ) -> None:
        """The example of one judged answer."""
        if not isinstance(made, ValueError) and len(made) > 1:
            done.bad([_several(done.file, line, len(made))])
            return
        before = len(done.kept)
        self._keep(done, line, made)
        done.kept[before:] = [replace(e, label=int(label)) for e in done.kept[before:]]

    def _keep_pair(
        self, done: _Done, line: int, pair: Pair, made: list[list[Example] | ValueError]
    ) -> None:
        """Both sides of one row, or neither."""
        assert self.chat is not None, "a pair without a template"
        refused = [
            _refused(done.file, line, side, name)
            for side, name in zip(made, SIDES, strict=True)
            if isinstance(side, ValueError)
        ]
        if refused:
            if len(refused) == 2 and refused[0].found == refused[1].found:
                refused = [replace(refused[0], field="row")]  # what is wrong is in the prompt
            done.bad(refused)
            return
        sides: list[Example] = []
        defects: list[Defect] = []
        over: list[Defect] = []
        for examples, name in zip(made, SIDES, strict=True):
            assert not isinstance(examples, ValueError), "refused above"
            if len(examples) > 1:
                defects.append(_several(done.file, line, len(examples), name))
                continue
            sides += examples
            done.whole.append(len(examples[0].tokens))
            if not trained(examples[0]):
                defects.append(_untrained(done.file, line, name))
            elif len(examples[0].tokens) > self.seq_len and self.too_long == "error":
                over.append(self._over(done.file, line, examples[0], name))
        if len(sides) == 2 and same(*sides):
            found = "the tokens of chosen: the pair teaches nothing"
            defects.append(Defect(done.file, line, "rejected", found, "remove the row"))
        if defects or over:
            done.bad(defects, over)
            return
        chosen, rejected = sides
        done.report.prompts_differ += prompts_differ(pair, chosen, rejected, self.chat.cfg)
        bos_id = self.chat.tokenizer.bos_id
        fitted = fit_pair(chosen, rejected, self.seq_len, self.too_long, bos_id)
        if fitted.dropped:
            done.report.dropped[fitted.dropped] += 1
        elif any(len(side.tokens) > self.seq_len for side in sides):
            done.report.cut(fitted.cut_tokens, fitted.cut_trained)
        if fitted.examples:
            total = sum(len(side.tokens) for side in fitted.examples)
            done.report.pairs_in_row += total <= self.seq_len
        done.keep(line, [replace(side, margin=pair.margin) for side in fitted.examples])

    def _examples(self, samples: list[Sample]) -> list[list[Example] | ValueError]:
        """Per sample its examples, or why it has none; conversations are encoded together."""
        assert self.chat is not None, "asked for tokens without a template"
        made: list[list[Example] | ValueError] = [[] for _ in samples]
        talks = {i: sample for i, sample in enumerate(samples) if isinstance(sample, Conversation)}
        for i, found in zip(talks, self.chat.examples_batch(list(talks.values())), strict=True):
            made[i] = found
        for i, sample in enumerate(samples):
            if not isinstance(sample, Conversation):
                try:
                    made[i] = [self.chat.text_example(sample)]
                except ValueError as error:
                    made[i] = error
        return made

    def _convert(self, task: Task, value: Any) -> Sample | Pair | Labelled:
        assert task.format is not None, "a block with a readable row has a format"
        source = self.sources[task.source_id]
        made = get_format(task.format).convert(value, source)
        kinds = {"samples": (Conversation, Text), "pairs": Pair}
        wanted = kinds.get(self.kind, (Labelled, Pair))
        if not isinstance(made, wanted):
            names = {"samples": "Conversation or a Text", "pairs": "Pair"}
            want = names.get(self.kind, "Labelled")
            raise TypeError(f"made a {type(made).__name__} where a {want} is wanted")
        return replace(made, margin=margin_of(value, source)) if isinstance(made, Pair) else made

    def _over(self, file: str, line: int, example: Example, field: str = "row") -> Defect:
        ways = "shorten, split or drop it" if self.kind == "samples" else "shorten or drop it"
        found = f"{len(example.tokens):,} tokens, {TOO_LONG} ({self.seq_len:,})"
        return Defect(file, line, field, found, f"raise data.seq_len, or let data.too_long {ways}")

    def _fit(self, example: Example, report: SourceReport) -> list[Example]:
        """The example as it is kept, with what happened to it counted."""
        n = len(example.tokens)
        assert self.chat is not None, "an example without a template"
        fitted = fit(example, self.seq_len, self.too_long, self.chat.tokenizer.bos_id)
        if fitted.dropped:
            report.dropped[fitted.dropped] += 1
        elif n > self.seq_len and self.too_long == "split":
            report.split += 1
            report.pieces += len(fitted.examples)
            if fitted.idle_pieces:
                report.dropped["piece of a split without a trained token"] += fitted.idle_pieces
        elif n > self.seq_len:
            report.cut(fitted.cut_tokens, fitted.cut_trained)
        return fitted.examples


class _Done:
    """What becomes of a block, as its rows are gone through."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.report = SourceReport()
        self.defects: list[Defect] = []
        self.too_long: list[Defect] = []
        self.kept: list[Example] = []
        self.lines: list[int] = []
        self.whole: list[int] = []

    def bad(self, defects: Iterable[Defect], too_long: Sequence[Defect] = ()) -> None:
        """One bad row, or example of a row."""
        self.report.bad_rows += 1
        self.defects += defects
        self.too_long += too_long

    def keep(self, line: int, examples: Sequence[Example]) -> None:
        self.kept += examples
        self.lines += [line] * len(examples)

    def result(self, source_id: int, read: int, sides: int) -> Result:
        kept, report = self.kept, self.report
        weights = np.concatenate([e.loss_weights for e in kept] or [np.zeros(0, np.float32)])
        report.examples = len(kept) // sides
        report.desirable = sum(e.label == 1 for e in kept)
        report.tokens = sum(len(e.tokens) for e in kept)
        report.trained = int(np.count_nonzero(weights > 0))
        return Result(
            source_id=source_id,
            file=self.file,
            read=read,
            tokens=np.concatenate([e.tokens for e in kept] or [np.zeros(0, np.int32)]),
            weights=weights,
            lengths=np.array([len(e.tokens) for e in kept], np.int32),
            lines=np.array(self.lines, np.int64),
            margins=np.array([e.margin for e in kept], np.float32),
            labels=np.array([e.label for e in kept], np.int8),
            whole_lengths=np.array(self.whole, np.int32),
            report=report,
            defects=self.defects,
            too_long=self.too_long,
        )


def _several(file: str, line: int, examples: int, field: str = "row") -> Defect:
    found = f"the template makes {examples} examples of it (one for each thought)"
    fix = "an answer must be one example: chat.train_on: last, or remove the row"
    return Defect(file, line, field, found, fix)


def _untrained(file: str, line: int, field: str = "row") -> Defect:
    fix = "give it an answer (or a weight over 0), or remove the row"
    return Defect(file, line, field, "no token of it is trained", fix)


def _refused(file: str, line: int, error: ValueError, field: str = "row") -> Defect:
    fix = "change the row, or the chat section of the config"
    if isinstance(error, ChatError):
        return Defect(file, line, field, error.reason, fix, error.text)
    return Defect(file, line, field, str(error), fix)
