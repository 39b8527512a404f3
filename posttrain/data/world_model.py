"""The Hugging Face folder that `posttrain demo` starts from: tokenizer, template, model shape.

The tokenizer knows the words of the world (with and without the space before them), the numbers
0-99 and, for everything else in ASCII, single characters: a pre-tokenizer cuts text into words,
numbers and characters, and the longest known piece wins (WordPiece without a continuation mark).
Decoding is plain concatenation. Text outside ASCII becomes <unk>.

The chat template is ChatML-like with one token per role and one that ends every turn. A base text
ends with another token, <|text_end|>: the end of a turn is for the chat stage to learn.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, UNKNOWN, TEXT_END, TURN_END = "<|pad|>", "<unk>", "<|text_end|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SPECIAL = (PAD, UNKNOWN, TEXT_END, TURN_END, *ROLES.values(), THINK_OPEN, THINK_CLOSE)

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \t\n"
_PIECE = r" ?[A-Za-z]+|[0-9]{1,2}|[\s\S]"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}"
    "{%- if message.reasoning_content -%}"
    "{{- '<think>' + message.reasoning_content + '</think>' -}}"
    "{%- endif -%}"
    "{{- message.content + '<|end|>' -}}"
    "{%- endgeneration -%}"
    "{%- elif message.role in ('system', 'user') -%}"
    "{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('this template knows system, user and assistant, not ' + message.role) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Special tokens, the numbers 0-99, the characters of ASCII, then the words of `texts`."""
    words = Counter(piece for text in texts for piece in re.findall(_PIECE, text))
    known = [*SPECIAL, *(str(n) for n in range(100)), *CHARACTERS, *sorted(words)]
    return {piece: i for i, piece in enumerate(dict.fromkeys(known))}


def write_model_folder(folder: str | Path, texts: Iterable[str], *, config: dict[str, Any]) -> int:
    """tokenizer.json and its company and config.json, without weights; the vocabulary's size.

    Args:
      texts: what the words are taken from (everything that will be trained on).
      config: the model's shape in Hugging Face's names (hidden_size, num_hidden_layers, ...).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary(texts)
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab, unk_token=UNKNOWN, continuing_subword_prefix="", max_input_chars_per_word=1000
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = [vocab[TURN_END], vocab[TEXT_END]]
    named = {"eos_token": TEXT_END, "pad_token": PAD, "unk_token": UNKNOWN}
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            **named,
        },
    )
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(
        folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": vocab[PAD]}
    )
    _write_json(  # last: where it is, the folder is whole
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(vocab),
            "bos_token_id": None,
            "eos_token_id": vocab[TEXT_END],
            "pad_token_id": vocab[PAD],
            **config,
        },
    )
    return len(vocab)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
