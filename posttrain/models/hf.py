"""Hugging Face folders in and out: safetensors straight into sharded arrays and back.

A block of a tensor is in flight at a time, and of it a process reads only what its devices hold.
Nothing is unpickled: pytorch_model.bin is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posttrain.config import ConfigError
from posttrain.models import ARCHITECTURES, classifier_of, nested, read_spec, stream
from posttrain.models.folder import Planned, Tensors, TensorWriter, local_folder
from posttrain.models.keys import (
    KEYS,
    Place,
    Slices,
    file_names,
    file_slices,
    from_file,
    is_stacked,
    lead_dims,
    places,
    to_file,
)
from posttrain.models.spec import DtypeName, HeadName, ModelConfig, Spec
from posttrain.models.transformer import Compute, abstract_model, compute_of, random_model

_NO_IDS = range(0)
Store = Callable[[str, nnx.Variable, jax.Array], Any]
"""(path, parameter, its values as they were read) -> what is kept of them."""
Leaf = Callable[[str, Any], jax.Array]
"""(path, value in memory) -> the array that is written."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")  # buffers that old Llama files carry


@dataclass(frozen=True)
class Model:
    """A model in memory: nnx.merge(graph, state) is the Transformer."""

    spec: Spec
    graph: nnx.GraphDef
    state: nnx.State
    new_head: bool = False  # the folder has no score head: it is random


def check_tensors(tensors: Tensors, placed: dict[str, Place], spec: Spec) -> None:
    """ValueError listing every tensor that is missing, not expected, mis-shaped or no float."""
    wrong = []
    expected = {
        name: place.tensor for path, place in placed.items() for _, name in file_names(path, spec)
    }
    for name, want in expected.items():
        if name not in tensors:
            wrong.append(f"missing: {name} {list(want)}")
        elif tensors.shape(name) != want:
            found = list(tensors.shape(name))
            wrong.append(f"wrong shape: {name} is {found}, config.json says {list(want)}")
        elif tensors.dtype(name) not in _FLOATS:
            wrong.append(f"wrong dtype: {name} is {tensors.dtype(name)}, not a float")
    for name in sorted(tensors.names() - expected.keys()):
        if spec.tied and name == KEYS["head"].name:
            if not tensors.equal(name, KEYS["embedding"].name):
                wrong.append(
                    f"{name} differs from the embedding, though tie_word_embeddings is true"
                )
        elif spec.head != "lm" and name == KEYS["head"].name:
            pass  # a language model that becomes a reward model or a critic
        elif not _IGNORED.match(name):
            wrong.append(f"unexpected: {name} {list(tensors.shape(name))}")
    if wrong:
        raise ValueError(
            f"{tensors.folder}: {len(wrong)} tensors do not fit config.json:\n  "
            + "\n  ".join(wrong)
        )


def _reader(
    tensors: Tensors,
    place: Place,
    names: dict[stream.Index, str],
    like: jax.ShapeDtypeStruct,
    new_ids: range,
    spec: Spec,
) -> stream.Read:
    """Our array's values from the file; rows the file has not, and new_ids, are made up here."""
    key, shape = place.key, like.shape[lead_dims(place.key) :]
    means: dict[Any, np.ndarray] = {}

    def read(lead: stream.Index, index: Slices) -> np.ndarray:
        if key.vocab_dim is not None:
            return rows(names[lead], index)
        piece = tensors.read(names[lead], file_slices(place, shape, index))
        return from_file(key, piece, [s.stop - s.start for s in index]).astype(like.dtype)

    def rows(name: str, index: Slices) -> np.ndarray:
        have = tensors.shape(name)[0]
        dim = key.vocab_dim
        assert dim is not None
        wanted, columns = index[dim], index[1 - dim]
        ids = np.arange(wanted.start, wanted.stop)
        kept = slice(min(wanted.start, have), min(wanted.stop, have))
        table = np.zeros((len(ids), columns.stop - columns.start), np.float32)
        if kept.start < kept.stop:
            table[: kept.stop - kept.start] = tensors.read(name, (kept, columns))
        new = ((ids >= have) & (ids < spec.vocab_size)) | np.isin(ids, np.array(new_ids))
        if new.any():
            span = (columns.start, columns.stop)
            if span not in means:
                means[span] = tensors.mean(name, min([have, *new_ids]), columns)
            table[new] = means[span]
        return (table.T if dim else table).astype(like.dtype)

    return read


def load(
    path: str | Path,
    spec: Spec,
    mesh: jax.sharding.Mesh,
    compute: Compute,
    *,
    new_ids: range = _NO_IDS,
    new_head_seed: int | None = None,
    store: Store | None = None,
) -> Model:
    """The weights of an HF folder, in compute.param_dtype, laid on the mesh.

    Vocabulary rows that the file has not (spec.vocab_size above config.json's) and `new_ids`
    (special tokens that took unused rows) start as the mean of the old rows; padding rows are 0.
    new_head_seed: the folder has no score head, which starts from normal values of this seed.
    store: what is kept of each parameter, asked before the next one is read.
    Raises ValueError listing all tensors that do not fit.
    """
    graph, abstract = abstract_model(spec, compute, mesh)
    flat = {"/".join(map(str, k)): v for k, v in nnx.to_flat_state(abstract)}
    tensors, raw = Tensors(Path(path), images=spec.images), json.loads(spec.config_json)
    shapes = {name: v.get_value().shape for name, v in flat.items()}
    placed = places(shapes, spec, raw["vocab_size"])
    new = {"score"} if new_head_seed is not None else set()
    check_tensors(tensors, {name: place for name, place in placed.items() if name not in new}, spec)
    loaded = []
    for name, param in flat.items():
        like, place = param.get_value(), placed[name]
        if name in new and new_head_seed is not None:
            array = _normal(like, spec.init_std, new_head_seed)
        else:
            read = _reader(tensors, place, dict(file_names(name, spec)), like, new_ids, spec)
            array = stream.fill(like, lead_dims(place.key), place.key.in_dims, read)
        kept = store(name, param, array) if store else array
        loaded.append((tuple(name.split("/")), param.replace(kept)))
    return Model(spec, graph, nnx.from_flat_state(loaded), bool(new))


def _normal(like: jax.ShapeDtypeStruct, std: float, seed: int) -> jax.Array:
    def make(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, like.shape, jnp.float32) * std).astype(like.dtype)

    return jax.jit(make, out_shardings=like.sharding)(jax.random.key(seed))


def open_model(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    tokenizer_size: int = 0,
    new_ids: range = _NO_IDS,
    head: HeadName | None = "lm",
    new_head: bool = False,
    store: Store | None = None,
) -> Model:
    """The model a config names: its weights, or random ones (cfg.random_init).

    tokenizer_size: ids in use, added tokens counted; new_ids: those of the added tokens.
    head: what the model must have; None: what the folder has. new_head: a language model that is
    to have a scalar head gets a random one (cfg.init_seed). ConfigError where it has another. A
    critic ("value") takes over a reward model's head.
    store: as `load` takes it; random weights are left as they are.
    """
    folder = local_folder(cfg.path)
    spec, made = spec_of(cfg, folder, tokenizer_size=tokenizer_size, head=head, new_head=new_head)
    compute = compute_of(cfg)
    if cfg.random_init:
        graph, state = random_model(spec, compute, mesh, cfg.init_seed)
        return Model(spec, graph, state, made)
    seed = cfg.init_seed if made else None
    return load(folder, spec, mesh, compute, new_ids=new_ids, new_head_seed=seed, store=store)


def spec_of(
    cfg: ModelConfig,
    folder: Path,
    *,
    tokenizer_size: int = 0,
    head: HeadName | None = "lm",
    new_head: bool = False,
) -> tuple[Spec, bool]:
    """(what open_model opens, whether it makes a random head): of config.json alone."""
    spec = read_spec(folder)
    if head == "value" and spec.head == "score":  # the same head, read at every token
        spec = dataclasses.replace(spec, head=head)
    made = head not in (None, spec.head)
    if made:
        spec = _with_scalar_head(spec, cfg.path, head, new_head)
    return spec.with_vocab(max(spec.vocab_size, tokenizer_size), cfg.vocab_multiple), made


def _with_scalar_head(spec: Spec, path: str, head: HeadName, new_head: bool) -> Spec:
    """The spec of a language model with one number's head in the vocabulary head's place."""
    if spec.head == "score":
        raise ConfigError(
            f"model path {path}: a reward model, which has a score head and no vocabulary head: "
            "name the language model that it was made of"
        )
    if classifier_of(spec.family) is None:
        raise ConfigError(
            f"model path {path}: transformers has no sequence classifier of {spec.family} models, "
            "as which a reward model or a critic is saved"
        )
    if not new_head:
        raise ConfigError(
            f"model path {path}: a language model, which has no score head: `posttrain "
            "reward_model` makes a reward model of it. If its files do hold score.weight, "
            f'config.json must say so: "architectures": ["{classifier_of(spec.family)}"]'
        )
    return dataclasses.replace(spec, head=head)


def save(
    folder: str | Path,
    spec: Spec,
    params: Any,
    tokenizer: Any = None,
    *,
    dtype: DtypeName = "float32",
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
    shard_bytes: int = 5 * 10**9,
    leaf: Leaf | None = None,
) -> None:
    """Writes an HF folder: config.json, safetensors, and what the tokenizer saves of itself.

    params: the model's state, or the nested dict of its arrays. Padding rows are left out; values
    are rounded to `dtype`. A block of a tensor at a time is gathered: every process must call this,
    process 0 writes. stop_ids go into generation_config.json as the tokens that end generation,
    pad_id into config.json as the token that pads (None: as it was).
    shard_bytes: size limit of one file; the tensors of several are listed in an index. leaf: makes
    the array of a parameter, of the shape it has in params, when its turn has come.
    """
    folder, primary = Path(folder), jax.process_index() == 0
    if primary:
        folder.mkdir(parents=True, exist_ok=True)
    flat, to = dict(flat_params(params)), jnp.dtype(dtype)
    placed = places({path: a.shape for path, a in flat.items()}, spec, spec.vocab_size)
    with contextlib.ExitStack() as stack:
        writer = None
        if primary:
            planned = _planned(placed, spec, to)
            writer = stack.enter_context(TensorWriter(folder, planned, shard_bytes))
        for path, value in flat.items():
            array = leaf(path, value) if leaf else value
            key, first = placed[path].key, placed[path].first
            lead, names = lead_dims(key), dict(file_names(path, spec))
            tail = array.shape[lead + key.in_dims + 1 :]
            inner = 1 if key.vocab_dim is not None else math.prod(tail)
            for index, start, block in stream.blocks(array, lead, key.in_dims, to):
                if key.vocab_dim is not None:  # padding rows stay here
                    kept = slice(0, max(spec.vocab_size - start, 0))
                    block = block[:, kept] if key.vocab_dim else block[kept]
                if writer and block.size:
                    writer.write(names[index], first + start * inner, to_file(key, block))
        if writer:
            writer.finish()
    if primary:
        _write_configs(folder, spec, dtype, stop_ids, pad_id)
        if tokenizer is not None:
            tokenizer.save(folder)


def _planned(placed: dict[str, Place], spec: Spec, dtype: Any) -> list[Planned]:
    """The tensors of an export, layer by layer."""
    found: dict[str, tuple[Any, Planned]] = {}
    for path, place in placed.items():
        for index, name in file_names(path, spec):
            layer = spec.stacks[path.split("/")[1]].layers[index[0]] if is_stacked(path) else -1
            found[name] = layer, Planned(name, place.tensor, dtype)
    return [tensor for _, tensor in sorted(found.values(), key=lambda item: item[0])]


def flat_params(params: Any) -> Iterator[tuple[str, jax.Array]]:
    """("layers/0/attention/q", array) of a state or a nested dict of arrays."""
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    yield from sorted(nested.flat(pure), key=lambda item: item[0])


def _write_configs(
    folder: Path, spec: Spec, dtype: str, stop_ids: Sequence[int], pad_id: int | None
) -> None:
    raw = json.loads(spec.config_json)
    raw |= {"vocab_size": spec.vocab_size, "dtype": dtype}
    if "torch_dtype" in raw:
        raw["torch_dtype"] = dtype
    if not raw.get("architectures"):
        raw["architectures"] = [ARCHITECTURES[spec.family]]
    if spec.head != "lm":
        raw["architectures"] = [classifier_of(spec.family)]
        labels = raw.get("id2label") or {}
        if len(labels) != 1:  # none, or those that old versions wrote into every config.json
            labels = {"0": "LABEL_0"}
        raw |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
        raw.pop("num_labels", None)
    if pad_id is not None:
        raw["pad_token_id"] = pad_id
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if stop_ids:
        ids = {k: raw[k] for k in ("bos_token_id", "pad_token_id") if raw.get(k) is not None}
        generation = {"eos_token_id": list(stop_ids), **ids}
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation, indent=2) + "\n")
