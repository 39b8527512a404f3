"""Greedy text of the engine against transformers' generate, token by token.

A token may differ where transformers' own two highest logits lie within TIE of each other: float32
sums in another order may turn them round. What follows such a token is another text and is not
compared; how often it happens is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from posttrain.models.hf import open_model
from posttrain.models.spec import ModelConfig
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Sampling, alike
from tests.models.tiny import mesh_of

pytestmark = pytest.mark.parity

TIE = 1e-4
CASES = {  # folder, prompts, tokens of each answer
    "stories260K": ("data/models/stories260K", 32, 200),
    "golden": ("golden/model", 8, 64),
}
ALONE = 2


class Case:
    """A model, its prompts, and what transformers makes of them."""

    def __init__(self, folder: Path, prompts: int, tokens: int):
        import torch
        from transformers import AutoModelForCausalLM

        self.folder, self.tokens = folder, tokens
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 100, prompts)
        self.prompts = [rng.integers(3, 500, size).tolist() for size in sizes]
        width = int(sizes.max())
        padded = [[0] * (width - len(p)) + p for p in self.prompts]
        real = [[0] * (width - len(p)) + [1] * len(p) for p in self.prompts]
        with torch.no_grad():
            whole = self.model.generate(
                torch.tensor(padded), attention_mask=torch.tensor(real), do_sample=False,
                max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        self.want = whole[:, width:].tolist()

    def engine(self, *shape: int, slots: int) -> Engine:
        opened = open_model(
            ModelConfig(path=str(self.folder), dtype="float32", remat="none"), mesh_of(*shape)
        )
        return Engine(nnx.merge(opened.graph, opened.state), slots=slots, length=300)

    def ties(self, found: list[list[int]]) -> int:
        """How many texts, of the first prompts, differ, each from a tie on."""
        import torch

        count = 0
        for prompt, ours, theirs in zip(self.prompts, found, self.want, strict=False):
            assert len(ours) == len(theirs) == self.tokens
            if ours == theirs:
                continue
            first = next(i for i in range(self.tokens) if ours[i] != theirs[i])
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + theirs[:first]])).logits[0, -1]
            high = logits.topk(2)
            assert high.values[0] - high.values[1] < TIE, (prompt, first)
            assert {ours[first], theirs[first]} == set(high.indices.tolist())
            count += 1
        return count


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, data_dir: Path) -> Case:
    folder, prompts, tokens = CASES[request.param]
    return Case(data_dir / folder, prompts, tokens)


def test_greedy_text_is_equal(case: Case) -> None:
    """In a full batch, in slots that are filled anew, alone, and on eight devices."""
    asked = alike(case.prompts, Sampling(max_new_tokens=case.tokens, temperature=0))
    engine = case.engine(1, 1, 1, slots=len(asked))
    batch = [c.tokens for (c,) in engine.generate(asked)]
    ties = case.ties(batch)
    print(f"{case.folder.name}: {ties} of {len(asked)} texts differ from a tie on")
    assert ties <= 2
    alone = [engine.generate([request])[0][0].tokens for request in asked[:ALONE]]
    assert alone == batch[:ALONE]
    spread = case.engine(2, 2, 2, slots=8).generate(asked[:8])
    assert case.ties([c.tokens for (c,) in spread]) <= 2
