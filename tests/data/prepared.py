"""Small data for prepare, and what its cache must hold."""

from __future__ import annotations

import json

from posttrain.data.config import DataConfig
from posttrain.types import Conversation
from tests.data.fakes import FakeChat


def turn(i, answer=None):
    answer = f"answer {i} " + "x" * (i % 50) if answer is None else answer
    return {"q": f"question {i}", "a": answer}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, rows=None, **changes):
    """A config of one source `one`, made of these rows."""
    if rows is not None:
        changes["sources"] = {
            "one": {"path": write(tmp_path / "one.jsonl", rows), "fields": {"user": "q"}}
        }
        changes["sources"]["one"]["fields"]["assistant"] = "a"
    settings = {"cache_dir": str(tmp_path / "cache"), "workers": 0, "seq_len": 128, **changes}
    return DataConfig.model_validate(settings)


def expected(rows, chat=None):
    """The examples of turns, without prepare."""
    return [
        (chat or FakeChat()).examples(
            Conversation(
                ({"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]})
            )
        )[0]
        for r in rows
    ]


def assert_same(cache, wanted):
    assert len(cache) == len(wanted)
    for i, example in enumerate(wanted):
        got = cache[i]
        assert got.tokens.tolist() == example.tokens.tolist()
        assert got.loss_weights.tolist() == example.loss_weights.tolist()
