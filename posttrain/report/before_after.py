"""The same questions put to the model of each stage: what each said, and how it did."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.world import SYSTEM_PROMPTS
from posttrain.data.world_probe import PROBE_KINDS, Probe, is_as_wanted, is_right
from posttrain.sampling import turns
from posttrain.types import Mean

SHOWN = 100
"""Characters of a reply that `show_examples` prints; a base model goes on and on."""


@dataclass(frozen=True)
class Answers:
    """One model asked in one way: its replies' texts as they came, and their rates."""

    texts: list[str]
    rates: dict[str, Mean]


def measure(
    replies: Sequence[Sequence[int]],
    said: Sequence[Mapping[str, Any]],
    probes: Sequence[Probe],
    stop_ids: Collection[int],
    openers: Collection[int],
) -> dict[str, Mean]:
    """The rates of one model over all probes.

    replies: tokens, stop token included. said: the same as messages, thinking apart.
    Form and value are judged apart: capitals that name the wrong city follow "Answer in capitals".
    """
    right = [is_right(m["content"], probe) for m, probe in zip(said, probes, strict=True)]
    formed = [
        is_as_wanted(m["content"], m.get("reasoning_content", ""), probe)
        for m, probe in zip(said, probes, strict=True)
    ]
    thought = [bool(m.get("reasoning_content", "").strip()) for m in said]

    def share(outcomes: list[bool], of: Callable[[Probe], bool]) -> Mean:
        counted = [outcome for outcome, p in zip(outcomes, probes, strict=True) if of(p)]
        return Mean(sum(counted), len(counted))

    rates = {
        "stops by itself": turns.stop_rate(replies, stop_ids),
        "keeps to one turn": turns.one_turn_rate(replies, stop_ids, openers),
        "follows system prompt": share(formed, lambda p: p.prompted),
    }
    for form, prompt in SYSTEM_PROMPTS.items():
        if prompt:
            rates[f"follows: {form}"] = share(
                formed, lambda p, form=form: p.prompted and p.form == form
            )
    rates |= {
        "preferred: greets": share(formed, lambda p: p.form == "greeting"),
        "preferred: only once": share(formed, lambda p: p.kind == "second turn" and not p.prompted),
        "preferred: not with a sum": share(formed, lambda p: p.form == "number"),
        "works sums out unasked": share(thought, lambda p: p.kind == "sum"),
        "right": share(right, lambda p: True),
    }
    for kind in PROBE_KINDS:
        rates[f"right: {kind}"] = share(right, lambda p, kind=kind: p.kind == kind)
    return rates


def examples(probes: Sequence[Probe], answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """What each model said to one question of each kind and form, second turns only once."""
    cases = [(p.kind, "" if p.kind == "second turn" else p.form) for p in probes]
    return [
        {"asked": probes[i].messages, "said": {name: a.texts[i] for name, a in answers.items()}}
        for i in (cases.index(case) for case in dict.fromkeys(cases))
    ]


def show_examples(found: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Prints what `examples` found, a column a model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for name in ("asked", *found[0]["said"]):
        table.add_column(Text(name), overflow="fold")  # a reply's last word may be long
    for example in found:
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in example["asked"])
        table.add_row(Text(asked), *(Text(_cut(text)) for text in example["said"].values()))
    Console().print(table)


def show_rates(answers: Mapping[str, Answers], *, title: str, caption: str) -> None:
    """Prints the rates of all models, each with its n."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, caption=caption)
    table.add_column("", no_wrap=True)
    for name in answers:
        table.add_column(Text(name), justify="right")
    table.add_column("n", justify="right")
    for rate, mean in next(iter(answers.values())).rates.items():
        values = [f"{a.rates[rate].value:.1%}" for a in answers.values()]
        table.add_row(rate, *values, str(mean.count))
    Console().print(table)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " ..."


def as_json(asked: Mapping[float, Mapping[str, Answers]]) -> list[dict[str, Any]]:
    """Per temperature {"temperature", "models": name -> rate -> {"value", "n"}}."""

    def figures(answers: Answers) -> dict[str, Any]:
        return {rate: {"value": m.value, "n": m.count} for rate, m in answers.rates.items()}

    return [
        {"temperature": temperature, "models": {name: figures(a) for name, a in answers.items()}}
        for temperature, answers in asked.items()
    ]
