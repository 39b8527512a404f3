"""Scores answers by a reward model: rows in, the same rows in the same order with a score out.

A row is a conversation that ends with the answer, or a prompt and its completion, in any form that
`posttrain sft` reads; or a pair, in any form that `posttrain preference` reads, which gets
score_chosen and score_rejected, and the file an accuracy. `fields` maps other columns, and puts
plain texts into the model's template: fields.user=prompt fields.assistant=completion. A score is
about the whole row, read at its last token. The model is a folder with a score head: the export of
`posttrain reward_model`, or any of transformers' ...ForSequenceClassification with one label.

The input is read three times, a block at a time: to be checked, tokenised (into a cache, so that
everything bad is told before anything is scored) and copied. It leaves out rewards of single steps
and models of several labels, and runs in one process.

    posttrain score model.path=runs/first/export input=answers.jsonl out=scored.jsonl
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from posttrain.chat.config import ChatConfig
from posttrain.config import Config as Section
from posttrain.config import ConfigError, runtime, semantic
from posttrain.data.config import DataConfig, SourceConfig
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig
from posttrain.types import DataKind

_KINDS: tuple[DataKind, ...] = ("pairs", "labelled", "samples")
"""What rows may be, the first that fits: a label beside an answer is of no account here."""


class Config(Section):
    """What is scored, and by what."""

    job: Literal["score"] = semantic("score", help="names the job")
    model: ModelConfig = semantic(help="the reward model")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    input: str = semantic(help="file or glob of rows, or hf:owner/name")
    format: str = semantic("auto", help="as data.sources.*.format")
    fields: dict[str, str] = semantic({}, help="own columns, as data.sources.*.fields")
    ignore_keys: tuple[str, ...] = semantic((), help="as data.sources.*.ignore_keys")
    out: Path = semantic(help="the JSONL file that is written")
    column: str = semantic(
        "score", min_length=1, help="column of the score; of pairs, of both: <column>_chosen ..."
    )
    seq_len: int | None = semantic(
        None, ge=8, help="most tokens of a row's conversation; none = the model's context"
    )
    too_long: Literal["error", "skip", "truncate_start"] = semantic(
        "error", help="a row over seq_len: error, skip (its score is null), or cut off its start"
    )
    on_bad_row: Literal["error", "skip"] = semantic(
        "error",
        help="a row that breaks the rules: error (all at once), or skip (its score is null)",
    )
    rows: int = runtime(8, gt=0, help="packed rows of a batch, on each device that has its own")
    cache_dir: str = runtime("~/.cache/posttrain/data", help="folder of the tokenised caches")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")


def run(cfg: Config) -> int:
    """The exit code: 0. ValueError on what the user can mend."""
    import jax

    from posttrain.chat.template import ChatTemplate
    from posttrain.data.progress import Progress
    from posttrain.sharding import make_mesh
    from posttrain.train.model import open_model, use_compile_cache
    from posttrain.train.rewards import score_examples

    began = time.monotonic()
    use_compile_cache()
    mesh = make_mesh(cfg.mesh)
    with _whole_file(cfg.out) as file:
        _files(cfg)  # a slip of the command is told before anything long is begun
        with jax.set_mesh(mesh):
            model = open_model(cfg, mesh, head="score")
            rows = look(cfg)
            if rows.kind != "pairs":  # one score a row: where a template drops earlier thoughts, of
                # what it makes of the last turn; what is trained counts for lengths of pairs alone
                last = cfg.chat.model_copy(update={"train_on": "last"})
                chat = ChatTemplate(model.chat.source, model.tokenizer, last)
                model = replace(model, chat=chat)
            cache = _prepare(cfg, model, rows.kind)
            examples = tokens = 0
            with Progress("score", int(cache.lengths.sum())) as progress:

                def scored(ids: Any) -> None:
                    nonlocal examples, tokens
                    examples += len(ids)
                    tokens += int(cache.lengths[ids].sum())
                    progress.update(tokens, examples, tokens)

                scores = score_examples(cache, model, mesh, rows=cfg.rows, done=scored)
        copy(cfg, rows, cache, scores, file)
    for line in _said(rows, cache, scores):
        print(line)
    seconds = time.monotonic() - began
    print(f"{cfg.out}: {tokens:,} tokens, {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    return 0


@dataclass(frozen=True)
class Rows:
    """What the input is: how many rows, of which kind, and the columns that they get."""

    count: int
    kind: DataKind
    columns: tuple[str, ...]


def _source(cfg: Config) -> SourceConfig:
    return SourceConfig(
        path=cfg.input, format=cfg.format, fields=cfg.fields, ignore_keys=cfg.ignore_keys
    )


def _files(cfg: Config) -> list[str]:
    from posttrain.data.sources import find_files

    try:
        return find_files(_source(cfg))
    except ValueError as error:
        raise ConfigError(f"input: {error}") from error


def look(cfg: Config) -> Rows:
    """Reads all rows once. ConfigError: no such file, or rows have the columns already."""
    from posttrain.data.sources import read_blocks

    source, files = _source(cfg), _files(cfg)
    both = (f"{cfg.column}_chosen", f"{cfg.column}_rejected")
    kind: DataKind | None = None
    count, taken, first = 0, Counter[str](), dict[str, str]()
    for row in (row for block in read_blocks(source, files) for row in block.rows()):
        count += 1
        if row.problems:
            continue
        place = f"{row.file}:{row.line}"
        kind = kind or _kind_of(row.value, source, place)
        if isinstance(row.value, dict):
            for name in {*both, cfg.column} & row.value.keys():
                taken[name] += 1
                first.setdefault(name, place)
    if not count:
        raise ConfigError(f"input: {cfg.input} has no rows: there is nothing to score")
    kind = kind or "samples"  # of which preparing says what it misses
    columns = both if kind == "pairs" else (cfg.column,)
    for name in columns:
        if taken[name]:
            raise ConfigError(
                f"{first[name]}: has a column {name!r} already ({taken[name]:,} rows have): name "
                "another with column=..."
            )
    return Rows(count, kind, columns)


def _kind_of(row: Any, source: SourceConfig, place: str) -> DataKind | None:
    from posttrain.data.formats import find_format

    for kind in _KINDS:
        with contextlib.suppress(ValueError):
            find_format(row, source, place, kind=kind)
            return kind
    return None


def _prepare(cfg: Config, model: Any, kind: DataKind) -> Any:
    """The cache of the rows. BadRows, in the words of this job; ConfigError on seq_len."""
    from posttrain.data.prepare import BadRows, prepare
    from posttrain.data.tokenise import TOO_LONG

    room = model.spec.max_positions
    if cfg.seq_len is not None and cfg.seq_len > room:
        raise ConfigError(f"seq_len is {cfg.seq_len}, and the model's context is {room}")
    data = DataConfig(
        sources={"rows": _source(cfg)},
        seq_len=cfg.seq_len or room,
        too_long="drop" if cfg.too_long == "skip" else cfg.too_long,
        on_bad_row=cfg.on_bad_row,
        cache_dir=cfg.cache_dir,
    )
    try:
        return prepare(data, model.chat, kind=kind, quiet=True, section="input")
    except BadRows as error:
        own = "seq_len" if data.seq_len < room else "the model's context"
        defects = [
            replace(
                d,
                found=d.found.replace(TOO_LONG, f"over {own}"),
                fix="too_long=skip gives it no score, too_long=truncate_start cuts off its start",
            )
            if TOO_LONG in d.found
            else d
            for d in error.defects
        ]
        hint = "on_bad_row=skip gives rows that break the rules no score, counted"
        raise BadRows(defects, error.rows, hint) from None


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """A file that takes its name once it is whole; nothing is left of another.

    It is made at once: a folder that cannot be written to is told before anything is computed.
    """
    if path.is_dir():
        raise ConfigError(f"out is {path}, a folder: name a file in it")
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ConfigError(f"out is {path}: JSONL is written: give it a name that ends in .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        # a lone surrogate is no UTF-8: written as JSON names it
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy(cfg: Config, rows: Rows, cache: Any, scores: Any, file: IO[str]) -> None:
    """Every row with its columns, null where it has no score: examples lie in the order of rows."""
    from posttrain.data.sources import read_blocks

    sides, at, count = cache.sides, 0, 0
    for block in read_blocks(_source(cfg)):
        for row in block.rows():
            count += 1
            line = {**row.value} if isinstance(row.value, dict) else {}
            line |= dict.fromkeys(rows.columns)
            if at < len(scores) and cache.place(at) == (place := f"{row.file}:{row.line}"):
                found = scores[at : at + sides]
                if not np.isfinite(found).all():
                    wrong = found[~np.isfinite(found)][0]
                    raise ValueError(f"{place}: its score is {wrong}: are the weights whole?")
                line |= zip(rows.columns, found.tolist(), strict=True)
                at += sides
            file.write(_line(line) + "\n")
    if count != rows.count or at != len(scores):
        raise ValueError(f"input {cfg.input}: has changed while it was scored: score it again")


def _line(row: dict[str, Any]) -> str:
    """JSON of a row; dates and the like of a Parquet file as text, and its NaN as null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=str)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(rows: Rows, cache: Any, scores: Any) -> Iterator[str]:
    """What is to be said: how many rows, what became of the others, and what the scores are."""
    scored = len(scores) // cache.sides
    missing = rows.count - scored
    yield (
        f"{scored:,} of {rows.count:,} {'pairs' if cache.sides == 2 else 'rows'} scored"
        + (f", {missing:,} null" if missing else "")
        + f"; mean {scores.mean():.4f}, standard deviation {scores.std():.4f}, "
        f"least {scores.min():.4f}, greatest {scores.max():.4f}"
    )
    yield from cache.report.losses()
    if cache.sides == 2:
        from posttrain.train.rewards import judge

        figures = {"accuracy": float((scores[0::2] > scores[1::2]).mean())}
        figures |= judge(scores, cache.trained)
        yield ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
