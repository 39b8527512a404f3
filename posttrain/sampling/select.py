"""Which of the answers to one prompt are kept, and the rows of training data that they become.

Rows are conversations as `posttrain sft` reads them, or pairs as `posttrain preference` does.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain.config import Config, semantic
from posttrain.data.normal import normalise
from posttrain.data.rows import RowError
from posttrain.rewards.base import answer_text
from posttrain.sampling.estimates import final_answer
from posttrain.types import Message, Rollout

Rows = list[dict[str, Any]]
Answer = tuple[int, Rollout]
"""Which of the answers to its prompt it is, and it."""


@dataclass(frozen=True)
class Selected:
    """What a prompt gave: rows to write, and how many of its answers went where."""

    rows: Rows
    kept: int  # answers that are in a row
    dropped: Mapping[str, int]  # why -> answers; all others


class Selection(Config):
    """What all selections share: which answers come into question."""

    reader: ClassVar[str]
    """The command that reads the rows."""
    judged: ClassVar[bool] = True
    """Is an answer that no reward applies to left out? Else it comes last."""

    at_least: float | None = semantic(
        None, help="least reward of an answer to imitate; none = the best, whatever it is worth"
    )
    finished: bool = semantic(True, help="only answers that ended by themselves")
    max_overlap: float = semantic(
        1.0,
        ge=0,
        le=1,
        help="an answer that shares more than this part of its n-grams with a better one is "
        "dropped (of both together: Jaccard); 1: only the very same",
    )
    ngram: int = semantic(4, ge=1, help="words of an n-gram, for max_overlap")

    @abstractmethod
    def __call__(self, rollouts: Sequence[Rollout], provenance: Mapping[str, Any]) -> Selected:
        """The rows of all answers to one prompt, which have their rewards.

        provenance: what every row is to say of where it came from.
        """

    def finished_ones(self, rollouts: Sequence[Rollout], dropped: Counter[str]) -> list[Answer]:
        """Those that can be trained on. Counts the others by why."""
        found: list[Answer] = []
        for index, rollout in enumerate(rollouts):
            if self.finished and rollout.finish == "template":
                dropped["calls that the chat template cannot write"] += 1
            elif self.finished and rollout.finish != "stop":
                dropped["cut off"] += 1
            elif not _readable(rollout):
                dropped["no text that can be trained on"] += 1
            else:
                found.append((index, rollout))
        return found

    def best(self, answers: Sequence[Answer], dropped: Counter[str]) -> list[Answer]:
        """Those that differ, the highest reward first (of equals the earlier one)."""
        known = [a for a in answers if not (self.judged and math.isnan(a[1].reward))]
        if missing := len(answers) - len(known):
            dropped["no reward applies"] += missing
        different: list[Answer] = []
        seen: set[str] = set()
        grams: list[frozenset[tuple[str, ...]]] = []
        for index, rollout in sorted(known, key=_worst_last):
            text = _text(rollout)
            own = frozenset(ngrams(text, self.ngram)) if self.max_overlap < 1 else frozenset()
            if text in seen:
                dropped["duplicate"] += 1
            elif any(overlap(own, other) > self.max_overlap for other in grams):
                dropped["near-duplicate"] += 1
            else:
                seen.add(text)
                grams += [own] if self.max_overlap < 1 else []
                different.append((index, rollout))
        return different

    def conversations(
        self, answers: Sequence[Answer], most: int, dropped: Counter[str], **provenance: Any
    ) -> Selected:
        """The best of the answers as rows, at most so many."""
        least = -math.inf if self.at_least is None else self.at_least
        high = [answer for answer in answers if not answer[1].reward < least]
        if low := len(answers) - len(high):
            dropped["below at_least"] += low
        found = self.best(high, dropped)
        if rest := len(found[most:]):
            dropped["not among the best"] += rest
        rows = [
            {
                **_conversation(rollout),
                "reward": None if math.isnan(rollout.reward) else rollout.reward,
                "from": {**provenance, **_place(index, rollout)},
            }
            for index, rollout in found[:most]
        ]
        return Selected(rows, len(rows), dropped)


class SFTSelection(Selection):
    """The best answers, as conversations to imitate.

    most 1 is best-of-n (RAFT, Dong et al. 2023, arXiv:2304.06767); at_least 1 with `most` as large
    as n keeps every right answer (RFT, Yuan et al. 2023, arXiv:2308.01825; STaR).
    """

    reader = "sft"

    most: int = semantic(1, ge=1, help="answers kept of a prompt")

    def __call__(self, rollouts: Sequence[Rollout], provenance: Mapping[str, Any]) -> Selected:
        dropped: Counter[str] = Counter()
        found = self.finished_ones(rollouts, dropped)
        return self.conversations(found, self.most, dropped, **provenance)


class MajoritySelection(Selection):
    """The best of the answers that come to what most of them come to: no right answer is needed.

    Source: self-consistency (Wang et al. 2023, arXiv:2203.11171); what is kept may be imitated
    (Huang et al. 2023, arXiv:2210.11610). Of several with as many votes the one said first.
    """

    reader = "sft"
    judged = False

    most: int = semantic(1, ge=1, help="answers kept of a prompt")
    agreement: float = semantic(
        0.0, ge=0, le=1, help="least share of the answers that can be trained on that must agree"
    )

    def __call__(self, rollouts: Sequence[Rollout], provenance: Mapping[str, Any]) -> Selected:
        dropped: Counter[str] = Counter()
        found = self.finished_ones(rollouts, dropped)
        votes = [final_answer(answer_text(rollout)) for _, rollout in found]
        counted = Counter(votes).most_common(1)  # of equals the first
        vote, count = counted[0] if counted else ("", 0)
        if count < self.agreement * len(votes):
            dropped["too few agree"] += len(votes)
            return Selected([], 0, dropped)
        if outvoted := len(votes) - count:
            dropped["outvoted"] += outvoted
        agree = [answer for answer, own in zip(found, votes, strict=True) if own == vote]
        said = {"vote": vote, "votes": count, "of": len(votes)}
        return self.conversations(agree, self.most, dropped, **provenance, **said)


class PreferenceSelection(Selection):
    """Pairs: the best answer with the worst, the second best with the second worst, and so on, each
    answer once, as long as their rewards differ by more than `margin`."""

    reader = "preference"

    most: int = semantic(1, ge=1, help="pairs of a prompt")
    margin: float = semantic(0.0, ge=0, help="chosen's reward is higher than rejected's by more")

    def __call__(self, rollouts: Sequence[Rollout], provenance: Mapping[str, Any]) -> Selected:
        dropped: Counter[str] = Counter()
        found = self.best(self.finished_ones(rollouts, dropped), dropped)
        rows: Rows = []
        why = "in no pair: rewards too alike"
        for (i, chosen), (j, rejected) in zip(found, reversed(found), strict=True):
            if len(rows) == self.most:
                why = "beyond the pairs asked for"
                break
            if self.at_least is not None and chosen.reward < self.at_least:
                why = "in no pair: no better one reaches at_least"
                break
            if chosen.reward - rejected.reward <= self.margin:
                break
            sides = {"chosen": [*chosen.messages], "rejected": [*rejected.messages]}
            rewards = {"reward_chosen": chosen.reward, "reward_rejected": rejected.reward}
            places = {"chosen": _place(i, chosen), "rejected": _place(j, rejected)}
            shared = {"prompt": _asked(chosen), **_beside(chosen)}
            rows.append({**shared, **sides, **rewards, "from": {**provenance, **places}})
        if rest := len(found) - 2 * len(rows):
            dropped[why] = rest
        return Selected(rows, 2 * len(rows), dropped)


SELECTIONS: dict[str, type[Selection]] = {
    "sft": SFTSelection,
    "majority": MajoritySelection,
    "preference": PreferenceSelection,
}


def _worst_last(answer: Answer) -> tuple[float, int]:
    index, rollout = answer
    return (math.inf if math.isnan(rollout.reward) else -rollout.reward, index)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words; all of a shorter text is one."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


def overlap(a: frozenset[Any], b: frozenset[Any]) -> float:
    """Jaccard: what both have, as a part of what either has."""
    return len(a & b) / len(a | b) if a | b else 1.0


def _text(rollout: Rollout) -> str:
    """All that the model said, thoughts and calls too, for comparison."""
    said = []
    for message in rollout.messages:
        if message["role"] == "assistant":
            calls = [call["function"] for call in message.get("tool_calls", ())]
            said += [message.get("reasoning_content", ""), message["content"]]
            said += [json.dumps(call, sort_keys=True) for call in calls]
    return " ".join(" ".join(said).split())


def _asked(rollout: Rollout) -> list[Message]:
    """The prompt's messages; what the assistant said in them is not trained."""
    return [
        {**message, "weight": 0.0} if message["role"] == "assistant" else message
        for message in rollout.prompt.messages
    ]


def _beside(rollout: Rollout) -> dict[str, Any]:
    """The columns beside messages that belong to the prompt, where it has them."""
    tools, kwargs = rollout.prompt.tools, rollout.prompt.template_kwargs
    columns: dict[str, Any] = {"tools": [*tools]} if tools else {}
    return columns | ({"chat_template_kwargs": dict(kwargs)} if kwargs else {})


def _conversation(rollout: Rollout) -> dict[str, Any]:
    return {"messages": [*_asked(rollout), *rollout.messages], **_beside(rollout)}


def _readable(rollout: Rollout) -> bool:
    """Does training read the conversation? An answer may be empty, or hold control codes."""
    row = _conversation(rollout)
    try:
        normalise(row["messages"], tools=row.get("tools"))
    except RowError:
        return False
    return True


def _place(index: int, rollout: Rollout) -> dict[str, Any]:
    return {"index": index, "rewards": dict(rollout.rewards), "tokens": rollout.length}
