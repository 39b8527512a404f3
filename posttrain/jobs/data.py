"""Training data before it is trained on: tokenised, looked at, or checked line by line.

A config of the sft, preference or reward_model job will do as it is: the sections model, chat, data
and batch are read, and the loss of a preference config says what kind of data it takes (kind). No
device is needed, and no weights: of the model, only tokenizer and template.

    posttrain data check configs/sft/qwen3_gsm8k.yaml data.sources.gsm8k.path=train.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from posttrain.chat.config import ChatConfig
from posttrain.config import Config as Section
from posttrain.config import ConfigError, resolve, runtime, semantic
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig
from posttrain.models.spec import ModelConfig
from posttrain.types import DataKind

ACTIONS = {
    "prepare": "tokenise every source once into the cache, with a report",
    "preview": "show rows as they are trained on, in colour, and as an HTML page",
    "check": "list every bad line with field, what was found and what to do; exit code 1 if any",
}


def _of_loss(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of data that the loss of a preference config takes."""
    from posttrain.losses.mixture import PREFERENCE_LOSSES  # jax loads here

    loss = tree.get("loss")
    name = loss.get("type") if isinstance(loss, Mapping) else None
    if name is None:
        return {"kind": "pairs"}
    try:
        return {"kind": resolve(PREFERENCE_LOSSES, str(name))().data}
    except ValueError as error:
        raise ConfigError(f"loss.type: {error}") from error


ACCEPTS = {"sft": {}, "preference": _of_loss, "reward_model": {"kind": "pairs"}}
_TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model")


class PreviewConfig(Section):
    """What `preview` shows."""

    step: int = runtime(0, ge=0, help="the first step whose rows are shown")
    rows: int = runtime(4, gt=0, help="rows shown")
    html: Path | None = runtime(Path("preview.html"), help="the page it writes; none = no page")


class Config(Section):
    """The parts of a run that decide its data."""

    job: Literal["data"] = semantic("data", help="names the job")
    seed: int = semantic(0, ge=0, help="of the order of examples (preview)")
    model: ModelConfig = semantic(help="the model whose tokenizer and template are used")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    data: DataConfig = semantic(help="the sources")
    kind: DataKind = semantic(
        "samples",
        help="what the sources hold: samples to imitate, preference pairs, labelled answers, or "
        "these with mismatched twins",
    )
    batch: BatchConfig = semantic(BatchConfig(rows=8), help="how rows are packed (preview)")
    preview: PreviewConfig = runtime(PreviewConfig(), help="what preview shows")


def run(cfg: Config, action: str) -> int:
    """Exit code: 0, or 1 where `check` found a defect. ValueError: what the user can mend."""
    from posttrain.chat.template import ChatTemplate
    from posttrain.chat.tokenizer import Tokenizer

    folder = _tokenizer_folder(cfg.model.path)
    tokenizer = Tokenizer.load(folder)
    if cfg.model.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(cfg.model.new_tokens))
    chat = ChatTemplate.load(folder, tokenizer, cfg.chat)
    return {"prepare": _prepare, "preview": _preview, "check": _check}[action](cfg, chat)


def _tokenizer_folder(path: str) -> Path:
    """The model folder; of a hub id, only its small files are downloaded."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path: {path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_TOKENIZER_FILES)))
    except Exception as error:  # the HTTP client under the hub, and its errors, vary by version
        raise ValueError(
            f"model.path: {path}: no such folder, and not to be had from the hub "
            f"({type(error).__name__})"
        ) from error


def _prepare(cfg: Config, chat: Any) -> int:
    from posttrain.data.prepare import prepare

    print(prepare(cfg.data, chat, kind=cfg.kind).folder)
    return 0


def _preview(cfg: Config, chat: Any) -> int:
    from posttrain.data.plan import Plan
    from posttrain.data.prepare import prepare
    from posttrain.data.preview import preview

    cache = prepare(cfg.data, chat, kind=cfg.kind)
    data = cfg.data
    plan = Plan(
        cache,
        cfg.batch,
        seq_len=data.seq_len,
        seed=cfg.seed,
        epochs=1,
        sources=data.sources,
        kind=cfg.kind,
    )
    shown = cfg.preview
    preview(cache, plan, chat.tokenizer, step=shown.step, count=shown.rows, page=shown.html)
    return 0


def _check(cfg: Config, chat: Any) -> int:
    from posttrain.data.check import check

    checked = check(cfg.data, chat, kind=cfg.kind, quiet=False)
    for defect in checked.defects:
        print(defect)
    if rendered := next((d.rendered for d in checked.defects if d.rendered), ""):
        print(f"what the template made of the first row that it refuses:\n{rendered}")
    if not checked.defects:
        print(f"{checked.rows:,} rows: no defect")
        return 0
    bad = len({(d.file, d.line) for d in checked.defects})
    print(f"{len(checked.defects):,} defects in {bad:,} of {checked.rows:,} rows")
    return 1
