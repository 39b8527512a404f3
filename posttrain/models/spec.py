"""What a model is: ModelConfig (what the user asks for) and Spec (the shapes config.json gives).

A field of config.json that would change the maths and that this decoder does not compute is an
error naming the field: reading on would give another model than the one whose weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config import Config, runtime, semantic

RematName = Literal["none", "full", "dots", "dots_batch"]
AttentionName = Literal["auto", "reference", "chunked", "cudnn", "splash"]
DtypeName = Literal["float32", "bfloat16"]
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
        "full = layer inputs alone, dots = also weight matmuls, dots_batch = every matmul",
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
class Spec:
    """The shapes and switches of one dense decoder, all families alike."""

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
    qk_norm: bool = False
    init_std: float = 0.02
    config_json: str = dataclasses.field(default="{}", repr=False, compare=False)
    """The config.json it was read from, whole: what an export starts from."""

    def with_vocab(self, vocab_size: int, multiple: int = 1) -> Spec:
        """The same model with `vocab_size` tokens, rows padded to a multiple of `multiple`."""
        rows = -(-vocab_size // multiple) * multiple
        return dataclasses.replace(self, vocab_size=vocab_size, vocab_rows=rows)

    @property
    def parameters(self) -> int:
        """Number of weights, padding rows left out."""
        d, h = self.embed, self.head_dim
        attention = d * h * (2 * self.heads + 2 * self.kv_heads)
        attention += self.qkv_bias * h * (self.heads + 2 * self.kv_heads) + self.out_bias * d
        attention += self.qk_norm * 2 * h
        mlp = 3 * d * self.mlp + self.mlp_bias * (2 * self.mlp + d)
        vocab = self.vocab_size * d * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * d) + vocab + d


# Fields of config.json that do not change what the decoder computes.
_HARMLESS = frozenset(
    re.findall(
        r"\w+",
        """
        architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id
        eos_token_id pad_token_id max_position_embeddings initializer_range pretraining_tp
        max_window_layers sliding_window _name_or_path _commit_hash _attn_implementation
        _attn_implementation_autoset return_dict output_attentions output_hidden_states
        torchscript id2label label2id problem_type finetuning_task task_specific_params
        tokenizer_class prefix chunk_size_feed_forward unsloth_version unsloth_fixed do_sample
        temperature top_p top_k max_length min_length num_beams repetition_penalty length_penalty
        """,
    )
)
# Fields that change the maths: the values under which this decoder is the model.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "partial_rotary_factor": (1, None),
}


class Fields:
    """A config.json under checks: every field is either taken, harmless, or refused by name."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self._raw, self._where, self._taken = raw, where, set[str]()

    def take(self, name: str, default: Any = ...) -> Any:
        """The field's value; `default` where it is absent or null. ValueError without either."""
        self._taken.add(name)
        value = self._raw.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self._where}: field {name!r} is missing")
            return default
        return value

    def size(self, name: str, default: Any = ...) -> int:
        """A positive whole number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self._where}: {name} is {value!r}, expected a whole number >= 1")
        return value

    def finish(self) -> None:
        """ValueError naming every field that was not understood, with its value."""
        bad = []
        for name, value in self._raw.items():
            if name in self._taken or name in _HARMLESS or value is None:
                continue
            if name not in _ONLY:
                bad.append(f"{name} = {json.dumps(value)[:80]}: unknown here")
            elif value not in _ONLY[name]:
                allowed = " or ".join(json.dumps(v) for v in _ONLY[name] if v is not None)
                bad.append(f"{name} = {json.dumps(value)[:80]}: only {allowed} is supported")
        kinds = self._raw.get("layer_types") or ()
        if other := sorted(set(kinds) - {"full_attention"}):
            bad.append(f"layer_types has {', '.join(other)}: only full_attention is supported")
        if bad:
            raise ValueError(
                f"{self._where}: fields that may change what the model computes and that are not "
                "supported:\n  " + "\n  ".join(bad)
            )


def read_rope(fields: Fields, where: str) -> Rope:
    """Rope from rope_parameters (transformers 5) or rope_theta + rope_scaling (4 and before)."""
    theta = fields.take("rope_theta", 10000.0)
    scaling = fields.take("rope_scaling", {})
    raw = dict(fields.take("rope_parameters", scaling))
    kind = raw.pop("rope_type", None) or raw.pop("type", None) or "default"
    raw.pop("type", None)
    theta = raw.pop("rope_theta", theta)
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in names:
        raise ValueError(
            f"{where}: RoPE type {kind!r} is not supported (there are: {', '.join(names)})"
        )
    if raw.get("partial_rotary_factor") == 1:
        del raw["partial_rotary_factor"]
    missing = [name for name in names[kind] if raw.get(name) is None]
    unknown = [name for name in raw if name not in names[kind] and raw[name] is not None]
    if missing or unknown:
        raise ValueError(
            f"{where}: RoPE of type {kind!r} needs {list(names[kind])}; "
            f"missing {missing}, not supported {unknown}"
        )
    if kind == "default":
        return Rope(theta=float(theta))
    if kind == "linear":
        return Rope(theta=float(theta), kind="linear", factor=float(raw["factor"]))
    return Rope(
        theta=float(theta),
        kind="llama3",
        factor=float(raw["factor"]),
        low_freq_factor=float(raw["low_freq_factor"]),
        high_freq_factor=float(raw["high_freq_factor"]),
        original_max_positions=int(raw["original_max_position_embeddings"]),
    )


def read_dense(
    raw: Mapping[str, Any], where: str, *, kv_heads_default: int | None = None, **switches: Any
) -> Spec:
    """The part of config.json that all families share; `switches` are the family's own fields.

    A switch given as a str is the name of the config.json field that holds it (default False).
    Raises ValueError naming the field.
    """
    fields = Fields(raw, where)
    switches = {k: fields.take(v, False) if isinstance(v, str) else v for k, v in switches.items()}
    embed, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", kv_heads_default or heads)
    if fields.take("head_dim", None) is None and embed % heads:
        raise ValueError(f"{where}: hidden_size {embed} is not a multiple of {heads} heads")
    head_dim = fields.size("head_dim", embed // heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: {heads} attention heads are no multiple of {kv_heads} KV heads")
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim {head_dim} is odd; RoPE turns pairs")
    fields.take("layer_types", None)
    vocab = fields.size("vocab_size")
    spec = Spec(
        family=str(raw["model_type"]),
        vocab_size=vocab,
        vocab_rows=vocab,
        embed=embed,
        layers=fields.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=fields.size("intermediate_size"),
        max_positions=fields.size("max_position_embeddings", 2048),
        rms_eps=float(fields.take("rms_norm_eps", 1e-6)),
        rope=read_rope(fields, where),
        tied=bool(fields.take("tie_word_embeddings", False)),
        init_std=float(fields.take("initializer_range", 0.02)),
        config_json=json.dumps(raw),
        **switches,
    )
    fields.finish()
    return spec


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError with the path where it is not one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; a model folder has a config.json") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def suggest(name: str, known: Collection[str]) -> str:
    """'found NAME, there are: a, b' for error messages."""
    return f"{name!r} is not known (there are: {', '.join(sorted(known))})"
