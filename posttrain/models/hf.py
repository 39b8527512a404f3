"""Hugging Face folders in and out: safetensors straight into sharded arrays and back.

One tensor is in flight at a time, and of it a process reads only what its devices hold. Nothing
is unpickled: pytorch_model.bin is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posttrain.models import ARCHITECTURES, read_spec
from posttrain.models.folder import Planned, Tensors, TensorWriter, local_folder
from posttrain.models.keys import (
    KEYS,
    Key,
    Slices,
    file_names,
    file_shape,
    file_slices,
    from_file,
    is_stacked,
    to_file,
)
from posttrain.models.spec import DtypeName, ModelConfig, Spec
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
        if spec.tied and name == KEYS["head"].name:
            if not tensors.equal(name, KEYS["embedding"].name):
                wrong.append(
                    f"{name} differs from the embedding, though tie_word_embeddings is true"
                )
        elif not _IGNORED.match(name):
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
        if kept.start < kept.stop:
            table[: kept.stop - kept.start] = tensors.read(name, (kept, index[1 - dim]))
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


def save(
    folder: str | Path,
    spec: Spec,
    params: Any,
    tokenizer: Any = None,
    *,
    dtype: DtypeName = "float32",
    stop_ids: Sequence[int] = (),
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes an HF folder: config.json, safetensors, and what the tokenizer saves of itself.

    params: the model's state, or the nested dict of its arrays. Padding rows are left out; values
    are rounded to `dtype`. One tensor at a time is gathered: every process must call this, process
    0 writes. stop_ids go into generation_config.json as the tokens that end generation.
    shard_bytes: size limit of one file; the tensors of several are listed in an index.
    """
    folder, primary = Path(folder), jax.process_index() == 0
    if primary:
        folder.mkdir(parents=True, exist_ok=True)
    flat = dict(flat_params(params))
    to = jnp.dtype(dtype)
    order = [(path, i, name) for path in flat for i, name in file_names(path, spec)]
    order.sort(key=lambda item: (is_stacked(item[0]), item[1]))
    planned = []
    for path, _, name in order:
        shape = flat[path].shape[1:] if is_stacked(path) else flat[path].shape
        planned.append(Planned(name, file_shape(KEYS[path], shape, spec.vocab_size), to))
    writer = TensorWriter(folder, planned, shard_bytes) if primary else None
    for path, layer, name in order:
        array = _fetch(flat[path], layer if is_stacked(path) else None, to)
        if writer:
            writer.write(name, to_file(KEYS[path], array, spec.vocab_size))
    if writer:
        writer.finish()
        _write_configs(folder, spec, dtype, stop_ids)
        if tokenizer is not None:
            tokenizer.save(folder)


def flat_params(params: Any) -> Iterator[tuple[str, jax.Array]]:
    """("layers/attention/q", array) of a state or a nested dict of arrays."""
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    for path, array in jax.tree_util.tree_flatten_with_path(pure)[0]:
        yield "/".join(str(key.key) for key in path), array


@functools.cache
def _gatherer(everywhere: jax.sharding.NamedSharding, dtype: Any, stacked: bool) -> Any:
    def take(x: jax.Array, i: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) if stacked else x
        return x.astype(dtype)

    return jax.jit(take, out_shardings=everywhere)


def _fetch(array: jax.Array, layer: int | None, dtype: Any) -> np.ndarray:
    """One tensor, whole, on every host."""
    assert isinstance(array.sharding, jax.sharding.NamedSharding)
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    whole = _gatherer(everywhere, dtype, layer is not None)(array, np.int32(layer or 0))
    return np.asarray(whole.addressable_data(0))


def _write_configs(folder: Path, spec: Spec, dtype: str, stop_ids: Sequence[int]) -> None:
    raw = json.loads(spec.config_json)
    raw |= {"vocab_size": spec.vocab_size, "dtype": dtype}
    if "torch_dtype" in raw:
        raw["torch_dtype"] = dtype
    if not raw.get("architectures"):
        raw["architectures"] = [ARCHITECTURES[spec.family]]
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if stop_ids:
        ids = {k: raw[k] for k in ("bos_token_id", "pad_token_id") if raw.get(k) is not None}
        generation = {"eos_token_id": list(stop_ids), **ids}
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation, indent=2) + "\n")
