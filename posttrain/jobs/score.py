"""Scores answers by a reward model: rows in, the same rows in the same order with a score out.

A row is a conversation that ends with the answer, or a prompt and its completion, in any form that
`posttrain sft` reads; `fields` maps other columns, and puts plain texts into the model's template:
fields.user=prompt fields.assistant=completion. A score is about the whole row, read at its last
token. The model is a folder with a score head: the export of `posttrain reward_model`, or any of
transformers' ...ForSequenceClassification with one label. Rows are tokenised once (there is a
cache) and packed. It does not score pairs as such: score each side.

    posttrain score model.path=runs/first/export input=answers.jsonl out=scored.jsonl
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

from posttrain.chat.config import ChatConfig
from posttrain.config import Config as Section
from posttrain.config import ConfigError, runtime, semantic
from posttrain.data.config import DataConfig, SourceConfig
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig

_ROUND = 128  # rows are this many tokens long, or a multiple: few shapes over many files


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
    column: str = semantic("score", min_length=1, help="the column that holds the score")
    seq_len: int | None = semantic(
        None, ge=8, help="most tokens of a row's conversation; none = the model's context"
    )
    too_long: Literal["error", "skip", "truncate_start"] = semantic(
        "error", help="a row over seq_len: error, skip (its score is null), or cut off its start"
    )
    on_bad_row: Literal["error", "skip"] = semantic(
        "error", help="a row that breaks the rules: error (all at once), or skip (its score is null)"
    )
    rows: int = runtime(8, gt=0, help="packed rows of a batch")
    cache_dir: str = runtime("~/.cache/posttrain/data", help="folder of the tokenised caches")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")


def run(cfg: Config) -> int:
    """The exit code: 0. ValueError on what the user can mend."""
    import jax

    from posttrain.data.prepare import prepare
    from posttrain.sharding import make_mesh
    from posttrain.train.model import open_model, use_compile_cache

    began = time.monotonic()
    use_compile_cache()
    rows = _rows(cfg)
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        model = open_model(cfg, mesh, head="score")
        room = model.spec.max_positions
        if cfg.seq_len is not None and cfg.seq_len > room:
            raise ConfigError(f"seq_len is {cfg.seq_len}, and the model's context is {room}")
        cache = prepare(_data(cfg, cfg.seq_len or room), model.chat, quiet=True, section="input")
        scores = _scores(cfg, model, mesh, cache)
    by_place: dict[str, float] = {}
    for i, score in enumerate(scores.tolist()):
        place = cache.place(i)
        if place in by_place:
            raise ValueError(
                f"{place}: the template makes several examples of it (one for each thought), and "
                "a row has one score: leave the earlier thoughts out"
            )
        by_place[place] = score
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = cfg.out.with_name(f"{cfg.out.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for place, value in rows:
            line = {**value, cfg.column: by_place.get(place)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    temporary.replace(cfg.out)
    missing = len(rows) - len(by_place)
    print(
        f"{cfg.out}: {len(by_place):,} of {len(rows):,} rows scored"
        + (f" ({missing:,} are null: {'; '.join(cache.report.losses())})" if missing else "")
        + f", mean {scores.mean():.4f}, standard deviation {scores.std():.4f}, "
        f"{int(cache.lengths.sum()):,} tokens, {time.monotonic() - began:.1f} s"
    )
    return 0


def _source(cfg: Config) -> SourceConfig:
    return SourceConfig(
        path=cfg.input, format=cfg.format, fields=cfg.fields, ignore_keys=cfg.ignore_keys
    )


def _data(cfg: Config, seq_len: int) -> DataConfig:
    return DataConfig(
        sources={"rows": _source(cfg)},
        seq_len=seq_len,
        too_long="drop" if cfg.too_long == "skip" else cfg.too_long,
        on_bad_row=cfg.on_bad_row,
        cache_dir=cfg.cache_dir,
    )


def _rows(cfg: Config) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) of every row; what is no object has no columns of its own."""
    from posttrain.data.sources import read_rows

    if cfg.out.is_dir():
        raise ConfigError(f"out is {cfg.out}, a folder: name a file in it")
    rows = [
        (f"{row.file}:{row.line}", row.value if isinstance(row.value, dict) else {})
        for row in read_rows(_source(cfg))
    ]
    taken = [place for place, value in rows if cfg.column in value]
    if taken:
        raise ConfigError(
            f"{taken[0]}: has a column {cfg.column!r} already ({len(taken):,} rows have): name "
            "another with column=..."
        )
    return rows


def _scores(cfg: Config, model: Any, mesh: Any, cache: Any) -> Any:
    """float32 [N]: the score of each example of the cache."""
    import jax
    from flax import nnx

    from posttrain import sharding
    from posttrain.data.plan import BatchConfig, Plan
    from posttrain.train.rewards import gather_scores
    from posttrain.types import Batch

    longest = math.ceil(int(cache.lengths.max()) / _ROUND) * _ROUND
    shards = sharding.batch_shards(mesh)
    size = BatchConfig(rows=cfg.rows * shards, order="sequential")
    plan = Plan(cache, size, seq_len=longest, seed=0, epochs=1, batch_shards=shards)

    def score(params: Any, batch: Batch) -> jax.Array:
        network = nnx.merge(model.graphdef, params)
        micro = jax.tree.map(lambda x: x[0], batch)
        hidden = network.hidden(micro.tokens, micro.positions, micro.segment_ids)
        return network.scores(hidden, micro.segment_ids, micro.example_ids.shape[-1])[None]

    run = jax.jit(score, out_shardings=sharding.replicated(mesh))
    return gather_scores(cache, plan, mesh, lambda batch: run(model.params, batch))
