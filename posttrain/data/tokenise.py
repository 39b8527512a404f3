"""The part of prepare and check that runs in worker processes: a block of rows in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.data.config import SourceConfig, TooLong
from posttrain.data.fit import fit, trained
from posttrain.data.formats import get_format
from posttrain.data.report import SourceReport
from posttrain.data.rows import Defect, RowError
from posttrain.data.sources import Block
from posttrain.types import Conversation, Example, Sample

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
    """What became of a block. tokens, weights: all its examples, one after another."""

    source_id: int
    file: str
    read: int
    tokens: np.ndarray  # int32 [sum(lengths)]
    weights: np.ndarray  # float32 [sum(lengths)]
    lengths: np.ndarray  # int32 [n]
    lines: np.ndarray  # int64 [n]
    whole_lengths: np.ndarray  # int32 [m], before anything was cut
    report: SourceReport
    defects: list[Defect] = field(default_factory=list)
    too_long: list[Defect] = field(default_factory=list)  # under too_long: error


@dataclass(frozen=True)
class Job:
    """What is done to each block. `chat` None: rows are checked for their form alone."""

    sources: tuple[SourceConfig, ...]
    chat: ChatTemplate | None
    seq_len: int
    too_long: TooLong

    def run(self, task: Task) -> Result:
        """Raises ValueError where the config, not a row, is at fault."""
        block = task.block
        report = SourceReport()
        defects: list[Defect] = []
        too_long: list[Defect] = []
        lines: list[int] = []
        samples: list[Sample] = []
        for row in block.rows():
            report.rows += 1
            problems = row.problems
            if not problems:
                try:
                    samples.append(self._convert(task, row.value))
                    lines.append(row.line)
                except RowError as error:
                    problems = error.problems
                except Exception as error:
                    place = f"{row.file}:{row.line}"
                    raise ValueError(f"{place}: format {task.format}: {error!r}") from error
            if problems:
                report.bad_rows += 1
                defects += [Defect(row.file, row.line, p.field, p.found, p.fix) for p in problems]
        kept: list[Example] = []
        kept_lines: list[int] = []
        whole: list[int] = []
        if self.chat is not None:
            for line, made in zip(lines, self._examples(samples), strict=True):
                if isinstance(made, ValueError):
                    report.bad_rows += 1
                    defects.append(_refused(block.file, line, made))
                    continue
                for example in made:
                    whole.append(len(example.tokens))
                    if not trained(example):
                        report.bad_rows += 1
                        defects.append(_untrained(block.file, line))
                        continue
                    if len(example.tokens) > self.seq_len and self.too_long == "error":
                        report.bad_rows += 1
                        too_long.append(self._over(block.file, line, example))
                        continue
                    fitted = self._fit(example, report)
                    kept += fitted
                    kept_lines += [line] * len(fitted)
        report.examples = len(kept)
        report.tokens = sum(len(e.tokens) for e in kept)
        weights = np.concatenate([e.loss_weights for e in kept] or [np.zeros(0, np.float32)])
        report.trained = int(np.count_nonzero(weights > 0))
        return Result(
            source_id=task.source_id,
            file=block.file,
            read=block.read,
            tokens=np.concatenate([e.tokens for e in kept] or [np.zeros(0, np.int32)]),
            weights=weights,
            lengths=np.array([len(e.tokens) for e in kept], np.int32),
            lines=np.array(kept_lines, np.int64),
            whole_lengths=np.array(whole, np.int32),
            report=report,
            defects=defects,
            too_long=too_long,
        )

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

    def _convert(self, task: Task, value: Any) -> Sample:
        assert task.format is not None, "a block with a readable row has a format"
        return get_format(task.format).convert(value, self.sources[task.source_id])

    def _over(self, file: str, line: int, example: Example) -> Defect:
        fix = "raise data.seq_len, or let data.too_long shorten, split or drop it"
        found = f"{len(example.tokens):,} tokens, {TOO_LONG} ({self.seq_len:,})"
        return Defect(file, line, "row", found, fix)

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
            report.truncated += 1
            report.cut_tokens += fitted.cut_tokens
            report.cut_trained += fitted.cut_trained
        return fitted.examples


def _untrained(file: str, line: int) -> Defect:
    fix = "give it an answer (or a weight over 0), or remove the row"
    return Defect(file, line, "row", "no token of it is trained", fix)


def _refused(file: str, line: int, error: ValueError) -> Defect:
    fix = "change the row, or the chat section of the config"
    if isinstance(error, ChatError):
        return Defect(file, line, "row", error.reason, fix, error.text)
    return Defect(file, line, "row", str(error), fix)
