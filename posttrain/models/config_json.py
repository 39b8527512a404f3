"""config.json -> Spec: what all families share, and the check that no field is passed over.

A field that would change the maths and that this decoder does not compute is an error naming the
field: reading on would give another model than the one whose weights are loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from posttrain.models.spec import LayerKind, Rope, Spec

# Fields of config.json that do not change what the decoder computes.
_HARMLESS = frozenset(
    re.findall(
        r"[\w.]+",
        """
    architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id unk_token_id max_position_embeddings initializer_range
    pretraining_tp _name_or_path _commit_hash _attn_implementation attn_implementation auto_map
    cache_implementation _attn_implementation_autoset return_dict output_attentions
    output_hidden_states torchscript id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix chunk_size_feed_forward unsloth_version
    unsloth_fixed is_llama_config transformers.js_config model_max_length max_sequence_length
    do_sample temperature top_p top_k max_length min_length num_beams num_beam_groups typical_p
    repetition_penalty length_penalty diversity_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values
    """,
    )
)
# Fields that change the maths: the values under which every family's decoder is the model.
_OFF = (False, None)
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "use_mrope": _OFF,
    "rope_interleaved": _OFF,
    "use_bidirectional_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "is_decoder": (True, False, None),
    "add_cross_attention": _OFF,
    "tie_encoder_decoder": _OFF,
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
}


class Fields:
    """A config.json under checks: every field is either taken, harmless, or refused by name.

    defaults: what the family's fields are where config.json leaves them out (null says "none", and
    is no default). only: the values that this family's decoder computes, by field.
    What is wrong is noted, with something that reading can go on with, until finish() tells it all.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        only: Mapping[str, tuple[Any, ...]] | None = None,
    ):
        self.raw, self.where, self.wrong = raw, where, list[str]()
        self._values = {**(defaults or {}), **raw}
        self._only, self._taken = _ONLY | (dict(only) if only else {}), set[str]()

    def take(self, name: str, default: Any) -> Any:
        """The field's value, of any type; `default` where it is absent or null."""
        self._taken.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def size(self, name: str, default: Any = None, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.take(name, default)
        if value is None:
            self.note(f"field {name!r} is missing")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.note(f"{name} is {_said(value)}, expected a whole number >= {least}")
        else:
            return value
        return least

    def size_or_none(self, name: str) -> int | None:
        """A positive whole number, or None where the field is absent or null."""
        return None if self.take(name, None) is None else self.size(name)

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number above 0; `default` where the field is absent or null."""
        value = self.take(name, default)
        if value is None or _is_positive(value):
            return None if value is None else float(value)
        self.note(f"{name} is {_said(value)}, expected a number > 0")
        return 1.0

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.note(f"{name} is {_said(value)}, expected true or false")
        return value is True

    def typed(self, name: str, kind: type[_T], default: _T) -> _T:
        """A list or an object."""
        value = self.take(name, default)
        if isinstance(value, kind):
            return value
        said = "a list" if kind is list else "an object"
        self.note(f"{name} is {_said(value)}, expected {said}")
        return default

    def note(self, text: str) -> None:
        """Something is wrong: finish() will say it."""
        if text not in self.wrong:
            self.wrong.append(text)

    def finish(self) -> None:
        """ValueError with all that is wrong and every field that was not understood."""
        for name, value in self.raw.items():
            if name in self._taken or name in _HARMLESS or value is None:
                continue
            if name not in self._only:
                self.note(f"{name} = {_said(value)}: unknown here")
            elif value not in self._only[name]:
                allowed = " or ".join(json.dumps(v) for v in self._only[name] if v is not None)
                said = f"only {allowed} is supported" if allowed else "it is not supported"
                self.note(f"{name} = {_said(value)}: {said}")
        if self.wrong:
            raise ValueError(
                f"{self.where}: fields that are wrong, or that may change what the model computes "
                "and are not supported:\n  " + "\n  ".join(self.wrong)
            )


_T = TypeVar("_T", list[Any], dict[str, Any])


def _said(value: Any) -> str:
    return json.dumps(value)[:80]


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


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
    theta = fields.number("rope_theta", 10000.0)
    scaling = fields.typed("rope_scaling", dict, {})
    return rope_of(fields, fields.typed("rope_parameters", dict, scaling), theta)


def rope_of(fields: Fields, raw: Any, theta: float | None) -> Rope:
    """One set of RoPE's parameters; theta: where it does not say its own."""
    if not isinstance(raw, dict):
        fields.note(f"RoPE's parameters are {_said(raw)}, expected an object")
        return Rope()
    raw = {"rope_theta": theta} | {k: v for k, v in raw.items() if v is not None}
    kind = str(raw.pop("rope_type", raw.get("type", "default")))
    if raw.pop("type", kind) != kind or kind not in _ROPE_FIELDS:
        fields.note(f"RoPE type {kind!r} is not supported (there are: {', '.join(_ROPE_FIELDS)})")
        return Rope()
    if raw.get("partial_rotary_factor") == 1:
        del raw["partial_rotary_factor"]
    needed = ("rope_theta", *_ROPE_FIELDS[kind])
    missing = [name for name in needed if name not in raw]
    unknown = [f"{name} = {_said(value)}" for name, value in raw.items() if name not in needed]
    if missing or unknown:
        fields.note(
            f"RoPE of type {kind!r} needs {list(needed[1:])}; missing {missing}, "
            f"not supported {unknown}"
        )
        return Rope()
    if bad := {name: raw[name] for name in needed if not _is_positive(raw[name])}:
        fields.note(f"RoPE of type {kind!r}: expected numbers > 0, found {_said(bad)}")
        return Rope()
    theta, *rest = (float(raw[name]) for name in needed)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", rest[0])
    factor, low, high, original = rest
    if low >= high:
        fields.note("RoPE of type 'llama3': low_freq_factor is not below high_freq_factor")
    return Rope(theta, "llama3", factor, low, high, int(original))


def read_pattern(
    fields: Fields, default: Sequence[str], *, sliding: LayerKind, full: LayerKind
) -> tuple[LayerKind, ...]:
    """The kind of each layer by `layer_types`; `default` where config.json does not give them.

    Wrong are a type that is neither full_attention nor sliding_attention, another number of types
    than layers, and sliding layers without a window.
    """
    kinds = {"full_attention": full, "sliding_attention": sliding}
    types = fields.typed("layer_types", list, list(default))
    layers = fields.size("num_hidden_layers")
    if other := sorted({str(name) for name in types} - set(kinds)):
        fields.note(f"layer_types has {', '.join(other)}: only {' and '.join(kinds)} are supported")
    if len(types) != layers:
        fields.note(f"layer_types names {len(types)} layers of {layers}")
    if sliding.window is None and "sliding_attention" in types:
        fields.note("layer_types has sliding_attention, and no sliding_window is in use")
    return tuple(kinds.get(str(name), full) for name in types)


def same_kind(fields: Fields, kind: LayerKind) -> tuple[LayerKind, ...]:
    """The pattern of layers that are all of one kind, which `layer_types` may say as well."""
    name = "full_attention" if kind.window is None else "sliding_attention"
    types = [name] * fields.size("num_hidden_layers")
    if fields.typed("layer_types", list, types) != types:
        fields.note(f"layer_types are not all {name}, as this model's layers are")
    return (kind,)


def read_dense(
    fields: Fields, *, tensors: Mapping[str, str] | None = None, **switches: Any
) -> Spec:
    """The part of config.json that all families share; `switches` are the family's own of Spec.

    A switch given as a str is the name of the config.json field that holds it (default False).
    tensors: names that differ from Llama's (models/keys.py). Raises ValueError with all that is
    wrong with the file.
    """
    switches = {
        k: fields.flag(v) if isinstance(v, str) and k.endswith("_bias") else v
        for k, v in switches.items()
    }
    embed, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    head_dim = fields.size("head_dim", max(embed // heads, 1))
    if not fields.wrong:
        if fields.take("head_dim", None) is None and embed % heads:
            fields.note(f"hidden_size {embed} is not a multiple of {heads} heads")
        if heads % kv_heads:
            fields.note(f"{heads} attention heads are no multiple of {kv_heads} KV heads")
        if head_dim % 2:
            fields.note(f"head_dim {head_dim} is odd; RoPE turns pairs")
    if "pattern" not in switches:
        switches["pattern"] = same_kind(fields, LayerKind())
    if "rope" not in switches:
        switches["rope"] = read_rope(fields)
    experts = min((kind.experts for kind in switches["pattern"] if kind.experts), default=0)
    if (chosen := switches.get("experts_chosen", 0)) > experts:
        fields.note(f"num_experts_per_tok is {chosen}, of {experts} experts")
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
        rms_eps=fields.number("rms_norm_eps", 1e-6) or 0,
        tied=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", 0.02) or 0,
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
