"""Held-out sets: their loss, and answers written down beside what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from posttrain import metrics as reporting
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.pipeline import Reference
from posttrain.data.plan import Plan
from posttrain.train.config import EvalConfig
from posttrain.train.offline import OfflineSource
from posttrain.train.step import added
from posttrain.types import Example

Generate = Callable[[Any, list[list[int]]], list[list[int]]]
"""(params, prompts) -> the new tokens of each, stop token included where one was reached."""


@dataclass(frozen=True)
class HeldOut:
    """One set: its examples, its one-epoch plan in order, and the compiled evaluation."""

    name: str
    cache: Any
    plan: Plan
    step: Callable[..., reporting.Metrics]
    reference: Reference | None = None  # what it said of the set's examples, where it is cached
    whole: Callable[..., Any] | None = None  # of a loss that couples examples (train/step.py)

    def measure(self, params: Any, mesh: jax.sharding.Mesh, live: Any = None) -> dict[str, float]:
        """Means over the whole set: eval/<name>/{loss, entropy, ...}.

        live: the parameters of a live reference. What a loss couples is of the whole set, too, so
        that no figure depends on how it is cut into batches: a pass over the set of its own.
        """
        known = () if self.whole is None else (self._sum(self.whole, mesh, params, live),)
        total = self._sum(self.step, mesh, params, live, *known)
        total = jax.device_get({k: v for k, v in total.items() if k != "loss_by_source"})
        return {f"eval/{self.name}/{k}": v for k, v in reporting.flatten(total, []).items()}

    def _sum(
        self, made: Callable[..., Any], mesh: jax.sharding.Mesh, params: Any, *more: Any
    ) -> Any:
        """made(params, batch, *more), added over all batches."""
        source = OfflineSource(self.cache, self.plan, mesh, reference=self.reference)
        total = None
        try:
            for _ in range(self.plan.steps):
                found = made(params, source.next(), *more)
                total = found if total is None else added(total, found)
        finally:
            source.close()
        assert total is not None  # a set without examples was refused when it was prepared
        return total


def prompt_of(example: Example) -> list[int]:
    """The tokens before the first trained one: what the model is asked."""
    return example.tokens[: int((example.loss_weights > 0).argmax())].tolist()


def expected_of(example: Example) -> list[int]:
    """The first run of trained tokens: what it should say."""
    trained = example.loss_weights > 0
    first = int(trained.argmax())
    length = int((~trained[first:]).argmax()) if not trained[first:].all() else len(trained) - first
    return example.tokens[first : first + length].tolist()


def write_samples(
    path: Path, held_out: HeldOut, tokenizer: Tokenizer, cfg: EvalConfig, generate: Generate,
    params: Any,
) -> None:  # fmt: skip
    """Answers to the set's first prompts, as JSON lines: prompt, answer, expected.

    Of a pair, the chosen side is what is expected. All processes generate; process 0 writes.
    """
    ids = range(0, len(held_out.cache), held_out.plan.sides)[: cfg.samples]
    examples = [held_out.cache[i] for i in ids]
    examples = [e for e in examples if prompt_of(e)]  # plain text has nothing to ask
    if not examples:
        return
    answers = generate(params, [prompt_of(e) for e in examples])
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example, answer in zip(examples, answers, strict=True):
            line = {
                "set": held_out.name,
                "prompt": tokenizer.decode(prompt_of(example)),
                "answer": tokenizer.decode(answer),
                "expected": tokenizer.decode(expected_of(example)),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
