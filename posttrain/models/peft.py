"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, out and in.

Of each layer our A [L, in.., R] is PEFT's lora_A [R, in], our B [L, R, out..] its lora_B [out, R].
Parameters that are trained whole beside the adapters are PEFT's `modules_to_save`, rows of new
tokens its `trainable_token_indices` (or rows of the table, where that is trained whole).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from posttrain.config import ConfigError
from posttrain.models import stream
from posttrain.models.config_json import read_json
from posttrain.models.folder import Tensors
from posttrain.models.keys import (
    KEYS,
    Place,
    file_names,
    file_slices,
    from_file,
    key_of,
    lead_dims,
    places,
    to_file,
)
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import Rule, flat, nested
from posttrain.models.quantized import is_quantized
from posttrain.models.spec import Spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DELTA = "trainable_tokens_delta"
_HEAD = _PREFIX + KEYS["head"].name
# Fields of adapter_config.json that change what an adapter computes: the values we compute.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    # others take the base model apart, or weights away from it
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def _base(path: str) -> tuple[str, str]:
    """(path of the weight, lora_A or lora_B) of an adapter's leaf."""
    base, _, side = path.rpartition("_lora_")
    return base, f"lora_{side.upper()}"


def _names(path: str, spec: Spec) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index in the stack, tensor name in PEFT's file) of an adapter's leaf."""
    base, side = _base(path)
    for i, name in file_names(base, spec):
        yield i, f"{_PREFIX}{name.removesuffix('.weight')}.{side}.weight"


def _rows_name(path: str) -> str:
    table = KEYS[path.removesuffix("_new")].name.removesuffix(".weight")
    return f"{_PREFIX}{table}.token_adapter.{_DELTA}"


def _is_a(path: str) -> bool:
    return path.endswith("_lora_a")


def unsaved(params: Any, spec: Spec, trained: Rule) -> list[str]:
    """The trained parameters that PEFT's format has no place for: biases, parts of tensors."""
    paths = [path for path, _ in flat(params)]
    bases = [path for path in paths if not is_adapter(path)]
    names = [name for path in bases for _, name in file_names(path, spec)]
    found = []
    for path in filter(trained, paths):
        if path.endswith("_new"):
            continue
        base = _base(path)[0] if is_adapter(path) else path
        own = [name for _, name in file_names(base, spec)]
        if not own[0].endswith(".weight") or names.count(own[0]) > 1:
            found.append(base)
    return sorted(set(found))


def save(
    folder: Path, spec: Spec, trained: Any, cfg: LoraConfig, *, base: str, new_ids: range,
    task: str = "CAUSAL_LM",
) -> None:  # fmt: skip
    """Writes what a run with adapters trained. Every process must call it; process 0 writes.

    trained: nested dict of the trained parameters. base: the model they belong to, as PEFT's
    base_model_name_or_path; where tokens were added, its embeddings are to be resized first.
    """
    leaves, rank = dict(flat(trained)), cfg.rank
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    own_rows = [path for path in leaves if path.endswith("_new") and path[:-4] not in leaves]
    for path, array in leaves.items():
        whole = stream.whole(array)
        if path in own_rows:
            tensors[_rows_name(path)] = whole
        elif path.endswith("_new"):
            continue
        elif is_adapter(path):
            for at, name in _names(path, spec):
                one = whole[at].reshape((-1, rank) if _is_a(path) else (rank, -1))
                tensors[name] = one.T
        else:
            for at, name in file_names(path, spec):
                key = key_of(path)
                one = to_file(key, whole[at])
                if key.vocab_dim is not None:
                    one = one[: spec.vocab_size].copy()
                    if (rows := leaves.get(f"{path}_new")) is not None:
                        one[new_ids.start : new_ids.stop] = stream.whole(rows)
                tensors[_PREFIX + name] = one
                modules.add(name.removesuffix(".weight"))  # in full: PEFT compares the ends
    tied = spec.tied and "embedding" in leaves
    if tied:  # PEFT keeps a copy for each name
        tensors[_HEAD] = tensors[_PREFIX + KEYS["embedding"].name]
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rows = {_rows_name(path).split(".")[-3]: list(new_ids) for path in own_rows}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "target_modules": _targets([p for p in leaves if _is_a(p)], spec),
        "modules_to_save": sorted(modules) or None,
        "trainable_token_indices": rows or None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _targets(paths: list[str], spec: Spec) -> list[str]:
    """Modules by their last name where all layers have an adapter there, else in full."""
    modules = [
        name.removesuffix(".weight")
        for path in paths
        for _, name in file_names(_base(path)[0], spec)
    ]
    last = [module.rpartition(".")[2] for module in modules]
    whole = {name for name in last if last.count(name) == spec.layers}
    return sorted({n if n in whole else m for m, n in zip(modules, last, strict=True)})


def _fields(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """adapter_config.json, and what in it is not computed here."""
    file = folder / CONFIG
    raw = read_json(file)
    wrong = [
        f"{file}: {name} is {json.dumps(raw[name])}: only {json.dumps(allowed[0])} is supported"
        for name, allowed in _ONLY.items()
        if name in raw and raw[name] not in allowed
    ]
    return raw, wrong


def is_scorer(folder: Path) -> bool:
    """Whether an adapter folder belongs to a sequence classifier."""
    return read_json(folder / CONFIG).get("task_type") == "SEQ_CLS"


def check_config(folder: Path, cfg: LoraConfig) -> None:
    """ConfigError where an adapter folder is none of ours, or not the one that `lora` describes."""
    raw, wrong = _fields(folder)
    for theirs, ours in {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}.items():
        found, asked = raw.get(theirs, False), getattr(cfg, ours)
        if found != asked:
            at = folder / CONFIG
            wrong.append(f"lora.{ours} is {asked}, {theirs} in {at} is {found}: set it so")
    if wrong:
        raise ConfigError("\n    ".join(wrong))


def read_config(folder: Path, paths: Sequence[str], spec: Spec) -> LoraConfig:
    """The section `lora` that describes an adapter folder. paths: of matrices that can have one.

    Raises ConfigError naming the fields that are not computed here.
    """
    raw, wrong = _fields(folder)
    if wrong:
        raise ConfigError("\n    ".join(wrong))
    tensors = Tensors(folder)
    targets = [p for p in paths if any(name in tensors for _, name in _names(p + "_lora_a", spec))]
    if not targets:
        raise ValueError(f"{folder / WEIGHTS}: no adapter of a matrix of this model")
    return LoraConfig(
        targets=tuple(targets),
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rslora=raw.get("use_rslora", False),
    )


def load(folder: Path, spec: Spec, params: Any, new_ids: range) -> tuple[dict[str, Any], list[str]]:
    """(params with a folder's values in them, the paths of those that it holds whole).

    Of params, a nested dict which may be abstract where there are adapters, shapes and shardings
    are taken. Raises ValueError listing every tensor that is missing, not expected or mis-shaped.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: no {WEIGHTS}; a PEFT adapter saved as pickle is not read")
    tensors, leaves = Tensors(folder), dict(flat(params))
    shapes = {path: leaf.shape for path, leaf in leaves.items() if not is_adapter(path)}
    placed = places(shapes, spec, spec.vocab_size)
    whole = [
        path
        for path in placed
        if any(_PREFIX + name in tensors for _, name in file_names(path, spec))
    ]
    wrong, expected = _unfit_rows(folder, leaves, new_ids), set()
    for path, leaf in leaves.items():
        if path in whole:
            names = [_PREFIX + name for _, name in file_names(path, spec)]
            want = placed[path].tensor
            if is_quantized(leaf):
                wrong.append(f"{names[0]}: trained whole, and lora.quantize keeps it in few bits")
        elif not is_adapter(path) or (path.endswith("_new") and path[:-4] in whole):
            continue
        elif path.endswith("_new"):
            names, want = [_rows_name(path)], leaf.shape
        else:
            names, want = [name for _, name in _names(path, spec)], _file_shape(path, leaf.shape)
        expected |= set(names)
        for name in names:
            if name not in tensors:
                wrong.append(f"missing: {name} {list(want)}")
            elif tensors.shape(name) != tuple(want):
                wrong.append(
                    f"wrong shape: {name} is {list(tensors.shape(name))}, not {list(want)}"
                )
    if spec.tied and "embedding" in whole:
        expected.add(_HEAD)
        if _HEAD not in tensors or not tensors.equal(_HEAD, _PREFIX + KEYS["embedding"].name):
            wrong.append(f"{_HEAD}: not the embedding, to which the head of this model is tied")
    wrong += [f"unexpected: {name}" for name in sorted(tensors.names() - expected)]
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS}: {len(wrong)} tensors do not fit the model and the section lora "
            "(targets, rank; of tokens that were added, model.new_tokens):\n  " + "\n  ".join(wrong)
        )

    def values(path: str, leaf: Any) -> np.ndarray:
        if path in whole:
            return _whole(tensors, path, leaf.shape, placed[path], spec)
        if not path.endswith("_new"):
            parts = [tensors.read(name, _ALL).T for _, name in _names(path, spec)]
            return np.stack(parts).reshape(leaf.shape)
        if path[:-4] not in whole:
            return tensors.read(_rows_name(path), _ALL)
        name = _PREFIX + key_of(path[:-4], spec).name
        return tensors.read(name, (slice(new_ids.start, new_ids.stop), slice(None)))

    def read(path: str, leaf: Any) -> Any:
        if path not in whole and not is_adapter(path):
            return leaf
        array = values(path, leaf).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return nested((path, read(path, leaf)) for path, leaf in leaves.items()), whole


_ALL = (slice(None), slice(None))


def _unfit_rows(folder: Path, leaves: dict[str, Any], new_ids: range) -> list[str]:
    """What is wrong with the ids of the tokens that have rows of their own."""
    found = read_json(folder / CONFIG).get("trainable_token_indices") or []
    groups = found.values() if isinstance(found, dict) else [found]
    if "embedding_new" in leaves and all(list(ids) == list(new_ids) for ids in groups):
        return []
    ids = sorted({i for group in groups for i in group})
    have = f"model.new_tokens are {list(new_ids)}" if new_ids else "there are no model.new_tokens"
    return [f"trainable_token_indices of {CONFIG} are {ids}, {have}"] if ids else []


def _whole(
    tensors: Tensors, path: str, shape: tuple[int, ...], place: Place, spec: Spec
) -> np.ndarray:
    """A parameter that was trained whole; vocabulary rows that the file has not are 0."""
    key, lead = place.key, lead_dims(place.key)
    array = np.zeros(shape, np.float32)
    for at, name in file_names(path, spec):
        own = list(shape[lead:])
        if key.vocab_dim is not None:
            own[key.vocab_dim] = spec.vocab_size
        index = tuple(slice(0, n) for n in own)
        piece = tensors.read(_PREFIX + name, file_slices(place, own, index))
        array[at][index] = from_file(key, piece, own)
    return array


def _file_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if _is_a(path):
        return shape[-1], int(np.prod(shape[1:-1]))
    return int(np.prod(shape[2:])), shape[1]
