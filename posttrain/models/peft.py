"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, out and in.

Of each layer our A [L, in.., R] is PEFT's lora_A [R, in], our B [L, R, out..] its lora_B [out, R];
several parameters of one tensor share one adapter there (models/fused.py).
Parameters that are trained whole beside the adapters are PEFT's `modules_to_save`, rows of new
tokens its `trainable_token_indices` (or rows of the table, where that is trained whole).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from posttrain.config import ConfigError
from posttrain.models import fused, stream
from posttrain.models.config_json import read_json
from posttrain.models.folder import Tensors
from posttrain.models.fused import Group
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
from posttrain.models.peft_config import CONFIG, fields
from posttrain.models.quantized import is_quantized
from posttrain.models.spec import Spec

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DELTA = "trainable_tokens_delta"
_A, _B = "_lora_a", "_lora_b"
_HEAD = _PREFIX + KEYS["head"].name


def _open(folder: Path, spec: Spec) -> Tensors:
    return Tensors(folder, images=spec.images, at=_PREFIX)


def _there(name: str, spec: Spec) -> str:
    """A name as the base has it that PEFT wraps: in one that sees images, the text model lies
    deeper."""
    text = r"\1model.language_model."
    return re.sub(rf"^({re.escape(_PREFIX)})?model\.", text, name) if spec.images else name


def _names(module: str) -> tuple[str, str]:
    """The tensors of a module's adapter in PEFT's file: lora_A and lora_B."""
    at = _PREFIX + module.removesuffix(".weight")
    return f"{at}.lora_A.weight", f"{at}.lora_B.weight"


def _adapted(leaves: Iterable[str]) -> list[str]:
    """The parameters that have adapters among these."""
    return [path.removesuffix(_A) for path in leaves if path.endswith(_A)]


def _rows_name(path: str) -> str:
    table = KEYS[path.removesuffix("_new")].name.removesuffix(".weight")
    return f"{_PREFIX}{table}.token_adapter.{_DELTA}"


def _placed(leaves: Mapping[str, Any], spec: Spec) -> dict[str, Place]:
    """Where the base model's parameters lie in its files."""
    shapes = {path: leaf.shape for path, leaf in leaves.items() if not is_adapter(path)}
    return places(shapes, spec, spec.vocab_size)


def unsaved(params: Any, spec: Spec, trained: Rule) -> list[str]:
    """What is trained whole, and has no place in PEFT's format: biases, parts of tensors."""
    leaves = dict(flat(params))
    placed = _placed(leaves, spec)

    def lost(path: str) -> bool:
        part = placed[path].tensor[0] != placed[path].rows
        return part or not key_of(path, spec).name.endswith(".weight")

    return sorted(path for path in filter(trained, placed) if lost(path))


def save(
    folder: Path, spec: Spec, params: Any, trained: Rule, cfg: LoraConfig, *, base: str,
    new_ids: range, task: str = "CAUSAL_LM",
) -> None:  # fmt: skip
    """Writes what a run with adapters trained. Every process must call it; process 0 writes.

    params: nested dict of all parameters. base: the model they belong to, as PEFT's
    base_model_name_or_path; where tokens were added, its embeddings are to be resized first.
    """
    everything = dict(flat(params))
    leaves = {path: array for path, array in everything.items() if trained(path)}
    found = fused.groups(_adapted(leaves), _placed(everything, spec), spec)
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    own_rows = [path for path in leaves if path.endswith("_new") and path[:-4] not in leaves]
    for group in found:
        pairs = [[stream.whole(leaves[path + end]) for end in (_A, _B)] for path in group.paths]
        for at, name in file_names(group.paths[0], spec):
            a, b = group.join(
                [a[at].reshape(-1, cfg.rank).T for a, _ in pairs],
                [b[at].reshape(cfg.rank, -1).T for _, b in pairs],
            )
            tensors |= dict(zip(_names(name), (a, b), strict=True))
    for path, array in leaves.items():
        if path in own_rows:
            tensors[_rows_name(path)] = stream.whole(array)
        elif not is_adapter(path):
            whole = stream.whole(array)
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
    tensors = {_there(n, spec): np.ascontiguousarray(array) for n, array in tensors.items()}
    save_file(tensors, folder / f"{WEIGHTS}.partial", metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.partial").replace(folder / WEIGHTS)
    rows = {_rows_name(path).split(".")[-3]: list(new_ids) for path in own_rows}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "target_modules": _targets(found, spec),
        **fused.patterns(found, spec, cfg),
        "modules_to_save": sorted(_there(name, spec) for name in modules) or None,
        "trainable_token_indices": rows or None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _targets(found: Iterable[Group], spec: Spec) -> list[str]:
    """Modules by their last name where all layers have an adapter there, else in full; in full too
    where others, of images, have the same last names."""
    modules = [
        name.removesuffix(".weight")
        for group in found
        for _, name in file_names(group.paths[0], spec)
    ]
    last = [module.rpartition(".")[2] for module in modules]
    whole = {name for name in last if last.count(name) == spec.layers and not spec.images}
    return sorted(
        {n if n in whole else _there(m, spec) for m, n in zip(modules, last, strict=True)}
    )


def read_config(folder: Path, paths: Sequence[str], spec: Spec) -> LoraConfig:
    """The section `lora` that describes an adapter folder. paths: of matrices that can have one.

    Raises ConfigError naming the fields that are not computed here.
    """
    raw, wrong = fields(folder)
    if wrong:
        raise ConfigError("\n    ".join(wrong))
    tensors = _open(folder, spec)
    targets = [
        path
        for path in paths
        if any(_names(name)[0] in tensors for _, name in file_names(path, spec))
    ]
    if not targets:
        raise ValueError(f"{folder / WEIGHTS}: no adapter of a matrix of this model")
    return LoraConfig(
        targets=tuple(targets),
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rslora=raw.get("use_rslora", False),
    )


def load(
    folder: Path, spec: Spec, params: Any, cfg: LoraConfig, new_ids: range
) -> tuple[dict[str, Any], list[str]]:
    """(params with a folder's values in them, the paths of those that it holds whole).

    Of params, a nested dict which may be abstract where there are adapters, shapes and shardings
    are taken. Raises ValueError listing every tensor that is missing, not expected or mis-shaped.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: no {WEIGHTS}; a PEFT adapter saved as pickle is not read")
    tensors, leaves, raw = _open(folder, spec), dict(flat(params)), read_json(folder / CONFIG)
    placed = _placed(leaves, spec)
    found = fused.groups(_adapted(leaves), placed, spec)
    whole = [
        path
        for path in placed
        if any(_PREFIX + name in tensors for _, name in file_names(path, spec))
    ]
    own_rows = [path for path in leaves if path.endswith("_new") and path[:-4] not in whole]
    wrong, expected = _unfit_rows(raw, leaves, new_ids), set()
    joined = {name: raw.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if any(joined.values()) and joined != fused.patterns(found, spec, cfg):
        wrong.append(f"rank_pattern and alpha_pattern of {CONFIG}: ranks by matrix")

    def expect(name: str, want: tuple[int, ...]) -> None:
        expected.add(name)
        if name not in tensors:
            wrong.append(f"missing: {name} {list(want)}")
        elif tensors.shape(name) != tuple(want):
            wrong.append(f"wrong shape: {name} is {list(tensors.shape(name))}, not {list(want)}")

    for group in found:
        rank = cfg.rank * (len(group.paths) if joined["rank_pattern"] else 1)
        for _, name in file_names(group.paths[0], spec):
            a, b = _names(name)
            expect(a, (rank, placed[group.paths[0]].tensor[1]))
            expect(b, (group.rows, rank))
    for path in own_rows:
        expect(_rows_name(path), leaves[path].shape)
    for path in whole:
        if is_quantized(leaves[path]):
            wrong.append(f"{path}: trained whole, and lora.quantize keeps it in few bits")
        for _, name in file_names(path, spec):
            expect(_PREFIX + name, placed[path].tensor)
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
    values = {p: _whole(tensors, p, leaves[p].shape, placed[p], spec) for p in whole}
    for group in found:
        values |= _cut(tensors, group, spec, cfg.rank)
    for path in leaves:
        if path in own_rows:
            values[path] = tensors.read(_rows_name(path), _ALL)
        elif path.endswith("_new"):
            name = _PREFIX + key_of(path[:-4], spec).name
            values[path] = tensors.read(name, (slice(new_ids.start, new_ids.stop), slice(None)))

    def place(path: str, leaf: Any) -> Any:
        if path not in values:
            return leaf
        array = values.pop(path).reshape(leaf.shape).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return nested((path, place(path, leaf)) for path, leaf in leaves.items()), whole


def _cut(tensors: Tensors, group: Group, spec: Spec, rank: int) -> dict[str, np.ndarray]:
    """The adapters of a group's parameters, [L, in, R] and [L, R, out]."""
    layers = []
    for _, name in file_names(group.paths[0], spec):
        try:
            a, b = (tensors.read(side, _ALL) for side in _names(name))
            layers.append(group.cut(a, b, rank))
        except ValueError as error:
            raise ValueError(f"{tensors.folder / WEIGHTS}: {name}: {error}") from error
    found = {}
    for i, path in enumerate(group.paths):
        for side, end in enumerate((_A, _B)):
            found[path + end] = np.stack([layer[i][side].T for layer in layers])
    return found


_ALL = (slice(None), slice(None))


def _unfit_rows(raw: dict[str, Any], leaves: dict[str, Any], new_ids: range) -> list[str]:
    """What is wrong with the ids of the tokens that have rows of their own."""
    found = raw.get("trainable_token_indices") or []
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
