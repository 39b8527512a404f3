"""Sampling as a process that is measured: `python -m tests.benchmarks.side_sampling OUT settings`.

settings is JSON: {"side": "ours" | "transformers" | "prefill", "model": folder, "batch": rows}.
Both sides answer the same requests, greedily, in float32: prompts of 8 to 64 tokens, each with a
length of its own for its answer, as if it ended after every token with the same chance (64 tokens
in the mean, 384 at the most). transformers takes `batch` of them at a time, in their order, and
generates until the longest is done; tokens after a row's own length do not count.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from tests.benchmarks.clock import Clock

BATCHES = 4
"""Requests are this many times the batch."""
ROUNDS = 2
"""All of them once to compile and warm up, then as often as this is more than one."""
PROMPT, GROUP = 512, 8


def requests(batch: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, how long each answer is to be)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 65, BATCHES * batch)
    prompts = [rng.integers(10, vocab, size).tolist() for size in sizes]
    return prompts, rng.geometric(1 / 64, len(prompts)).clip(4, 384).tolist()


def ours(clock: Clock, settings: dict[str, Any]) -> None:
    from posttrain.sampling.request import Request, Sampling

    engine = _engine(settings["model"], settings["batch"])
    prompts, lengths = requests(settings["batch"], engine.spec.vocab_size)
    asked = [
        Request(prompt, Sampling(max_new_tokens=length, temperature=0))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    for _ in range(ROUNDS):
        found = engine.generate(asked)
        clock.step(tokens=sum(len(c.tokens) for (c,) in found))


def prefill(clock: Clock, settings: dict[str, Any]) -> None:
    """One prompt with GROUP answers, and as many prompts with one each; answers of one token."""
    from posttrain.sampling.request import Request, Sampling

    engine = _engine(settings["model"], GROUP)
    rng, one = np.random.default_rng(0), Sampling(max_new_tokens=1)
    prompts = [rng.integers(10, 1000, PROMPT).tolist() for _ in range(GROUP)]
    for _ in range(6):
        engine.generate([Request(prompts[0], one, n=GROUP)])
        clock.mark("group")
        engine.generate([Request(prompt, one) for prompt in prompts])
        clock.mark("apart")
    clock.step()


def _engine(folder: str, slots: int) -> Any:
    from flax import nnx

    from posttrain.models.hf import open_model
    from posttrain.models.spec import ModelConfig
    from posttrain.sampling.engine import Engine
    from posttrain.sharding import MeshConfig, make_mesh

    cfg = ModelConfig(path=folder, dtype="float32", vocab_multiple=1)
    model = open_model(cfg, make_mesh(MeshConfig()))
    return Engine(nnx.merge(model.graph, model.state), slots=slots)


def transformers(clock: Clock, settings: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    batch = settings["batch"]
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    prompts, lengths = requests(batch, model.config.vocab_size)
    for _ in range(ROUNDS):
        for start in range(0, len(prompts), batch):
            rows = prompts[start : start + batch]
            width = max(map(len, rows))
            padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            longest = max(lengths[start : start + batch])
            with torch.no_grad():
                found = model.generate(
                    padded, attention_mask=real, max_new_tokens=longest, min_new_tokens=longest,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            assert found.shape == (len(rows), width + longest)
        clock.step(tokens=sum(lengths))


def main() -> int:
    out, settings = sys.argv[1], json.loads(sys.argv[2])
    clock = Clock()
    {"ours": ours, "transformers": transformers, "prefill": prefill}[settings["side"]](
        clock, settings
    )
    clock.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
