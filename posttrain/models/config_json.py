"""config.json -> Spec: what all families share, and the check that no field is passed over.

A field that would change the maths and that this decoder does not compute is an error naming the
field: reading on would give another model than the one whose weights are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.models.spec import LayerKind, Rope, Spec

# Fields of config.json that do not change what the decoder computes.
_HARMLESS = frozenset(
    re.findall(
        r"\w+",
        """
        architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id
        eos_token_id pad_token_id max_position_embeddings initializer_range pretraining_tp
        _name_or_path _commit_hash _attn_implementation auto_map cache_implementation
        _attn_implementation_autoset return_dict output_attentions output_hidden_states
        torchscript id2label label2id num_labels problem_type finetuning_task task_specific_params
        tokenizer_class prefix chunk_size_feed_forward unsloth_version unsloth_fixed do_sample
        temperature top_p top_k max_length min_length num_beams repetition_penalty length_penalty
        """,
    )
)
# Fields that change the maths: the values under which every family's decoder is the model.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "partial_rotary_factor": (1, None),
}


class Fields:
    """A config.json under checks: every field is either taken, harmless, or refused by name.

    defaults: what the family's fields are where config.json leaves them out (null says "none", and
    is no default). only: the values that this family's decoder computes, by field.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        only: Mapping[str, tuple[Any, ...]] | None = None,
    ):
        self.raw, self.where = raw, where
        self._values = {**(defaults or {}), **raw}
        self._only, self._taken = _ONLY | (dict(only) if only else {}), set[str]()

    def take(self, name: str, default: Any = ...) -> Any:
        """The field's value; `default` where it is absent or null. ValueError without either."""
        self._taken.add(name)
        value = self._values.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: field {name!r} is missing")
            return default
        return value

    def size(self, name: str, default: Any = ...) -> int:
        """A positive whole number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where}: {name} is {value!r}, expected a whole number >= 1")
        return value

    def size_or_none(self, name: str) -> int | None:
        """A positive whole number, or None where the field is absent or null."""
        return None if self.take(name, None) is None else self.size(name)

    def number(self, name: str) -> float | None:
        """A number above 0, or None where the field is absent or null."""
        value = self.take(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{self.where}: {name} is {value!r}, expected a number > 0")
        return float(value)

    def finish(self) -> None:
        """ValueError naming every field that was not understood, with its value."""
        bad = []
        for name, value in self.raw.items():
            if name in self._taken or name in _HARMLESS or value is None:
                continue
            if name not in self._only:
                bad.append(f"{name} = {json.dumps(value)[:80]}: unknown here")
            elif value not in self._only[name]:
                allowed = " or ".join(json.dumps(v) for v in self._only[name] if v is not None)
                said = f"only {allowed} is supported" if allowed else "it is not supported"
                bad.append(f"{name} = {json.dumps(value)[:80]}: {said}")
        if bad:
            raise ValueError(
                f"{self.where}: fields that may change what the model computes and that are not "
                "supported:\n  " + "\n  ".join(bad)
            )


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_rope(fields: Fields) -> Rope:
    """Rope from rope_parameters (transformers 5) or rope_theta + rope_scaling (4 and before)."""
    theta = fields.take("rope_theta", 10000.0)
    scaling = fields.take("rope_scaling", {})
    return rope_of(fields.take("rope_parameters", scaling), theta, fields.where)


def rope_of(raw: Mapping[str, Any], theta: float, where: str) -> Rope:
    """One set of RoPE's parameters; theta: where it does not say its own. ValueError by name."""
    raw = dict(raw)
    kind = raw.pop("rope_type", None) or raw.pop("type", None) or "default"
    raw.pop("type", None)
    theta = float(raw.pop("rope_theta", theta))
    if kind not in _ROPE_FIELDS:
        raise ValueError(
            f"{where}: RoPE type {kind!r} is not supported (there are: {', '.join(_ROPE_FIELDS)})"
        )
    if raw.get("partial_rotary_factor") == 1:
        del raw["partial_rotary_factor"]
    needed = _ROPE_FIELDS[kind]
    missing = [name for name in needed if raw.get(name) is None]
    unknown = [name for name in raw if name not in needed and raw[name] is not None]
    if missing or unknown:
        raise ValueError(
            f"{where}: RoPE of type {kind!r} needs {list(needed)}; "
            f"missing {missing}, not supported {unknown}"
        )
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(raw["factor"]))
    return Rope(
        theta=theta,
        kind="llama3",
        factor=float(raw["factor"]),
        low_freq_factor=float(raw["low_freq_factor"]),
        high_freq_factor=float(raw["high_freq_factor"]),
        original_max_positions=int(raw["original_max_position_embeddings"]),
    )


def read_pattern(
    fields: Fields, default: Sequence[str], *, sliding: LayerKind, full: LayerKind
) -> tuple[LayerKind, ...]:
    """The kind of each layer by `layer_types`; `default` where config.json does not give them.

    Raises ValueError on a type that is neither full_attention nor sliding_attention, on another
    number of types than layers, and on sliding layers without a window.
    """
    kinds = {"full_attention": full, "sliding_attention": sliding}
    types, layers = fields.take("layer_types", list(default)), fields.size("num_hidden_layers")
    if other := sorted({str(name) for name in types} - set(kinds)):
        raise ValueError(
            f"{fields.where}: layer_types has {', '.join(other)}: only {' and '.join(kinds)} are "
            "supported"
        )
    if len(types) != layers:
        raise ValueError(f"{fields.where}: layer_types names {len(types)} layers of {layers}")
    if sliding.window is None and "sliding_attention" in types:
        raise ValueError(
            f"{fields.where}: layer_types has sliding_attention, and no sliding_window is in use"
        )
    return tuple(kinds[name] for name in types)


def read_dense(
    fields: Fields, *, tensors: Mapping[str, str] | None = None, **switches: Any
) -> Spec:
    """The part of config.json that all families share; `switches` are the family's own of Spec.

    A switch given as a str is the name of the config.json field that holds it (default False).
    tensors: names that differ from Llama's (models/keys.py). Raises ValueError naming the field.
    """
    where = fields.where
    switches = {
        k: fields.take(v, False) if isinstance(v, str) and k.endswith("_bias") else v
        for k, v in switches.items()
    }
    embed, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if fields.take("head_dim", None) is None and embed % heads:
        raise ValueError(f"{where}: hidden_size {embed} is not a multiple of {heads} heads")
    head_dim = fields.size("head_dim", embed // heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: {heads} attention heads are no multiple of {kv_heads} KV heads")
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim {head_dim} is odd; RoPE turns pairs")
    if "pattern" not in switches:
        full = LayerKind()
        types = ["full_attention"] * fields.size("num_hidden_layers")
        switches["pattern"] = read_pattern(fields, types, sliding=full, full=full)[:1]
    if "rope" not in switches:
        switches["rope"] = read_rope(fields)
    vocab = fields.size("vocab_size")
    spec = Spec(
        family=str(fields.raw["model_type"]),
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
        tied=bool(fields.take("tie_word_embeddings", False)),
        init_std=float(fields.take("initializer_range", 0.02)),
        tensors=tuple((tensors or {}).items()),
        config_json=json.dumps(fields.raw),
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
