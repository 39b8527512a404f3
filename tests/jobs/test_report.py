"""`posttrain report rollouts`: what is shown of answers, and that none of it is taken for code."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest

from posttrain import cli
from posttrain.report import rollouts as report
from posttrain.train.rollout_log import write_rollouts
from posttrain.types import Prompt, Rollout

NASTY = "</pre><script>alert(1)</script> [bold]not markup[/bold] \ud800 & <b> \x1b[2J"


def rollout(group: int, reward: float, text: str) -> Rollout:
    tokens = np.arange(5, dtype=np.int32)
    weights = np.array([0, 0, 1, 1, 1], np.float32)
    prompt = Prompt(f"sums/{group}", ({"role": "user", "content": f"Add {group}."},), answer="3")
    call = {"function": {"name": "calculator", "arguments": {"expression": "1+2"}}}
    said = {"role": "assistant", "content": text, "reasoning_content": "so", "tool_calls": [call]}
    return Rollout(
        prompt, (said,), text, "length" if reward == 0 else "stop", tokens, weights,
        -weights / 3, -weights / 2, group=group, calls=1,
        rewards={"correct": reward, "form": None}, reward=reward,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    def pieces(tokens: list[int]) -> str:
        return f"<{tokens[0]}>"

    groups = [rollout(0, 1.0, "easy"), rollout(0, 1.0, "easy too")]
    groups += [rollout(1, 1.0, NASTY), rollout(1, 0.0, "wrong")]
    advantages = [r.loss_weights * (r.reward - 0.5) for r in groups]
    write_rollouts(tmp_path / "rollouts" / "1.jsonl", groups[:2])
    write_rollouts(tmp_path / "rollouts" / "41.jsonl", groups, advantages, decode=pieces)
    write_rollouts(tmp_path / "rollouts" / "40.held_out.jsonl", groups[:2])
    return tmp_path


class Tags(html.parser.HTMLParser):
    """The tags of a page, and whether each is closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.opened: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.opened.append(tag)
        if tag in ("details", "div", "pre", "span", "b", "summary"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("details", "div", "pre", "span", "b", "summary"):
            assert self.stack.pop() == tag


def test_the_last_step_is_shown_and_all_are_on_the_page(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "rollouts", str(run), "sort=spread"]) == 0
    said = capsys.readouterr().out
    assert said.index("sums/1") < said.index("sums/0"), "the widest spread first"
    for part in ("step 41", "reward 1 (correct 1, form -)", "advantage -0.500", "[bold]not mark"):
        assert part in said, part
    assert "log-prob -0.333 a token" in said
    assert 'calculator(expression="1+2")' in said
    assert "\x1b" not in said, "an answer cannot clear the terminal"
    assert "ended by length" in said
    text = (run / "rollouts.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert not tags.stack
    assert "script" not in tags.opened
    assert text.count("<h2") == 2
    assert "&lt;/pre&gt;&lt;script&gt;" in text
    assert "&lt;2&gt;</span>" in text
    assert "&lt;1&gt;</span>" not in text, "of the prompt's tokens none is sampled"
    assert "log-prob -0.3333, plain -0.5000, advantage +0.5000" in text


def test_other_steps_and_held_out_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "rollouts", str(run), "groups=1", f"page={run / 'p.html'}"]) == 0
    page = (run / "p.html").read_text()
    assert page.count("sums/0") == 2, "of step 1 and of step 41"
    assert "sums/1" not in page
    assert "1 more groups" in page
    capsys.readouterr()
    keys = [f"page={run / 'p.html'}", "held_out=true"]
    assert cli.main(["report", "rollouts", str(run), *keys]) == 0
    assert "step 40" in capsys.readouterr().out
    assert "tokens</summary>" not in (run / "p.html").read_text()
    assert cli.main(["report", "rollouts", str(run), "step=7"]) == 2
    assert "answers are there of steps 1, 41" in capsys.readouterr().err


def test_what_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "rollouts", str(tmp_path)]) == 2
    assert "no answers in" in capsys.readouterr().err
    assert cli.main(["report", "rollouts", str(tmp_path), "held_out=true"]) == 2
    assert "writes those of evaluations (eval.prompts)" in capsys.readouterr().err
    assert cli.main(["report", "rollouts", "a", "b"]) == 2
    assert "'b' is neither" in capsys.readouterr().err
    file = tmp_path / "rollouts" / "3.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps({"group": 1}) + "\n")
    assert cli.main(["report", "rollouts", str(tmp_path)]) == 1
    assert "3.jsonl:1: no answer of `posttrain rl`" in capsys.readouterr().err


def test_groups_are_sorted_by_what_they_earned(run: Path) -> None:
    file = run / "rollouts" / "41.jsonl"
    means = {how: [g.mean for g in report.read(file, how)] for how in ("order", "best", "worst")}
    assert means == {"order": [1.0, 0.5], "best": [1.0, 0.5], "worst": [0.5, 1.0]}


def test_line_ends_of_other_kinds_in_an_answer_end_no_line(tmp_path: Path) -> None:
    said = "one\u2028two\u2029three\x85four\x0bfive\r\nsix"
    write_rollouts(tmp_path / "1.jsonl", [rollout(0, 1.0, said), rollout(0, 0.0, "no")])
    (group,) = report.read(tmp_path / "1.jsonl")
    assert [answer["text"] for answer in group.answers] == [said, "no"]
