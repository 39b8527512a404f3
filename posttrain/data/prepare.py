"""Renders and tokenises every source once, with all cores, into a cache found by its key."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.chat.template import ChatTemplate
from posttrain.config import ConfigError
from posttrain.data import stored
from posttrain.data.cache import INDEX, Cache, CacheWriter
from posttrain.data.config import DataConfig, SourceConfig
from posttrain.data.fingerprint import fingerprint
from posttrain.data.formats import find_format
from posttrain.data.progress import Progress
from posttrain.data.report import Report, SourceReport
from posttrain.data.rows import Defect
from posttrain.data.sources import Block, find_files, read_blocks, size_of
from posttrain.data.tokenise import TOO_LONG, Job, Result, Task
from posttrain.data.workers import run_tasks, worker_count
from posttrain.mirror import local_of
from posttrain.types import EXAMPLES_OF, DataKind

_LISTED = 50  # bad rows that an error repeats
_POLL = 0.5  # seconds between looks for another host's cache


class BadRows(ValueError):
    """Rows that break the rules: all of them, in the order of the data.

    hint: what can be done about them all; by default what the data section of a config can.
    """

    def __init__(self, defects: Sequence[Defect], rows: int, hint: str = ""):
        self.defects, self.rows = tuple(defects), rows
        bad = len({(d.file, d.line) for d in defects})
        lines = [f"{bad:,} of {rows:,} rows are bad:", *map(str, defects[:_LISTED])]
        if len(defects) > _LISTED:
            kinds = Counter(
                TOO_LONG if TOO_LONG in d.found else d.found.split(":")[0] for d in defects
            ).most_common(5)
            shown = ", ".join(f"{count:,} x {kind}" for kind, count in kinds)
            lines.append(f"... and {len(defects) - _LISTED:,} more ({shown})")
        if rendered := next((d.rendered for d in defects if d.rendered), ""):
            lines.append(f"what the template made of the first row that it refuses:\n{rendered}")
        lines.append(hint or self._usual_hint())
        super().__init__("\n".join(lines))

    def _usual_hint(self) -> str:
        hint = "`posttrain data check` lists them all"
        if any(TOO_LONG not in d.found for d in self.defects):  # skip does not apply to long rows
            hint += "; data.on_bad_row: skip leaves them out, counted"
        return hint


def prepare(
    cfg: DataConfig,
    chat: ChatTemplate,
    *,
    kind: DataKind = "samples",
    is_primary: bool = True,
    quiet: bool = False,
    section: str = "data.sources",
) -> Cache:
    """The cache of cfg's sources: opened where it exists, else made; the report is shown.

    The sources hold data of one kind. `section` is what errors call the part of the config that
    they stand in. quiet: the report is not shown; how far it is, is.
    Where several hosts share cache_dir, one is primary and makes it; the others wait for it, up to
    cfg.wait_minutes; where cache_dir is in a store, each machine has a copy (data/stored.py).
    Raises ConfigError for what cannot be split, BadRows with all bad rows (unless on_bad_row is
    skip), ValueError for sources that cannot be read, for data of which nothing is left, and when
    the wait is over.
    """
    if os.path.expanduser(cfg.cache_dir).startswith("~"):
        raise ValueError(f"data.cache_dir: {cfg.cache_dir}: this user has no home; name a folder")
    refuse_split(cfg, kind)
    files = files_of(cfg, section)
    key = fingerprint(cfg, chat, files, kind=kind)
    folder = local_of(cfg.cache_dir) / key
    store = stored.place(cfg.cache_dir, key)
    stored.bring(store, folder)
    if not (folder / INDEX).exists():
        if is_primary:
            cache = _make(cfg, chat, files, key, folder, kind, quiet, section)
            stored.keep(folder, store)
            return cache
        _wait(folder, store, cfg.wait_minutes)
    cache = Cache.open(folder)
    if is_primary:
        stored.keep(folder, store)
        if not quiet:
            cache.report.show()
    return cache


def _make(
    cfg: DataConfig,
    chat: ChatTemplate,
    files: dict[str, list[str]],
    key: str,
    folder: Path,
    kind: DataKind,
    quiet: bool,
    section: str,
) -> Cache:
    names = list(cfg.sources)
    empty = {name: SourceReport() for name in names}
    report = Report(key, cfg.seq_len, cfg.too_long, empty, kind=kind)
    report.warnings = chat.check()
    defects: list[Defect] = []
    began = time.monotonic()
    with CacheWriter(folder, names, sides=EXAMPLES_OF[kind]) as writer:
        results = run(cfg, chat, files, report, title="prepare", shown=True, section=section)
        for result in results:
            defects += result.too_long
            if cfg.on_bad_row == "error":
                defects += result.defects
            writer.add(
                result.tokens,
                result.weights,
                result.lengths,
                result.lines,
                result.margins,
                result.labels,
                result.source_id,
                result.file,
            )
        report.seconds = time.monotonic() - began
        if defects:
            raise BadRows(defects, report.total.given)
        for name, source in report.sources.items():
            if source.examples == 0:
                raise ValueError(_nothing_left(f"{section}.{name}", source, files[name], kind))
        cache = writer.finish(key, report)
    if not quiet:
        report.show()
    return cache


def run(
    cfg: DataConfig,
    chat: ChatTemplate | None,
    files: dict[str, list[str]],
    report: Report,
    *,
    title: str,
    shown: bool,
    section: str = "data.sources",
) -> Iterator[Result]:
    """Every block of every source, in order, tokenised (checked alone, where `chat` is None);
    `report` is kept up to date (and says what kind of data they are) and the progress shown."""
    sizes = [size_of(files[name]) for name in cfg.sources]
    workers = worker_count(cfg.workers, sum(sizes))
    report.workers = workers
    sources = tuple(cfg.sources.values())
    job = Job(sources, chat, cfg.seq_len, cfg.too_long, report.kind, cfg.kl_block)
    names = list(cfg.sources)
    position = _Position()
    examples = tokens = 0
    with Progress(title, sum(sizes), shown=shown) as progress:
        for result in run_tasks(job, _tasks(cfg, files, report.kind, section), workers):
            report.sources[names[result.source_id]].add(result.report)
            report.count_lengths(result.whole_lengths)
            examples += result.report.examples
            tokens += result.report.tokens
            progress.update(position.at(result), examples, tokens)
            yield result


class _Position:
    """Bytes read in all, from bytes read of each file."""

    def __init__(self) -> None:
        self._before, self._file, self._read = 0, "", 0

    def at(self, result: Result) -> int:
        if result.file != self._file:
            self._before, self._file = self._before + self._read, result.file
        self._read = result.read
        return self._before + self._read


def refuse_split(cfg: DataConfig, kind: DataKind) -> None:
    """ConfigError where answers that are judged are to be split."""
    if kind != "samples" and cfg.too_long == "split":
        whole = "a pair has two whole answers" if kind == "pairs" else "an answer is judged whole"
        raise ConfigError(
            f"data.too_long: split: {whole}; use drop, error, truncate_end or truncate_start"
        )


def files_of(cfg: DataConfig, section: str = "data.sources") -> dict[str, list[str]]:
    """Source name -> its files. ValueError with every source that find_files has none of."""
    files: dict[str, list[str]] = {}
    missing: list[str] = []
    for name, source in cfg.sources.items():
        try:
            files[name] = find_files(source)
        except ValueError as error:
            missing.append(f"{section}.{name}.path: {error}")
    if missing:
        raise ValueError("\n".join(missing))
    return files


def _tasks(
    cfg: DataConfig, files: dict[str, list[str]], kind: DataKind, section: str
) -> Iterator[Task]:
    for source_id, (name, source) in enumerate(cfg.sources.items()):
        found = None
        for block in read_blocks(source, files[name]):
            found = found or _format_of(block, source, kind, f"{section}.{name}")
            yield Task(source_id, found, block)


def _format_of(block: Block, source: SourceConfig, kind: DataKind, key: str) -> str | None:
    """The format that the first row with a known shape has; None where no row can be read."""
    refusal: ValueError | None = None
    for row in block.rows():
        if not row.problems:
            try:
                place = f"{key}: {row.file}:{row.line}"
                return find_format(row.value, source, place, kind=kind)
            except ValueError as error:
                refusal = refusal or error
    if refusal is not None:
        raise refusal
    return None


def _nothing_left(key: str, source: SourceReport, files: list[str], kind: DataKind) -> str:
    what = [f"{source.bad_rows} bad"] if source.bad_rows else []
    what += [f"{count} dropped: {reason}" for reason, count in source.dropped.items()]
    rows = f"{source.rows} rows" + (f" ({'; '.join(what)})" if what else "")
    thing = "pair" if kind == "pairs" else "example"
    return f"{key}: no {thing} left of {rows} in {', '.join(files) or 'no file'}"


def _wait(folder: Path, store: Any, minutes: float) -> None:
    """Until another host has made the cache. ValueError: it has not in time."""
    end = time.monotonic() + 60 * minutes
    while not (folder / INDEX).exists():
        if time.monotonic() > end:
            working = sorted(folder.parent.glob(f"{folder.name}.tmp.*"))
            state = f"{working[0].name} is being written" if working else "nothing is being written"
            raise ValueError(
                f"waited {minutes:g} minutes for the first host to prepare {folder}: {state}. Is "
                "data.cache_dir shared by all hosts, and do all see the same data? Else raise "
                "data.wait_minutes, or run `posttrain data prepare` once before"
            )
        time.sleep(_POLL)
        stored.bring(store, folder)
