"""The same questions put to several models: what each said, how often it was right and stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.world import PROBE_KINDS, Probe, is_as_asked, is_right
from posttrain.sampling import turns
from posttrain.types import Mean


@dataclass(frozen=True)
class Answers:
    """One model asked in one way: its replies' texts as they came, and their rates."""

    texts: list[str]
    rates: dict[str, Mean]


def measure(
    replies: Sequence[Sequence[int]],
    said: Sequence[str],
    probes: Sequence[Probe],
    stop_ids: Collection[int],
    openers: Collection[int],
) -> dict[str, Mean]:
    """The rates of one model over all probes; `said` are the replies' texts without thinking."""
    judged = list(zip(said, probes, strict=True))
    rates = {
        "stops by itself": turns.stop_rate(replies, stop_ids),
        "keeps to one turn": turns.one_turn_rate(replies, stop_ids, openers),
    }
    for kind in PROBE_KINDS:
        right = [is_right(text, probe) for text, probe in judged if probe.kind == kind]
        rates[f"right: {kind}"] = Mean(sum(right), len(right))
    exact = [is_as_asked(text, probe) for text, probe in judged]
    rates["right to the letter"] = Mean(sum(exact), len(exact))
    return rates


def show(
    probes: Sequence[Probe], answers: Mapping[str, Answers], *, title: str, caption: str
) -> None:
    """Prints the replies to one question of each kind, and the table of rates with their n."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    examples = Table(title="The same held-out questions", show_lines=True)
    rates = Table(title=title, caption=caption)
    examples.add_column("asked")
    rates.add_column("")
    for name in answers:
        examples.add_column(Text(name))
        rates.add_column(Text(name), justify="right")
    rates.add_column("n", justify="right")
    for kind in PROBE_KINDS:
        i = next(i for i, probe in enumerate(probes) if probe.kind == kind)
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in probes[i].messages)
        examples.add_row(Text(asked), *(Text(a.texts[i]) for a in answers.values()))
    for rate, mean in next(iter(answers.values())).rates.items():
        values = [f"{a.rates[rate].value:.1%}" for a in answers.values()]
        rates.add_row(rate, *values, str(mean.count))
    console.print(examples)
    console.print(rates)


def as_json(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """name -> rate -> {"value", "n"}."""
    return {
        name: {rate: {"value": m.value, "n": m.count} for rate, m in a.rates.items()}
        for name, a in answers.items()
    }
