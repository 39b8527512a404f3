"""The golden DPO run made again in torch, in float64: how far float32 is off, TRL's and ours.

TRL subtracts a completion's log-probs after it has summed them in float32, and its rewards have
fewer digits for it; ours are subtracted token by token. And the token lists: what TRL takes for
prompt and completion is what we take for context and trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import config
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare
from posttrain.jobs import preference
from posttrain.types import Example
from tests.jobs.runs import Runner

pytestmark = pytest.mark.parity
STEPS, BATCH, BETA, LR = 5, 4, 0.1, 1e-4
NAMES = [
    *("grad_norm", "loss", "rewards/chosen", "rewards/rejected"),
    *("rewards/margins", "logps/chosen", "logps/rejected"),
]


@pytest.fixture(scope="module")
def examples(golden_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Chosen and rejected side of each pair in turn, as `posttrain preference` prepares them."""
    keys = [*golden_pairs, f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    cfg = config.load(preference.Config, [], keys)
    tokenizer = Tokenizer.load(Path(cfg.model.path))
    chat = ChatTemplate.load(Path(cfg.model.path), tokenizer, cfg.chat)
    cache = prepare(cfg.data, chat, kind="pairs", quiet=True)
    return cache.read(range(len(cache)))


def test_prompt_and_completion_are_trls_tokens(examples: list[Example], data_dir: Path) -> None:
    from transformers import AutoTokenizer

    golden = data_dir / "golden"
    theirs: Any = AutoTokenizer.from_pretrained(golden / "model")
    rows = [json.loads(x) for x in (golden / "prefs.jsonl").read_text().splitlines()]
    assert len(examples) == 2 * len(rows) == 80
    for p, row in enumerate(rows):
        for side, ours in zip(("chosen", "rejected"), examples[2 * p : 2 * p + 2], strict=True):
            templated = theirs.apply_chat_template
            prompt = templated(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole = templated(row["prompt"] + row[side], return_dict=False)
            assert whole[: len(prompt)] == prompt
            assert ours.tokens.tolist() == whole, (p, side)
            want = [0.0] * len(prompt) + [1.0] * (len(whole) - len(prompt))
            assert ours.loss_weights.tolist() == want, (p, side)


def in_float64(examples: list[Example], model: Path) -> np.ndarray:
    """[steps, NAMES] of the run in torch's float64, the paper's formula written out."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64) for _ in "pr"
    )
    adam = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0)

    def logps(model: Any, example: Example) -> Any:
        ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
        said = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        said = said.gather(1, ids[0, 1:, None])[:, 0]
        return said[torch.from_numpy(example.loss_weights[1:] > 0)].sum()

    found = []
    for step in range(STEPS):
        adam.zero_grad()
        of_pairs = []
        for p in range(step * BATCH, (step + 1) * BATCH):
            sides = examples[2 * p : 2 * p + 2]
            with torch.no_grad():
                said = [logps(reference, side) for side in sides]
            ours = [logps(policy, side) for side in sides]
            chosen, rejected = (BETA * (a - b) for a, b in zip(ours, said, strict=True))
            loss = -torch.nn.functional.logsigmoid(chosen - rejected)
            (loss / BATCH).backward()
            values = [loss, chosen, rejected, chosen - rejected, *ours]
            of_pairs.append([x.item() for x in values])
        grads = [p.grad for p in policy.parameters()]
        norm = float(np.sqrt(sum(float((g**2).sum()) for g in grads)))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        found.append([norm, *np.mean(of_pairs, 0)])
    return np.array(found)


def test_five_steps_against_float64(
    run_preference: Runner, examples: list[Example], data_dir: Path
) -> None:
    """Ours within 1e-4 relative of exact arithmetic, margins of the larger reward; golden too,
    but for what float32 sums leave of its rewards. All ten steps are held to TRL in
    tests/jobs/test_preference.py; rewards grow with the steps, and the first have fewest digits."""
    exact = dict(zip(NAMES, in_float64(examples, data_dir / "golden" / "model").T, strict=True))
    log = json.loads((data_dir / "golden" / "dpo_sigmoid_b4.json").read_text())["log_history"]
    run = run_preference(f"train.steps={STEPS}", devices=1)
    trl = {name: np.array([row[name] for row in log if "loss" in row][:STEPS]) for name in NAMES}
    ours = {name: np.array([line[name] for line in run.metrics]) for name in NAMES}
    rewards = np.maximum(np.abs(exact["rewards/chosen"]), np.abs(exact["rewards/rejected"]))
    for name in NAMES:
        scale = rewards if name == "rewards/margins" else np.abs(exact[name])
        first = int(name.startswith("rewards"))  # 0 exactly at the first step
        apart = [np.abs(x[name] - exact[name])[first:] for x in (ours, trl)]
        mine, golden = ((x / scale[first:]).max() for x in apart)
        print(f"{name}: ours {mine:.1e} ({apart[0].max():.1e} absolute), TRL's {golden:.1e}")
        assert mine < 1e-4, name
        assert golden < 3e-4, name
        if name.startswith("logps"):
            assert apart[0].max() < 1e-3
