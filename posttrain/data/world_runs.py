"""What the stages of `posttrain demo` are trained on, and the configs that they are trained by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data import world as worlds
from posttrain.data.world_model import write_model_folder

DATA_PARALLEL = {"data": -1, "fsdp": 1}
MODEL = {"dtype": "float32", "remat": "none", "vocab_multiple": 1}


def stage_config(cfg: Any, name: str) -> dict[str, Any]:
    """The config of a stage's `posttrain sft`, `preference` or `rl`, as its YAML would be. cfg: the
    demo's; name: base, sft, dpo or rl."""
    if name == "rl":
        return _online(cfg)
    work = cfg.work_dir
    texts = {"path": str(work / "data/texts.jsonl"), "format": "text"}
    chats = {"path": str(work / "data/chats.jsonl"), "format": "messages"}
    pairs = {"path": str(work / "data/pairs.jsonl"), "format": "preference"}
    start: dict[str, Any]
    if name == "base":
        steps, lr, sources = cfg.base_steps, cfg.base_lr, {"prose": texts}
        start = {"path": str(work / "model"), "random_init": True, "init_seed": cfg.seed}
    elif name == "sft":
        steps, lr, sources = cfg.sft_steps, cfg.sft_lr, {"chats": chats}
        if cfg.replay:
            sources = {
                "chats": chats | {"weight": 1 - cfg.replay},
                "prose": texts | {"weight": cfg.replay},
            }
        start = {"path": str(work / "base/export")}
    else:
        steps, lr, sources = cfg.dpo_steps, cfg.dpo_lr, {"pairs": pairs}
        start = {"path": str(work / "sft/export")}
    stage: dict[str, Any] = {
        "job": "sft",
        "run_dir": str(work / name),
        "seed": cfg.seed,
        "model": start | MODEL,
        "data": {
            "sources": sources,
            "seq_len": cfg.seq_len,
            "too_long": "split",
            "cache_dir": str(work / "data/cache"),
            "workers": 0,
        },
        "batch": {"rows": cfg.rows},
        "optim": {"lr": lr, "warmup": min(50, steps // 4), "b2": 0.98},
        "train": {"steps": steps},
        "mesh": DATA_PARALLEL,
        "checkpoint": {"every": max(steps // 2, 1), "keep": 1},
        "log": {"every": max(steps // 5, 1)},
    }
    if name == "dpo":
        stage |= {
            "job": "preference",
            "batch": {"examples": cfg.dpo_pairs},
            "loss": {
                "type": "dpo",
                **{k: getattr(cfg, k) for k in ("beta", "label_smoothing", "nll_weight")},
            },
            "optim": stage["optim"] | {"b2": 0.999},
        }
        del stage["data"]["too_long"]
    return stage


def _online(cfg: Any) -> dict[str, Any]:
    """GRPO on sums: an answer earns 1 where its number is the result. The longest question has 18
    tokens."""
    return {
        "job": "rl",
        "preset": "grpo",
        "run_dir": str(cfg.work_dir / "rl"),
        "seed": cfg.seed,
        "model": {"path": str(cfg.work_dir / "dpo/export"), **MODEL},
        "task": {"type": "jsonl", "path": str(cfg.work_dir / "data/sums.jsonl")},
        "rewards": {"correct": {"type": "numeric"}},
        "sampling": {"max_new_tokens": min(cfg.max_new_tokens, cfg.seq_len - 20)},
        "round": {
            "prompts": cfg.rl_prompts,
            "answers": cfg.rl_answers,
            "seq_len": cfg.seq_len,
            "slots": 128,
            "micro_tokens": 64 * cfg.seq_len,
        },
        "loss": {"high": 0.28},
        "kl": {"coef": cfg.kl},
        "optim": {"lr": cfg.rl_lr},
        "train": {"steps": cfg.rl_steps},
        "eval": {"prompts": 0},
        "mesh": DATA_PARALLEL,
        "checkpoint": {"every": max(cfg.rl_steps // 2, 1), "keep": 1},
        "log": {"every": max(cfg.rl_steps // 5, 1)},
    }


def write_inputs(cfg: Any) -> worlds.World:
    """The world's texts, and the folder of the untrained model; what is there is kept."""
    world = worlds.make_world(cfg.seed)
    texts, chats, pairs, sums = (
        cfg.work_dir / f"data/{name}.jsonl" for name in ("texts", "chats", "pairs", "sums")
    )
    if not texts.exists():
        worlds.write_texts(texts, world, documents=cfg.documents)
    if not chats.exists():
        worlds.write_chats(chats, world, conversations=cfg.conversations)
    if not pairs.exists():
        worlds.write_pairs(pairs, world, pairs=cfg.dpo_steps * cfg.dpo_pairs)
    if not sums.exists():
        worlds.write_sums(sums, world, prompts=cfg.rl_steps * cfg.rl_prompts)
    if not (cfg.work_dir / "model/config.json").exists():
        write_model_folder(cfg.work_dir / "model", _all_text(texts, chats), config=_shape(cfg))
    return world


def _shape(cfg: Any) -> dict[str, Any]:
    return {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.hidden_size * 8 // 3 // 4 * 4,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2 * cfg.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "initializer_range": cfg.hidden_size**-0.5 / 4,
    }


def _all_text(texts: Path, chats: Path) -> Iterator[str]:
    for line in texts.open(encoding="utf-8"):
        yield json.loads(line)["text"]
    for line in chats.open(encoding="utf-8"):
        for message in json.loads(line)["messages"]:
            yield message["content"]
            yield message.get("reasoning_content", "")
