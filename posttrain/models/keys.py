"""Which safetensors tensor is which parameter, and how slices of one map to slices of the other.

Hugging Face keeps a matrix as [out, in] and one tensor a layer; we keep [in, out], heads apart,
layers of a kind stacked. Vocabulary tables may have more rows here (padding, new tokens).
A family whose tensors have other names than Llama's says so in Spec.tensors; parameters of one
layer that share a tensor's name are its rows, in the order of KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain.models.spec import Spec

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Key:
    """One parameter's place in an HF file. in_dims: how many leading dims of our (unstacked)
    array are the matrix's input; 0: the array is kept as it is. `{layer}` and `{expert}` in name
    are filled in: our array has a leading dim for each."""

    name: str
    in_dims: int = 0
    vocab_dim: int | None = None  # the dim of our array that counts vocabulary rows


_LAYER = "model.layers.{layer}."
# Of a layer's parameters the path leaves out the stack: `layers/attention/q`.
KEYS = {
    "embedding": Key("model.embed_tokens.weight", vocab_dim=0),
    "final_norm": Key("model.norm.weight"),
    "head": Key("lm_head.weight", in_dims=1, vocab_dim=1),
    "score": Key("score.weight", in_dims=1),
    "layers/attention_norm": Key(_LAYER + "input_layernorm.weight"),
    "layers/attention_post_norm": Key(_LAYER + "post_attention_layernorm.weight"),
    "layers/mlp_norm": Key(_LAYER + "post_attention_layernorm.weight"),
    "layers/mlp_post_norm": Key(_LAYER + "post_feedforward_layernorm.weight"),
    "layers/attention/q": Key(_LAYER + "self_attn.q_proj.weight", in_dims=1),
    "layers/attention/k": Key(_LAYER + "self_attn.k_proj.weight", in_dims=1),
    "layers/attention/v": Key(_LAYER + "self_attn.v_proj.weight", in_dims=1),
    "layers/attention/o": Key(_LAYER + "self_attn.o_proj.weight", in_dims=2),
    "layers/attention/q_bias": Key(_LAYER + "self_attn.q_proj.bias"),
    "layers/attention/k_bias": Key(_LAYER + "self_attn.k_proj.bias"),
    "layers/attention/v_bias": Key(_LAYER + "self_attn.v_proj.bias"),
    "layers/attention/o_bias": Key(_LAYER + "self_attn.o_proj.bias"),
    "layers/attention/q_norm": Key(_LAYER + "self_attn.q_norm.weight"),
    "layers/attention/k_norm": Key(_LAYER + "self_attn.k_norm.weight"),
    "layers/mlp/gate": Key(_LAYER + "mlp.gate_proj.weight", in_dims=1),
    "layers/mlp/up": Key(_LAYER + "mlp.up_proj.weight", in_dims=1),
    "layers/mlp/down": Key(_LAYER + "mlp.down_proj.weight", in_dims=1),
    "layers/mlp/gate_bias": Key(_LAYER + "mlp.gate_proj.bias"),
    "layers/mlp/up_bias": Key(_LAYER + "mlp.up_proj.bias"),
    "layers/mlp/down_bias": Key(_LAYER + "mlp.down_proj.bias"),
    "layers/moe/router": Key(_LAYER + "mlp.gate.weight", in_dims=1),
    "layers/moe/gate": Key(_LAYER + "mlp.experts.{expert}.gate_proj.weight", in_dims=1),
    "layers/moe/up": Key(_LAYER + "mlp.experts.{expert}.up_proj.weight", in_dims=1),
    "layers/moe/down": Key(_LAYER + "mlp.experts.{expert}.down_proj.weight", in_dims=1),
}


def is_stacked(path: str) -> bool:
    """Does this parameter hold one array a layer?"""
    return path.startswith("layers/")


def _common(path: str) -> str:
    """A path as KEYS has it: of "layers/0/attention/q" and every other stack's the same."""
    if not is_stacked(path):
        return path
    folder, _, name = path.split("/", 2)
    return f"{folder}/{name}"


def key_of(path: str, spec: Spec | None = None) -> Key:
    """Of a parameter's path; without a spec its name is Llama's."""
    path = _common(path)
    names = dict(spec.tensors) if spec else {}
    return replace(KEYS[path], name=names.get(path, KEYS[path].name))


def lead_dims(key: Key) -> int:
    """How many leading dims of our array number the tensors that it is made of."""
    return ("{layer}" in key.name) + ("{expert}" in key.name)


def file_names(path: str, spec: Spec) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into the leading dims, tensor's name) of all that a parameter is made of."""
    name = key_of(path, spec).name
    if not is_stacked(path):
        yield (), name
        return
    stack = spec.stacks[path.split("/")[1]]
    for i, layer in enumerate(stack.layers):
        if "{expert}" not in name:
            yield (i,), name.format(layer=layer)
            continue
        for expert in range(stack.kind.experts):
            yield (i, expert), name.format(layer=layer, expert=expert)


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its tensors: `rows` rows from `first` on, of `tensor`'s shape."""

    key: Key
    first: int
    rows: int
    tensor: tuple[int, ...]


def places(shapes: Mapping[str, Sequence[int]], spec: Spec, vocab: int) -> dict[str, Place]:
    """The place of each parameter; shapes: of our whole arrays. vocab: the file's tokens."""
    order = list(KEYS)
    sharing: dict[tuple[str, str], list[str]] = {}
    for path in sorted(shapes, key=lambda path: order.index(_common(path))):
        stack = path.split("/")[1] if is_stacked(path) else ""
        sharing.setdefault((stack, key_of(path, spec).name), []).append(path)
    found = {}
    for paths in sharing.values():
        keys = [key_of(path, spec) for path in paths]
        own = [
            file_shape(key, shapes[path][lead_dims(key) :], vocab)
            for key, path in zip(keys, paths, strict=True)
        ]
        tensor = (sum(shape[0] for shape in own), *own[0][1:])
        first = 0
        for path, key, shape in zip(paths, keys, own, strict=True):
            found[path] = Place(key, first, shape[0], tensor)
            first += shape[0]
    return found


def file_shape(key: Key, shape: Sequence[int], vocab: int) -> tuple[int, ...]:
    """The tensor's shape in the file, of our array's (unstacked) shape, with `vocab` rows."""
    shape = tuple(vocab if i == key.vocab_dim else n for i, n in enumerate(shape))
    if not key.in_dims:
        return shape if key.vocab_dim is not None else (math.prod(shape),)
    return math.prod(shape[key.in_dims :]), math.prod(shape[: key.in_dims])


def _flat(shape: Sequence[int], index: Slices) -> slice:
    """The slice of the flattened dims that `index` picks; only the first may be cut."""
    inner = math.prod(shape[1:])
    spans = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    assert spans[1:] == [(0, n) for n in shape[1:]], (shape, index)
    return slice(spans[0][0] * inner, spans[0][1] * inner)


def file_slices(place: Place, shape: Sequence[int], index: Slices) -> Slices:
    """Which part of the file's tensor holds our (unstacked) array[index]."""
    key = place.key
    if key.in_dims:
        n = key.in_dims
        rows, rest = _flat(shape[n:], index[n:]), (_flat(shape[:n], index[:n]),)
    elif key.vocab_dim is not None:
        rows, rest = index[0], index[1:]
    else:
        rows, rest = _flat(shape, index), ()
    return (slice(rows.start + place.first, rows.stop + place.first), *rest)


def from_file(key: Key, piece: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A file's piece in our layout, `shape` being that of our piece."""
    return (piece.T if key.in_dims else piece).reshape(shape)


def to_file(key: Key, array: np.ndarray) -> np.ndarray:
    """Our (unstacked) array, or whole rows of it, as the file has them."""
    shape = file_shape(key, array.shape, array.shape[key.vocab_dim or 0])
    return array.reshape(shape[::-1]).T if key.in_dims else array.reshape(shape)
