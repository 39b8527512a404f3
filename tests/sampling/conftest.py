"""Templates with the small byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.chat.template import ChatTemplate
from posttrain.chat.templates import TEMPLATES
from tests.sampling.scripted import template


@pytest.fixture(scope="module")
def public(data_dir: Path) -> dict[str, str]:
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row["chat_template"] for row in rows} | TEMPLATES


@pytest.fixture(scope="module")
def chatml(data_dir: Path) -> ChatTemplate:
    return template(data_dir, TEMPLATES["chatml"])
