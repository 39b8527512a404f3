"""What a run says about its data: the sources, the longest example, what becomes of a bad row."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, field_validator

from posttrain.config import Config, runtime, semantic

TooLong = Literal["truncate_end", "truncate_start", "split", "drop", "error"]


class SourceConfig(Config):
    """One named part of the mixture. Its key in `data.sources` is its name in the metrics."""

    path: str | tuple[str, ...] = semantic(
        help="file, glob or list of them (.jsonl[.gz], .json[.gz], .parquet, .array_record; local "
        "or gs://), or hf:owner/name[/folder][@revision][:split]"
    )
    format: str = semantic(
        "auto", help="auto, a name from posttrain.data.formats, or pkg.module:NAME"
    )
    fields: dict[str, str] = semantic(
        {},
        help="own columns: {user: question, assistant: answer, system: ...}, {text: ...}, "
        "{prompt:, completion:} or {messages:, tools:}; of pairs {user:, chosen:, rejected:}; a "
        "value is a column, a dotted path into it, or a text with {column} in it",
    )
    weight: float | None = semantic(
        None, gt=0, help="share in the mixture, against the other sources' weights"
    )
    repeats: float = semantic(1.0, gt=0, help="times an epoch sees each example, where no weights")
    limit: int | None = semantic(None, gt=0, help="only the first rows of this source")
    margin: str = semantic(
        "margin",
        help='of pairs: column that says by how much chosen is better, where rows have it; "" = '
        "it is left alone",
    )
    ignore_keys: tuple[str, ...] = semantic(
        (), help="keys of messages that hold no training data (ids, dates, ranks ...)"
    )

    @field_validator("path")
    @classmethod
    def _some_path(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not path or (isinstance(path, tuple) and not all(path)):
            raise ValueError("empty: name a file, a glob or hf:owner/name")
        return path

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


def _check_names(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    for name in sources:
        if not re.fullmatch(r"\w[\w .:+-]*", name):
            raise ValueError(
                f"{name!r} is no name for a source (it names metrics and files): "
                "use letters, digits, _ and -"
            )
    return sources


Sources = Annotated[dict[str, SourceConfig], AfterValidator(_check_names)]
"""Name -> source."""


class DataConfig(Config):
    """The data section of a config."""

    sources: Sources = semantic(
        min_length=1, help="name -> source; the name is used in reports and metrics"
    )
    seq_len: int = semantic(1024, ge=8, help="most tokens of one example, and of one packed row")
    too_long: TooLong = semantic(
        "truncate_end",
        help="an example over seq_len: truncate_end, truncate_start, split (samples alone), "
        "drop or error",
    )
    kl_block: int = semantic(
        8,
        ge=2,
        help="of labelled answers, where the loss measures a KL (kto): rows that lend each other "
        "their answers; each is also read with the answer of the row before it in its block",
    )
    on_bad_row: Literal["error", "skip"] = semantic(
        "error", help="rows that break the rules: error (all listed at once), or skip (counted)"
    )
    cache_dir: str = runtime(
        "~/.cache/posttrain/data",
        help="folder of the tokenised caches, shared by all hosts, or gs://BUCKET/FOLDER",
    )
    workers: int | None = runtime(
        None, ge=0, help="worker processes of prepare; 0: threads, empty: by cores and data"
    )
    wait_minutes: float = runtime(
        60.0, gt=0, help="how long the other hosts wait for the one that prepares"
    )
