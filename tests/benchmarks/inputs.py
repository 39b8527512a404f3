"""What both sides of a comparison open: one model folder, files of conversations, pairs, prompts.

The model: Llama, hidden 512, 8 layers, vocabulary of 32,000, random float32 weights. numpy writes
it as a Hugging Face folder, so that neither side had a hand in it. Its template ends with the
assistant's <|im_end|>: TRL trains DPO on whatever a template puts after it, we do not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
    "vocab_size": 32_000,
}
SEQ_LEN = 512
PROMPTS, LONGEST_PROMPT = 64, 192
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Inputs:
    """Paths."""

    model: Path
    conversations: Path
    pairs: Path
    prompts: Path


def write_inputs(folder: Path, data: Path) -> Inputs:
    """Made from the test data, once: gsm8k (all of it), LLaMA-Factory's pairs that fit a row, and
    gsm8k's first PROMPTS questions of at most LONGEST_PROMPT tokens, to be answered."""
    names = ("conversations.jsonl", "pairs.jsonl", "prompts.jsonl")
    inputs = Inputs(folder / "model", *(folder / name for name in names))
    if inputs.prompts.exists():  # the last that is written
        return inputs
    shutil.rmtree(folder, ignore_errors=True)
    _write_model(inputs.model, data / "golden/model")
    rows = map(json.loads, (data / "data/gsm8k/train.jsonl").read_text().splitlines())
    turns = [[_said("user", r["question"]), _said("assistant", r["answer"])] for r in rows]
    _write_lines(inputs.conversations, [{"messages": messages} for messages in turns])
    tokenizer = tokenizers.Tokenizer.from_file(str(inputs.model / "tokenizer.json"))
    rows = map(json.loads, (data / "data/llama_factory/dpo_en_demo.jsonl").read_text().splitlines())
    _write_lines(inputs.pairs, [pair for row in rows if (pair := _pair(row, tokenizer))])
    asked = [{"prompt": said[:1]} for said in turns if _asks(said, tokenizer) <= LONGEST_PROMPT]
    _write_lines(inputs.prompts, asked[:PROMPTS])
    return inputs


def _asks(turns: list[dict[str, str]], tokenizer: tokenizers.Tokenizer) -> int:
    """Tokens of the prompt, to the point where the answer begins."""
    text = f"<|im_start|>user\n{turns[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _pair(row: dict, tokenizer: tokenizers.Tokenizer) -> dict | None:
    """TRL's columns; none where a side is longer than a row, so that no side cuts anything."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    prompt = [_said(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]
    sides = [[_said("assistant", row[side]["value"])] for side in ("chosen", "rejected")]
    for side in sides:
        text = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt + side
        )
        if len(tokenizer.encode(text, add_special_tokens=False).ids) > SEQ_LEN:
            return None
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_model(folder: Path, golden: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(golden / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = json.loads((golden / "config.json").read_text()) | SHAPE
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(np.random.default_rng(0)), folder / "model.safetensors", {"format": "pt"})


def _weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """N(0, 0.02) matrices under Llama's names in transformers."""
    hidden, mlp, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    width = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    kv_width = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    weights = {"model.embed_tokens.weight": normal(vocab, hidden)}
    for i in range(SHAPE["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": normal(width, hidden),
            "self_attn.k_proj": normal(kv_width, hidden),
            "self_attn.v_proj": normal(kv_width, hidden),
            "self_attn.o_proj": normal(hidden, width),
            "mlp.gate_proj": normal(mlp, hidden),
            "mlp.up_proj": normal(mlp, hidden),
            "mlp.down_proj": normal(hidden, mlp),
            "input_layernorm": np.ones(hidden, np.float32),
            "post_attention_layernorm": np.ones(hidden, np.float32),
        }
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = normal(vocab, hidden)
    return weights
