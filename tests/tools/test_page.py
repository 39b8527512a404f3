"""docs/tools.md: its code runs, and shows what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from posttrain.chat.templates import TEMPLATES
from posttrain.tools import ToolsConfig, call_tool, open_tools
from tests.chat.samples import byte_tokenizer
from tests.sampling.scripted import Scripted

PAGE = (Path(__file__).parents[2] / "docs/tools.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.py").write_text(BLOCKS[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)


def test_a_function_of_ones_own(shop: None):
    tools = open_tools(ToolsConfig(use=("shop:price",)))
    assert call_tool(tools, "price", {"fruit": "quince", "unit": "dozen"}).text == "42.0"
    told = call_tool(tools, "price", {"fruit": "plum"}).text
    assert told == "error: the shop has no plum; it has quince, pear"
    assert "expected one of" in call_tool(tools, "price", {"fruit": "pear", "unit": "box"}).text


def test_which_tokens_are_trained(
    shop: None, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = byte_tokenizer(data_dir, ("<|im_end|>",), "<|im_end|>")
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"], encoding="utf-8")
    stop = tokenizer.token_id("<|im_end|>")
    call = '<tool_call>{"name": "price", "arguments": {"fruit": "quince"}}</tool_call>'
    said = iter([[*tokenizer.encode(text).ids, stop] for text in (call, "It costs 3.5.")])
    engine = Scripted(lambda request, which: next(said))
    exec(compile(BLOCKS[1], "tools.md", "exec"), {"model_path": tmp_path, "engine": engine})
    lines = capsys.readouterr().out.splitlines()
    text = {
        mark: "".join(eval(line[2:]) for line in lines if line[0] == mark) for mark in ("+", " ")
    }
    assert text["+"] == f"{call}<|im_end|>It costs 3.5.<|im_end|>"
    assert text[" "] == "\n<|im_start|>tool\n3.5<|im_end|>\n<|im_start|>assistant\n"


def test_the_page_names_what_there_is():
    fields = ToolsConfig.model_fields
    assert set(re.findall(r"^\| `tools\.(\w+)`", PAGE, re.MULTILINE)) == set(fields)
