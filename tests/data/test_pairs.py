"""Pairs from rows to the cache: what is made of each shape, and what is said of the others."""

from __future__ import annotations

import pytest

from posttrain.data.config import SourceConfig
from posttrain.data.formats import find_format, get_format, preference
from posttrain.types import Conversation, Pair, Text

USER = {"role": "user", "content": "What is 2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be short."}
CALLED = {**GOOD, "weight": 0.0}


def convert(row, **config):
    cfg = SourceConfig(path="x.jsonl", **config)
    return get_format(find_format(row, cfg, "x.jsonl:1", pairs=True)).convert(row, cfg)


def pair(*prompt):
    return Pair(Conversation((*prompt, GOOD)), Conversation((*prompt, BAD)))


@pytest.mark.parametrize(
    ("row", "made"),
    [
        (
            {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
            Pair(Text("4", "2+2="), Text("5", "2+2=")),
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, pair(USER)),
        ({"prompt": [USER], "chosen": "4", "rejected": "5"}, pair(USER)),
        ({"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]}, pair(USER)),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair(USER)),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            pair(USER, CALLED, USER),
        ),
        ({"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair(USER)),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair(USER)),
        (
            {"system": "Be short.", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            pair(SYSTEM, USER),
        ),
    ],
)
def test_trl_shapes(row, made):
    assert find_format(row, SourceConfig(path="x"), "f:1", pairs=True) == "preference"
    assert preference.detect(row)
    assert convert(row) == made
