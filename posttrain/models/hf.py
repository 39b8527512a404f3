"""Hugging Face folders in and out: safetensors straight into sharded arrays and back.

One tensor is in flight at a time, and of it a process reads only what its devices hold. Nothing
is unpickled: pytorch_model.bin is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from posttrain.models import read_spec
from posttrain.models.keys import (
    KEYS,
    Key,
    Slices,
    file_names,
    file_shape,
    file_slices,
    from_file,
    is_stacked,
)
from posttrain.models.spec import ModelConfig, Spec, read_json
from posttrain.models.transformer import Compute, abstract_model, compute_of, random_model

_NO_IDS = range(0)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")  # buffers that old Llama files carry


@dataclass(frozen=True)
class Model:
    """A model in memory: nnx.merge(graph, state) is the Transformer."""

    spec: Spec
    graph: nnx.GraphDef
    state: nnx.State


def local_folder(path: str) -> Path:
    """The folder of a model: `path` itself, or a download where it is a hub id (owner/name).

    Raises ValueError where it is neither, or where the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"model path {path!r}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as e:
        raise ValueError(
            f"model path {path!r}: no such folder here, and the hub did not give it: "
            f"{type(e).__name__}: {e}"
        ) from e


class Tensors:
    """The tensors of a folder's *.safetensors, by name; reads slices, holds files open."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(read_json(index).get("weight_map", {}).values())
            files = [folder / Path(name).name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
            hint = (
                f"{pickles[0]} is a pickle, which can run code when it is read: save the model "
                "with safe_serialization=True first"
                if pickles
                else "for a random model from config.json alone set model.random_init=true"
            )
            raise ValueError(f"{folder}: no *.safetensors; {hint}")
        self._where: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index}: names {file.name}, which is not in the folder")
            opened = safe_open(file, framework="np")
            for name in opened.keys():  # noqa: SIM118 - not a dict
                self._where[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it (F32, BF16, ...)."""
        return self._where[name].get_slice(name).get_dtype()

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A part of one tensor."""
        return self._where[name].get_slice(name)[slices]


def check_tensors(tensors: Tensors, paths: dict[str, tuple[int, ...]], spec: Spec) -> None:
    """ValueError listing every tensor that is missing, not expected, mis-shaped or no float.

    paths: parameter -> its stacked shape here.
    """
    wrong, expected, vocab = [], set(), json.loads(spec.config_json).get("vocab_size")
    for path, shape in paths.items():
        shape = shape[1:] if is_stacked(path) else shape
        want = file_shape(KEYS[path], shape, vocab)
        for _, name in file_names(path, spec):
            expected.add(name)
            if name not in tensors:
                wrong.append(f"missing: {name} {list(want)}")
            elif tensors.shape(name) != want:
                found = list(tensors.shape(name))
                wrong.append(f"wrong shape: {name} is {found}, config.json says {list(want)}")
            elif tensors.dtype(name) not in _FLOATS:
                wrong.append(f"wrong dtype: {name} is {tensors.dtype(name)}, not a float")
    for name in sorted(tensors.names() - expected):
        if not _IGNORED.match(name) and not (spec.tied and name == KEYS["head"].name):
            wrong.append(f"unexpected: {name} {list(tensors.shape(name))}")
    if wrong:
        raise ValueError(
            f"{tensors.folder}: {len(wrong)} tensors do not fit config.json:\n  "
            + "\n  ".join(wrong)
        )


def _reader(
    tensors: Tensors, key: Key, name: str, like: jax.ShapeDtypeStruct, new_ids: range, spec: Spec
) -> Callable[[Any], np.ndarray]:
    """Our array[index] from the file; rows the file has not, and new_ids, are made up here."""
    seen: dict[Any, np.ndarray] = {}  # replicated shards are read once

    def read(index: Any) -> np.ndarray:
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, like.shape, strict=True))
        if spans not in seen:
            index = tuple(slice(*span) for span in spans)
            seen[spans] = whole(index) if key.vocab_dim is None else rows(index)
        return seen[spans]

    def whole(index: Slices) -> np.ndarray:
        piece = tensors.read(name, file_slices(key, like.shape, index))
        shape = tuple(s.stop - s.start for s in index)
        return from_file(key, piece, shape).astype(like.dtype)

    def rows(index: Slices) -> np.ndarray:
        have = tensors.shape(name)[0]
        dim = key.vocab_dim
        assert dim is not None
        wanted = index[dim]
        ids = np.arange(wanted.start, wanted.stop)
        kept = slice(min(wanted.start, have), min(wanted.stop, have))
        table = np.zeros((len(ids), like.shape[1 - dim]), np.float32)[:, index[1 - dim]]
        part = tensors.read(name, (kept, index[1 - dim]))
        table[: kept.stop - kept.start] = part
        new = ((ids >= have) & (ids < spec.vocab_size)) | np.isin(ids, np.array(new_ids))
        if new.any():
            old = slice(0, min([have, *new_ids]))
            table[new] = tensors.read(name, (old, index[1 - dim])).mean(0, dtype=np.float64)
        return (table.T if dim else table).astype(like.dtype)

    return read


def load(
    path: str | Path,
    spec: Spec,
    mesh: jax.sharding.Mesh,
    compute: Compute,
    *,
    new_ids: range = _NO_IDS,
) -> Model:
    """The weights of an HF folder, in compute.param_dtype, laid on the mesh.

    Vocabulary rows that the file has not (spec.vocab_size above config.json's) and `new_ids`
    (special tokens that took unused rows) start as the mean of the old rows; padding rows are 0.
    Raises ValueError listing all tensors that do not fit.
    """
    graph, abstract = abstract_model(spec, compute, mesh)
    flat = {"/".join(map(str, k)): v for k, v in nnx.to_flat_state(abstract)}
    tensors = Tensors(Path(path))
    check_tensors(tensors, {name: v.get_value().shape for name, v in flat.items()}, spec)

    def one(name: str, key: Key, like: jax.ShapeDtypeStruct) -> jax.Array:
        read = _reader(tensors, key, name, like, new_ids, spec)
        return jax.make_array_from_callback(like.shape, like.sharding, read)

    loaded = []
    for path_, param in flat.items():
        like, key = param.get_value(), KEYS[path_]
        if is_stacked(path_):
            array = _stack(like, lambda i, part, key=key: one(key.name.format(i), key, part))
        else:
            array = one(key.name, key, like)
        loaded.append((tuple(path_.split("/")), param.replace(array)))
    return Model(spec, graph, nnx.from_flat_state(loaded))


def _stack(
    like: jax.ShapeDtypeStruct, layer: Callable[[int, jax.ShapeDtypeStruct], jax.Array]
) -> jax.Array:
    """[L, ...] filled in place, one layer at a time."""
    assert isinstance(like.sharding, jax.sharding.NamedSharding)
    inner = jax.sharding.NamedSharding(
        like.sharding.mesh, jax.sharding.PartitionSpec(*like.sharding.spec[1:])
    )
    part = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=inner)
    stacked = jnp.zeros(like.shape, like.dtype, device=like.sharding)
    put = jax.jit(
        lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0),
        donate_argnums=0,
        out_shardings=like.sharding,
    )
    for i in range(like.shape[0]):
        stacked = put(stacked, layer(i, part), np.int32(i))
    return stacked


def open_model(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    tokenizer_size: int = 0,
    new_ids: range = _NO_IDS,
) -> Model:
    """The model a config names: its weights, or random ones (cfg.random_init).

    tokenizer_size: ids in use, added tokens counted; new_ids: those of the added tokens.
    """
    folder = local_folder(cfg.path)
    spec = read_spec(folder)
    spec = spec.with_vocab(max(spec.vocab_size, tokenizer_size), cfg.vocab_multiple)
    compute = compute_of(cfg)
    if cfg.random_init:
        graph, state = random_model(spec, compute, mesh, cfg.init_seed)
        return Model(spec, graph, state)
    return load(folder, spec, mesh, compute, new_ids=new_ids)
