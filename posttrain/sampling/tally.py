"""What is counted of the answers to each prompt, and what a run says of them all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards.base import answer_text
from posttrain.sampling.estimates import best_of, final_answer, majority, mean_and_error, pass_at
from posttrain.types import Rollout

Line = Mapping[str, Any]
"""What `counts` makes of one prompt: JSON."""


def counts(rollouts: Sequence[Rollout], right: str, at_least: float) -> dict[str, Any]:
    """Of the scored answers to one prompt: rewards, which are right, maj@n and best@n, lengths.

    right: the part of the rewards that says so, by a value of at_least or more. Where there is none
    ("") or it applies to none of the answers, the prompt counts for no pass@k.
    """
    parts = {name: [r.rewards.get(name) for r in rollouts] for name in rollouts[0].rewards}
    line: dict[str, Any] = {
        "prompt": rollouts[0].prompt.id,
        "reward": [None if math.isnan(r.reward) else r.reward for r in rollouts],
        "rewards": parts,
        "tokens": [rollout.length for rollout in rollouts],
        "cut_off": sum(rollout.finish in ("length", "turns") for rollout in rollouts),
        "unwritable": sum(rollout.finish == "template" for rollout in rollouts),
    }
    verdicts = parts.get(right, [])
    if any(value is not None for value in verdicts):
        hits = [value is not None and value >= at_least for value in verdicts]
        votes = [final_answer(answer_text(rollout)) for rollout in rollouts]
        line |= {
            "right": hits,
            "majority": majority(votes, hits),
            "best": best_of([rollout.reward for rollout in rollouts], hits),
        }
    return line


def figures(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Name -> (mean over prompts, its standard error), of what there is of

    reward, rewards/<part> (the mean of a prompt's answers), pass@1, pass@2, pass@4 ... pass@n,
    maj@n, best@n.
    """
    values: dict[str, list[float]] = {}
    for line in lines:
        named = {"reward": line["reward"]}
        named |= {f"rewards/{name}": given for name, given in line["rewards"].items()}
        for name, given in named.items():
            known = [value for value in given if value is not None]
            if known:
                values.setdefault(name, []).append(sum(known) / len(known))
        if "right" not in line:
            continue
        n, right = len(line["right"]), sum(line["right"])
        for k in sorted({1 << i for i in range(n.bit_length())} | {n}):
            values.setdefault(f"pass@{k}", []).append(pass_at(k, n, right))
        if n > 1:
            values.setdefault(f"maj@{n}", []).append(line["majority"])
            values.setdefault(f"best@{n}", []).append(line["best"])
    return {name: mean_and_error(given) for name, given in values.items()}


def told(lines: Sequence[Line]) -> list[str]:
    """The figures as lines of a table, below what was answered."""
    answers = sum(len(line["tokens"]) for line in lines)
    tokens = sum(sum(line["tokens"]) for line in lines)
    cut_off = sum(line["cut_off"] for line in lines)
    out = [
        f"{len(lines):,} prompts, {answers:,} answers of {tokens / max(answers, 1):,.1f} tokens on "
        f"average, {cut_off:,} cut off"
    ]
    if unwritable := sum(line["unwritable"] for line in lines):
        out.append(f"  {unwritable:,} ended with calls that the chat template cannot write")
    table = figures(lines)
    width = max(map(len, table), default=0)
    for name, (mean, error) in table.items():
        spread = "" if math.isnan(error) else f" ± {error:.4f}"
        out.append(f"  {name:<{width}}  {mean:.4f}{spread}")
    return out + [
        f"  rewards/{name} applied to {count:,} of {answers:,} answers"
        for name in dict.fromkeys(name for line in lines for name in line["rewards"])
        if (count := _known(lines, name)) < answers
    ]


def _known(lines: Sequence[Line], name: str) -> int:
    """Answers that a part of the rewards applies to."""
    given = [value for line in lines for value in line["rewards"].get(name, ())]
    return sum(value is not None for value in given)


def kept(lines: Sequence[Line]) -> list[str]:
    """What became of the answers: how many are in rows, and why the others are not."""
    dropped: Counter[str] = Counter()
    for line in lines:
        dropped.update(line["dropped"])
    answers = sum(len(line["tokens"]) for line in lines)
    rows, without = sum(line["rows"] for line in lines), sum(not line["rows"] for line in lines)
    out = [
        f"{rows:,} rows of {sum(line['kept'] for line in lines):,} of {answers:,} answers; "
        f"{without:,} of {len(lines):,} prompts gave none"
    ]
    return out + [f"  {count:>8,} {why}" for why, count in dropped.most_common()]
