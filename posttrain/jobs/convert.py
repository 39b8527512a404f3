"""A model folder, or a run's checkpoint, -> a Hugging Face folder that transformers opens.

Changes the dtype, adds special tokens, pads the vocabulary, splits files by size; of a run it
exports any checkpoint that is still there, adapters merged. A PEFT adapter is merged into its base.
One tensor is in memory at a time on the host. It does not quantise or read pickles.

    posttrain convert source=MODEL out=MODEL-bf16 dtype=bfloat16
    posttrain convert source=runs/first@500 out=exported
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.chat.config import ChatConfig
from posttrain.config import Config as Section
from posttrain.config import ConfigError, runtime, semantic
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import DtypeName, HeadName, ModelConfig, Token
from posttrain.sharding import MeshConfig


class Config(Section):
    """What is read, what is written."""

    job: Literal["convert"] = semantic("convert", help="names the job")
    source: str = semantic(help="model folder, hub id, or run folder (RUN or RUN@STEP)")
    out: Path = semantic(help="the folder that is written")
    dtype: DtypeName | None = semantic(None, help="of the weights written; none = the source's")
    adapter: str | None = semantic(None, help="folder of a PEFT adapter to merge into source")
    new_tokens: tuple[Token, ...] = semantic(
        (), help="special tokens to add (not to a run's model)"
    )
    vocab_multiple: int = semantic(
        1, ge=1, help="pad the vocabulary to a multiple; rows added are the mean of the old"
    )
    max_file_gb: float = runtime(5.0, gt=0, help="size of one safetensors file, in 10^9 bytes")
    mesh: MeshConfig = runtime(MeshConfig(), help="where the weights lie meanwhile")


class _Trained(Section):
    """What any training run's resolved.yaml says of its model."""

    job: Literal["trained"] = semantic("trained", help="names the job")
    model: ModelConfig = semantic(help="what was trained")
    chat: ChatConfig = semantic(ChatConfig(), help="how it is talked to")
    lora: LoraConfig | None = semantic(None, help="the adapters that were trained beside it")
    head: HeadName = semantic("lm", help="what it ends in")


TRAINS: dict[str, dict[str, str]] = {"sft": {}, "preference": {}, "reward_model": {"head": "score"}}
"""The jobs whose run folders are read, and what they mean for _Trained."""


@dataclass(frozen=True)
class _Source:
    """What is to be written, and the folder that its tokenizer came from."""

    folder: Path
    spec: Any
    params: Any
    dtype: DtypeName
    tokenizer: Any
    template: str | None
    stop_ids: tuple[int, ...]
    pad_id: int | None = None
    leaf: Any = None  # what merges an adapter into a parameter when it is written


def run(cfg: Config) -> int:
    """The exit code: 0. ValueError on what the user can mend."""
    import jax

    from posttrain import sharding
    from posttrain.models import hf

    mesh = sharding.make_mesh(cfg.mesh)
    run_dir = Path(cfg.source.partition("@")[0])
    with jax.set_mesh(mesh):
        is_run = (run_dir / "resolved.yaml").is_file()
        source = _of_run(cfg, run_dir, mesh) if is_run else _of_folder(cfg, mesh)
        if cfg.out.exists() and not cfg.out.is_dir():
            raise ConfigError(f"out is {cfg.out}, a file: choose a folder")
        read = [source.folder, *([Path(cfg.adapter)] if cfg.adapter else [])]
        if cfg.out.resolve() in (folder.expanduser().resolve() for folder in read):
            raise ConfigError(f"out is {cfg.out}, the folder that is read: choose another")
        hf.save(
            cfg.out,
            source.spec,
            source.params,
            source.tokenizer,
            dtype=source.dtype,
            stop_ids=source.stop_ids,
            pad_id=source.pad_id,
            shard_bytes=int(cfg.max_file_gb * 10**9),
            leaf=source.leaf,
        )
        _write_rest(cfg, source)
    print(
        f"{cfg.out}: {source.spec.title}, {source.spec.parameters:,} parameters, "
        f"{source.spec.vocab_size} tokens, {source.dtype}"
    )
    return 0


def _of_folder(cfg: Config, mesh: Any) -> _Source:
    from posttrain.chat.tokenizer import Tokenizer
    from posttrain.models import hf, read_spec
    from posttrain.models.config_json import read_json
    from posttrain.models.folder import local_folder
    from posttrain.models.peft_config import is_scorer

    folder = local_folder(cfg.source)
    raw = read_json(folder / "config.json")
    dtype = cfg.dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"{folder} is in {dtype}: set dtype to float32 or bfloat16")
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if cfg.new_tokens and not has_tokenizer:
        raise ConfigError(f"new_tokens: {folder} holds no tokenizer.json to add them to")
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    used, size = (tokenizer.size, tokenizer.size) if tokenizer else (0, 0)
    if tokenizer and cfg.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(cfg.new_tokens))
        size = tokenizer.size
    rows = max(size, read_spec(folder).vocab_size)
    rows = -(-rows // cfg.vocab_multiple) * cfg.vocab_multiple
    options: dict[str, Any] = {"param_dtype": dtype, "dtype": dtype, "vocab_multiple": 1}
    adapter = local_folder(cfg.adapter) if cfg.adapter else None
    scores = adapter is not None and is_scorer(adapter)
    model = hf.open_model(
        ModelConfig(path=str(folder), **options),
        mesh,
        tokenizer_size=rows,
        new_ids=range(used, size),
        head="score" if scores else None,
        new_head=True,
    )
    stops = tokenizer.stop_ids if tokenizer and model.spec.head == "lm" else ()
    if scores and tokenizer:
        tokenizer = tokenizer.padding_apart(tokenizer.stop_ids)
    params, leaf = model.state, None
    if adapter is not None:
        params, leaf = _with_adapter(adapter, model, mesh, range(used, size))
    return _Source(
        folder,
        model.spec,
        params,
        options["dtype"],
        tokenizer,
        _template_of(folder, tokenizer),
        tuple(stops),
        tokenizer.pad_id if scores and tokenizer else None,
        leaf,
    )


def _with_adapter(folder: Path, model: Any, mesh: Any, new_ids: range) -> tuple[Any, Any]:
    """The parameters of an opened model, and what merges an adapter into each of them."""
    from flax import nnx

    from posttrain.models import adapters, peft

    paths = [path for path, *_ in adapters.linears(nnx.merge(model.graph, model.state))]
    lora = peft.read_config(folder, paths, model.spec)
    _, state = adapters.attach(model.graph, model.state, lora, mesh, new_ids=new_ids)
    params, _ = peft.load(folder, model.spec, nnx.to_pure_dict(state), lora, new_ids)
    return adapters.merging(params, lora.adapter, new_ids, params["embedding"].dtype)


def _template_of(folder: Path, tokenizer: Any) -> str | None:
    """The folder's chat template, if it has one."""
    from posttrain.chat.source import find_source

    if tokenizer is None:
        return None
    if tokenizer.chat_template is None and not (folder / "chat_template.jinja").is_file():
        return None
    return find_source(folder, tokenizer.chat_template, None)


def _of_run(cfg: Config, run_dir: Path, mesh: Any) -> _Source:
    import jax.numpy as jnp
    from flax import nnx

    from posttrain import config
    from posttrain.chat.template import ChatTemplate
    from posttrain.chat.tokenizer import Tokenizer
    from posttrain.models import adapters, read_spec
    from posttrain.models.folder import local_folder
    from posttrain.models.transformer import abstract_model, compute_of
    from posttrain.train.model import open_model
    from posttrain.train.starting import restored

    if cfg.new_tokens or cfg.vocab_multiple > 1 or cfg.adapter:
        raise ConfigError(
            f"{run_dir} is a run: export it first, then add tokens or an adapter to the exported "
            "folder, or pad it"
        )
    trained = config.load(_Trained, [run_dir / "resolved.yaml"], accepts=TRAINS)
    folder = local_folder(trained.model.path)
    tokenizer = Tokenizer.load(folder)
    old = tokenizer.size
    if trained.model.new_tokens:
        tokenizer = tokenizer.with_added_tokens(list(trained.model.new_tokens))
    chat = ChatTemplate.load(folder, tokenizer, trained.chat)
    spec = dataclasses.replace(read_spec(folder), head=trained.head)
    spec = spec.with_vocab(max(spec.vocab_size, tokenizer.size), trained.model.vocab_multiple)
    ids, leaf = range(old, tokenizer.size), None
    graph, layout = abstract_model(spec, compute_of(trained.model), mesh)
    # the values of the adapters are the run's, wherever they began
    lora = trained.lora and trained.lora.model_copy(update={"path": None})
    if lora:
        _, layout = adapters.adapt(graph, layout, lora, mesh, new_ids=ids)

    def base() -> Any:  # where the run left a part of the parameters as it found them
        model = open_model(trained, mesh, head=trained.head, new_head=True, lora=lora)
        return model.params

    params = restored(cfg.source, nnx.to_pure_dict(layout), base)
    if lora:
        dtype = jnp.dtype(trained.model.param_dtype)
        params, leaf = adapters.merging(params, lora.adapter, ids, dtype)
    stops, pad_id = tuple(chat.stop_ids), None
    if trained.head == "score":
        tokenizer = tokenizer.padding_apart(stops)
        stops, pad_id = (), tokenizer.pad_id
    return _Source(
        folder,
        spec,
        params,
        cfg.dtype or trained.model.param_dtype,
        tokenizer,
        chat.source,
        stops,
        pad_id,
        leaf,
    )


def _write_rest(cfg: Config, source: _Source) -> None:
    """The chat template, and what the source's generation config says beside the stop tokens."""
    from posttrain.checkpoint import is_primary
    from posttrain.models.config_json import read_json

    if not is_primary():
        return
    if source.template is not None:
        (cfg.out / "chat_template.jinja").write_text(source.template, encoding="utf-8")
    name = "generation_config.json"
    if source.spec.head == "lm" and (source.folder / name).is_file():
        written = read_json(cfg.out / name) if (cfg.out / name).is_file() else {}
        merged = read_json(source.folder / name) | written
        (cfg.out / name).write_text(json.dumps(merged, indent=2) + "\n")
