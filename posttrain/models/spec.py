"""What a model is: ModelConfig (what the user asks for) and Spec (the shapes config.json gives)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from posttrain.config import Config, runtime, semantic

RematName = Literal["none", "full", "attention", "dots", "dots_batch", "offload"]
AttentionName = Literal["auto", "reference", "chunked", "cudnn", "splash"]
DtypeName = Literal["float32", "bfloat16"]
HeadName = Literal["lm", "score", "value"]
Token = Annotated[str, Field(min_length=1)]


class ModelConfig(Config):
    """Which model, in which precision, and how its layers are computed."""

    path: str = semantic(help="Hugging Face model folder, or a hub id (owner/name) when online")
    random_init: bool = semantic(False, help="random weights from config.json alone")
    init_seed: int = semantic(0, help="seed of random_init")
    new_tokens: tuple[Token, ...] = semantic((), help="special tokens to add to the vocabulary")
    vocab_multiple: int = semantic(
        128, ge=1, help="vocabulary rows are padded to a multiple; the softmax never sees them"
    )
    param_dtype: DtypeName = semantic("float32", help="dtype of the weights that are trained")
    dtype: DtypeName = semantic("bfloat16", help="dtype of the matmuls and activations")
    remat: RematName = runtime(
        "full",
        help="kept for the backward pass: none = no matmul and no attention is computed again, "
        "full = layer inputs alone, attention = also its results, dots = also weight matmuls, "
        "dots_batch = every matmul, offload = layer inputs alone, in the host's memory",
    )
    attention: AttentionName = runtime(
        "auto", help="auto: splash on TPU and cudnn on GPU where they can, else chunked"
    )


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. kind "linear" divides positions by `factor`; "llama3" divides only the
    slow frequencies, with a ramp between `low_freq_factor` and `high_freq_factor`."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one model; all else is the Spec's."""

    window: int | None = None
    """The query at t sees the keys at s with t - s < window; None: all before it."""
    rope: Rope | None = None
    """None: the Spec's."""
    experts: int = 0
    """Of a mixture in the MLP's place; 0: an MLP."""


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, whose weights lie stacked under `layers/<name>`."""

    name: str
    kind: LayerKind
    layers: range
    """Their numbers in the model, ascending; the first is the stack's index 0."""


@dataclass(frozen=True)
class Spec:
    """The shapes and switches of one decoder, all families alike."""

    family: str
    vocab_size: int
    """Tokens that exist; the arrays have vocab_rows >= vocab_size rows."""
    vocab_rows: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int
    rms_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    """RMSNorm of q and k before RoPE: over each head, or over all heads together."""
    pre_norm: bool = True
    """Norms before attention and MLP."""
    post_norm: bool = False
    """Norms after attention and MLP, before their results are added to the residual."""
    norm_offset: float = 0.0
    """Added to the scale of every norm (Gemma: its weights are stored less 1)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    """What embedded tokens are multiplied by, rounded to the compute dtype."""
    attention_scale: float | None = None
    """What attention's scores are multiplied by; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores are cap * tanh(scores / cap), after their scale."""
    final_softcap: float | None = None
    """Likewise the logits."""
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    """The kinds of the layers, first to last, repeated to the model's depth."""
    experts_chosen: int = 0
    """How many experts of a mixture see each token."""
    experts_normalised: bool = False
    """Whether the probabilities that weigh them are over their sum."""
    expert_mlp: int = 0
    """Width of an expert."""
    tensors: tuple[tuple[str, str], ...] = ()
    """(parameter, tensor) where the file's name is not Llama's: see models/keys.py."""
    head: HeadName = "lm"
    """What reads the last layer: the vocabulary head, or one number's, which a reward model reads
    at the end of a text (score) and a critic at every token (value)."""
    init_std: float = 0.02
    images: bool = False
    """The folder also holds the part of a model that sees images, which is left out."""
    config_json: str = dataclasses.field(default="{}", repr=False, compare=False)
    """The config.json it was read from, whole: what an export starts from."""

    def with_vocab(self, vocab_size: int, multiple: int = 1) -> Spec:
        """The same model with `vocab_size` tokens, rows padded to a multiple of `multiple`."""
        rows = -(-vocab_size // multiple) * multiple
        return dataclasses.replace(self, vocab_size=vocab_size, vocab_rows=rows)

    @property
    def title(self) -> str:
        """For a line to the user: the family, and what of the folder is left out."""
        return self.family + self.images * " without the part that sees images"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    @property
    def groups(self) -> tuple[tuple[Stack, ...], ...]:
        """The layers as they are scanned: a group's stacks are one period of it, in order.

        Layers all alike are one group of one stack; five local layers and a global one, four
        times, and two local ones more, are a group of six stacks and a group of one.
        """
        return _groups(self.kinds)

    @property
    def stacks(self) -> dict[str, Stack]:
        """By name, in order."""
        return {stack.name: stack for group in self.groups for stack in group}

    @property
    def parameters(self) -> int:
        """Number of weights, padding rows left out."""
        d, h = self.embed, self.head_dim
        attention = d * h * (2 * self.heads + 2 * self.kv_heads)
        attention += self.qkv_bias * h * (self.heads + 2 * self.kv_heads) + self.out_bias * d
        if self.qk_norm:
            attention += h * (2 if self.qk_norm == "head" else self.heads + self.kv_heads)
        dense = 3 * d * self.mlp + self.mlp_bias * (2 * self.mlp + d)
        each = d + 3 * d * self.expert_mlp  # the router's column, and the expert
        mlps = sum(kind.experts * each if kind.experts else dense for kind in self.kinds)
        vocab = self.vocab_size * d * (1 if self.tied or self.head != "lm" else 2)
        vocab += d * (self.head != "lm")
        norms = 2 * d * (self.pre_norm + self.post_norm)
        return self.layers * (attention + norms) + mlps + vocab + d


@functools.cache
def _groups(kinds: Sequence[LayerKind]) -> tuple[tuple[Stack, ...], ...]:
    """From the front, each time the period that covers the most layers; the shortest of equals."""
    layers = len(kinds)
    groups: list[tuple[Stack, ...]] = []
    at = names = 0
    while at < layers:
        best = (1, 1)
        for period in range(1, layers - at + 1):
            repeats = 1
            while kinds[at : at + period] == kinds[at + repeats * period :][:period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        period, repeats = best
        end = at + period * repeats
        groups.append(
            tuple(
                Stack(str(names + i), kinds[at + i], range(at + i, end, period))
                for i in range(period)
            )
        )
        at, names = end, names + period
    return tuple(groups)
