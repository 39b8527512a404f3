"""Which answers are kept, and that the rows are such as training reads."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from posttrain.config import Config, load, semantic, variant
from posttrain.data.config import SourceConfig
from posttrain.data.formats import messages, preference
from posttrain.sampling.select import (
    SELECTIONS,
    MajoritySelection,
    PreferenceSelection,
    Selected,
    Selection,
    SFTSelection,
    ngrams,
    overlap,
)
from posttrain.types import Rollout
from tests.chat.samples import say
from tests.rewards.rollouts import rollout

SOURCE = SourceConfig(path="-")


def answers(*said: tuple[str, float], **more: Any) -> list[Rollout]:
    made = [rollout(text, rewards={"correct": reward}) for text, reward in said]
    return [replace(r, reward=reward, **more) for r, (_, reward) in zip(made, said, strict=True)]


def texts(rows: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_the_best_answers_are_kept_of_equals_the_first():
    given = answers(("a", 0.5), ("b", 1), ("c", 1), ("d", 0))
    selected = SFTSelection(most=2)(given, {"prompt": "p", "seed": 3})
    assert texts(selected.rows) == ["b", "c"]
    assert (selected.kept, selected.dropped) == (2, {"not among the best": 2})
    assert selected.rows[1] == {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "c"}],
        "reward": 1,
        "from": {"prompt": "p", "seed": 3, "index": 2, "rewards": {"correct": 1}, "tokens": 1},
    }


def test_answers_below_the_threshold_are_dropped():
    given = answers(("a", 0.5), ("b", 1), ("c", 1), ("d", 0))
    selected = SFTSelection(most=9, at_least=0.5)(given, {})
    assert texts(selected.rows) == ["b", "c", "a"]
    assert selected.dropped == {"below at_least": 1}
    same = answers(("a", 0.5), ("a", 0.5), ("b", 1))
    assert SFTSelection(at_least=1)(same, {}).dropped == {"below at_least": 2}, "before duplicates"


def test_what_cannot_be_trained_on_is_dropped_and_why_is_said():
    given = [
        replace(answers(("a", 1))[0], finish="length"),
        answers(("b", float("nan")))[0],
        answers(("", 1))[0],
        answers(("\x00", 1))[0],
        answers(("<think>only thoughts", 1))[0],
        *answers(("e", 1), (" e ", 1)),
    ]
    selected = SFTSelection(most=9)(given, {})
    assert texts(selected.rows) == ["e"]
    assert selected.dropped == {
        "cut off": 1,
        "no reward applies": 1,
        "no text that can be trained on": 3,
        "duplicate": 1,
    }
    assert selected.kept + sum(selected.dropped.values()) == len(given)
    assert SFTSelection(most=9, finished=False)(given, {}).kept == 2


def test_near_duplicates_share_ngrams_with_a_better_answer():
    first = "one two three four five six seven eight"
    near = "one two three four five six seven nine"  # 4 of 6 runs of four are the same
    far = "one two three eight nine ten eleven twelve"
    given = answers((near, 0.9), (first, 1), (far, 0.8))
    assert overlap(frozenset(ngrams(first, 4)), frozenset(ngrams(near, 4))) == pytest.approx(4 / 6)
    selected = SFTSelection(most=9, max_overlap=0.6)(given, {})
    assert texts(selected.rows) == [first, far]
    assert selected.dropped == {"near-duplicate": 1}
    assert SFTSelection(most=9, max_overlap=0.7)(given, {}).kept == 3
    assert SFTSelection(most=9, max_overlap=0.0, ngram=1)(given, {}).kept == 1


def test_a_majority_needs_no_right_answer():
    said = ["\\boxed{7}", "it is 8", "the answer is 7.0", "7", "\\boxed{8}", "9", "7"]
    given = answers(*zip(said, [0.1, 0.9, 0.3, 0.2, 0.9, 0.9, 0.2], strict=True))
    selected = MajoritySelection(most=2)(given, {"prompt": "p"})
    assert texts(selected.rows) == ["the answer is 7.0", "7"]
    own = selected.rows[0]["from"]
    assert (own["vote"], own["votes"], own["of"], own["index"]) == ("7", 4, 7, 2)
    assert selected.dropped == {"outvoted": 3, "duplicate": 1, "not among the best": 1}
    assert MajoritySelection(agreement=0.6)(given, {}).dropped == {"too few agree": 7}
    assert MajoritySelection(agreement=0.5)(given, {}).kept == 1
    tied = answers(("it is 2", 0), ("it is 1", 1), ("it is 1", 1), ("it is 2", 0))
    assert texts(MajoritySelection()(tied, {}).rows) == ["it is 2"]
    unknown = answers(("it is 1", float("nan")), ("it is 2", 1), ("1", float("nan")))
    (row,) = MajoritySelection()(unknown, {}).rows
    assert (texts([row]), row["reward"]) == (["it is 1"], None)
    assert MajoritySelection()([], {}) == Selected([], 0, {})


def test_short_texts_are_one_ngram():
    assert ngrams("a b", 4) == [("a", "b")]
    assert overlap(frozenset(ngrams("a b", 4)), frozenset(ngrams("a c", 4))) == 0.0


def test_a_pair_is_the_best_with_the_worst():
    given = answers(("a", 0.5), ("b", 1), ("c", 0), ("d", 0.25), ("e", 0.75))
    selected = PreferenceSelection(most=9)(given, {"prompt": "p"})
    pairs = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in selected.rows]
    assert pairs == [("b", "c"), ("e", "d")]
    assert (selected.kept, selected.dropped) == (4, {"in no pair: rewards too alike": 1})
    assert selected.rows[0] == {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "reward_chosen": 1,
        "reward_rejected": 0,
        "from": {
            "prompt": "p",
            "chosen": {"index": 1, "rewards": {"correct": 1}, "tokens": 1},
            "rejected": {"index": 2, "rewards": {"correct": 0}, "tokens": 1},
        },
    }


@pytest.mark.parametrize(
    ("keys", "pairs", "why"),
    [
        ({}, 1, "beyond the pairs asked for"),
        ({"most": 2, "margin": 0.5}, 1, "in no pair: rewards too alike"),
        ({"most": 2, "margin": 1.0}, 0, "in no pair: rewards too alike"),
        ({"most": 2, "at_least": 0.8}, 1, "in no pair: no better one reaches at_least"),
    ],
)
def test_pairs_that_are_too_alike_are_none(keys, pairs, why):
    given = answers(("a", 0.5), ("b", 1), ("c", 0), ("d", 0.25), ("e", 0.75))
    selected = PreferenceSelection(**keys)(given, {})
    assert len(selected.rows) == pairs
    assert selected.dropped == {why: 5 - 2 * pairs}


def test_rows_are_read_by_the_commands_that_they_are_for():
    """A prompt of several turns with tools, an answer that thinks and calls: nothing is lost."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    asked = (say("system", "S"), say("user", "1?"), say("assistant", "1."), say("user", "2?"))
    turns = (
        say("assistant", "", reasoning_content="Hm", tool_calls=[call]),
        say("tool", "5", name="f", tool_call_id="call00000"),
        say("assistant", "Five."),
    )
    (good,) = answers(("x", 1), messages=turns)
    (bad,) = answers(("Six.", 0))
    own = {"messages": asked, "tools": (tool,), "template_kwargs": {"enable_thinking": True}}
    good, bad = (replace(r, prompt=replace(r.prompt, **own)) for r in (good, bad))

    (row,) = json.loads(json.dumps(SFTSelection()([bad, good], {}).rows))
    assert messages.detect(row)
    read = messages.FORMAT.convert(row, SOURCE)
    weightless = ({**asked[2], "weight": 0.0},)
    assert read.messages == (*asked[:2], *weightless, asked[3], *turns)
    assert read.tools == (tool,)
    assert read.template_kwargs == {"enable_thinking": True}

    (row,) = json.loads(json.dumps(PreferenceSelection()([bad, good], {}).rows))
    assert preference.detect(row)
    pair = preference.FORMAT.convert(row, SOURCE)
    assert pair.chosen.messages[4:] == turns
    assert pair.rejected.messages[4:] == (say("assistant", "Six."),)
    assert pair.chosen.tools == (tool,)
    assert pair.margin == 0.0, "the rewards' difference is no margin unless somebody says so"


def test_a_config_names_its_selection():
    from typing import Annotated

    class Job(Config):
        keep: Annotated[Selection, variant(SELECTIONS, "sft")] = semantic(help="what is kept")

    cfg = load(Job, [], ["keep.type=preference", "keep.margin=0.5"])
    assert isinstance(cfg.keep, PreferenceSelection)
    assert (cfg.keep.reader, SFTSelection.reader) == ("preference", "sft")
