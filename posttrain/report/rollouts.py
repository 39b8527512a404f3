"""A run's answers, as train/rollout_log.py wrote them: read, and shown on a terminal or as a page.

The page is one file without scripts. What a model wrote is escaped everywhere.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.chat.transcript import transcript, visible
from posttrain.config import ConfigError

Sort = Literal["order", "best", "worst", "spread"]
Line = Mapping[str, Any]
_HELD_OUT = ".held_out"


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    answers: list[Line]

    @property
    def rewards(self) -> list[float]:
        return [a["reward"] for a in self.answers if a["reward"] is not None]

    @property
    def mean(self) -> float:
        """NaN where nothing could be scored."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan

    @property
    def spread(self) -> float:
        return max(self.rewards, default=0.0) - min(self.rewards, default=0.0)


def steps_of(run: Path, *, held_out: bool) -> dict[int, Path]:
    """The steps whose answers are there, ascending. ConfigError: there are none."""
    end = f"{_HELD_OUT}.jsonl" if held_out else ".jsonl"
    files = (run / "rollouts").glob(f"*{end}")
    found = {int(stem): f for f in files if (stem := f.name.removesuffix(end)).isdigit()}
    if not found:
        kind = "held-out answers" if held_out else "answers"
        raise ConfigError(
            f"run {run}: no {kind} in {run / 'rollouts'}: `posttrain rl` writes those of "
            + ("evaluations (eval.prompts)" if held_out else "every rollouts.every-th round")
        )
    return dict(sorted(found.items()))


def read(path: Path, sort: Sort = "order") -> list[Group]:
    """The groups of one file. ValueError, with the line, where it is none of ours."""
    groups: dict[Any, list[Line]] = {}
    # not splitlines(): what a model writes may hold other line ends, as U+2028
    lines = path.read_text(encoding="utf-8").removesuffix("\n")
    for number, text in enumerate(lines.split("\n") if lines else (), 1):
        try:
            line = json.loads(text)
            groups.setdefault(line["group"], []).append(line)
            assert {"prompt", "answer", "reward", "rewards", "finish"} <= line.keys()
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"{path}:{number}: no answer of `posttrain rl`: {error}") from error
    found = [Group(answers) for answers in groups.values()]
    if sort == "spread":
        return sorted(found, key=lambda group: -group.spread)
    if sort != "order":
        sign = -1 if sort == "best" else 1
        return sorted(found, key=lambda g: math.inf if math.isnan(g.mean) else sign * g.mean)
    return found


def figures(answer: Line) -> str:
    """One line: reward, its parts, advantage, length, how it ended."""
    reward = "no reward" if answer["reward"] is None else f"reward {answer['reward']:.4g}"
    parts = [
        f"{name} {'-' if value is None else format(value, '.4g')}"
        for name, value in answer["rewards"].items()
    ]
    more = [f"advantage {answer['advantage']:+.3f}"] if "advantage" in answer else []
    if answer.get("logps"):
        sampled = [x for x, is_ in zip(answer["logps"], answer["sampled"], strict=True) if is_]
        more.append(f"log-prob {sum(sampled) / max(len(sampled), 1):.3f} a token")
    if answer.get("calls"):
        more.append(f"{answer['calls']} calls, {answer.get('failed_calls', 0)} failed")
    end = "" if answer["finish"] == "stop" else f", ended by {answer['finish']}"
    return f"{reward} ({', '.join(parts)}), {', '.join([*more, ''])}{answer['length']} tokens{end}"


def said(message: Line) -> str:
    """What a message says, thinking and calls included."""
    parts = []
    if message.get("reasoning_content"):
        parts.append(f"<think>{message['reasoning_content']}</think>")
    if message.get("content"):
        parts.append(str(message["content"]))
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        arguments = json.dumps(function.get("arguments"), ensure_ascii=False, default=str)
        parts.append(f"-> {function.get('name')}({arguments})")
    return _written("\n".join(parts))


def _written(text: str) -> str:
    """What can be written as UTF-8: a lone surrogate, which a model may write, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def show(console: Any, step: int, groups: Sequence[Group], most: int) -> None:
    """The first `most` groups on a rich console; nothing of the text is taken for markup, nor can
    it steer the terminal."""
    from rich.console import Group as Stack
    from rich.panel import Panel
    from rich.text import Text

    for group in groups[:most]:
        first = group.answers[0]
        parts: list[Any] = [transcript(first["prompt"])]
        if first.get("expected") is not None:
            expected = json.dumps(first["expected"], ensure_ascii=False)
            parts.append(Text(visible(f"expected: {expected}\n"), "cyan"))
        for answer in group.answers:
            parts.append(Text(visible(figures(answer)), _style(answer, group)))
            parts.append(transcript((), answer["answer"]))
        title = f"step {step}, {first['prompt_id']}: mean reward {group.mean:.4g}"
        console.print(Panel(Stack(*parts), title=Text(visible(title)), title_align="left"))
    if len(groups) > most:
        console.print(f"{len(groups) - most} more groups: show=, sort=, or the page", markup=False)


def _style(answer: Line, group: Group) -> str:
    if answer["reward"] is None or not group.spread:
        return "bold yellow"
    return "bold green" if answer["reward"] > group.mean else "bold red"


_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:2.5rem}details{border:1px solid #ccc;border-radius:6px;margin:.6rem 0;
padding:.4rem .8rem}
summary{cursor:pointer}.a{border-left:5px solid #bbb;margin:.8rem 0;padding:.1rem .8rem}
.good{border-color:#2a9d4a}.bad{border-color:#d0433b}.f{color:#555;font-size:.9em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;font:13px/1.5 ui-monospace,monospace}
b.r{font-weight:600;color:#555}table{border-collapse:collapse}
td,th{padding:.15rem .7rem;text-align:right}
"""


def page(run: Path, steps: Mapping[int, Sequence[Group]], most: int) -> str:
    """One HTML page of the first `most` groups of each step; each group folds."""
    out = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{_e(run)}: answers</title><style>{_CSS}</style></head><body>",
        f"<h1>{_e(run)}</h1><table><tr><th>step<th>answers<th>mean reward<th>without signal</tr>",
    ]
    for step, groups in steps.items():
        rewards = [r for group in groups for r in group.rewards]
        mean = sum(rewards) / len(rewards) if rewards else math.nan
        flat = sum(not group.spread for group in groups)
        count = sum(len(group.answers) for group in groups)
        link = f"<a href='#s{step}'>{step}</a>"
        out.append(f"<tr><td>{link}<td>{count}<td>{mean:.4g}<td>{flat} of {len(groups)}</tr>")
    out.append("</table>")
    for step, groups in steps.items():
        out.append(f"<h2 id='s{step}'>step {step}</h2>")
        out += [_group(group) for group in groups[:most]]
        if len(groups) > most:
            out.append(f"<p class='f'>{len(groups) - most} more groups are in the run's folder</p>")
    return "\n".join([*out, "</body></html>\n"])


def _group(group: Group) -> str:
    first = group.answers[0]
    each = " ".join("-" if a["reward"] is None else f"{a['reward']:.3g}" for a in group.answers)
    out = [f"<details><summary>{_e(first['prompt_id'])}: rewards {_e(each)}</summary>"]
    out += [_message(message) for message in first["prompt"]]
    if first.get("expected") is not None:
        expected = json.dumps(first["expected"], ensure_ascii=False, default=str)
        out.append(f"<pre><b class='r'>expected</b> {_e(expected)}</pre>")
    for answer in group.answers:
        kind = ""
        if answer["reward"] is not None and group.spread:
            kind = " good" if answer["reward"] > group.mean else " bad"
        out.append(f"<div class='a{kind}'><div class='f'>{_e(figures(answer))}</div>")
        out += [_message(message) for message in answer["answer"]]
        out += [_tokens(answer), "</div>"]
    return "\n".join([*out, "</details>"])


def _message(message: Line) -> str:
    return f"<pre><b class='r'>{_e(message['role'])}</b> {_e(said(message))}</pre>"


def _tokens(answer: Line) -> str:
    """Each sampled token, the redder the less probable; the figures stand in its title."""
    if not answer.get("pieces"):
        return ""
    advantages = answer.get("advantages") or [None] * len(answer["pieces"])
    rows = zip(
        answer["pieces"], answer["sampled"], answer["logps"], answer["plain_logps"], advantages,
        strict=True,
    )  # fmt: skip
    spans = []
    for piece, sampled, logp, plain, advantage in rows:
        if sampled:
            told = f"log-prob {logp:.4f}, plain {plain:.4f}"
            told += "" if advantage is None else f", advantage {advantage:+.4f}"
            red = 0.6 * (1 - math.exp(min(plain, 0.0)))
            style = f"background:rgba(208,67,59,{red:.2f})"
            spans.append(f"<span style='{style}' title='{told}'>{_e(piece)}</span>")
    return f"<details><summary class='f'>tokens</summary><pre>{''.join(spans)}</pre></details>"


def _e(value: Any) -> str:
    return html.escape(_written(str(value)))
