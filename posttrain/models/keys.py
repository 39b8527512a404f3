"""Which safetensors tensor is which parameter, and how slices of one map to slices of the other.

Hugging Face keeps a matrix as [out, in] and one tensor a layer; we keep [in, out], heads apart,
all layers stacked. Vocabulary tables may have more rows here (padding, new tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.models.spec import Spec

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Key:
    """One parameter's place in an HF file. `{}` in name is the layer. in_dims: how many leading
    dims of our (unstacked) array are the matrix's input; 0: the array is kept as it is."""

    name: str
    in_dims: int = 0
    vocab_dim: int | None = None  # the dim of our array that counts vocabulary rows


_LAYER = "model.layers.{}."
KEYS = {
    "embedding": Key("model.embed_tokens.weight", vocab_dim=0),
    "final_norm": Key("model.norm.weight"),
    "head": Key("lm_head.weight", in_dims=1, vocab_dim=1),
    "layers/attention_norm": Key(_LAYER + "input_layernorm.weight"),
    "layers/mlp_norm": Key(_LAYER + "post_attention_layernorm.weight"),
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
}


def is_stacked(path: str) -> bool:
    """Does this parameter hold one array a layer?"""
    return path.startswith("layers/")


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


def file_slices(key: Key, shape: Sequence[int], index: Slices) -> Slices:
    """Which part of the file's tensor holds our array[index]."""
    if key.in_dims:
        n = key.in_dims
        return _flat(shape[n:], index[n:]), _flat(shape[:n], index[:n])
    return index if key.vocab_dim is not None else (_flat(shape, index),)


def from_file(key: Key, piece: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A file's piece in our layout, `shape` being that of our piece."""
    return (piece.T if key.in_dims else piece).reshape(shape)


def to_file(key: Key, array: np.ndarray, vocab: int) -> np.ndarray:
    """Our (unstacked) array as the file's tensor, padding rows of the vocabulary dropped."""
    shape = file_shape(key, array.shape, array.shape[key.vocab_dim or 0])
    out = array.reshape(shape[::-1]).T if key.in_dims else array.reshape(shape)
    return out[:vocab] if key.vocab_dim is not None else out


def file_names(path: str, spec: Spec) -> Iterator[tuple[int, str]]:
    """(layer, tensor name) of a parameter; layer is 0 where it is not stacked."""
    for layer in range(spec.layers if is_stacked(path) else 1):
        yield layer, KEYS[path].name.format(layer)
