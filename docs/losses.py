"""Writes what docs/losses.md says of each loss, from its docstring and fields: `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.advantages import ADVANTAGES
from posttrain.config import Config
from posttrain.losses import PAIR_LOSSES, POLICY_LOSSES, UNPAIRED_LOSSES, VALUE_LOSSES, kl
from posttrain.losses.correction import Correction
from posttrain.losses.mixture import Mixture
from posttrain.losses.pair_loss import MarginLoss, PairLoss, ReferenceLoss
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.unpaired import UnpairedLoss

PAGE = Path(__file__).with_suffix(".md")

BEGIN = "<!-- Written by `make docs` from the docstrings in posttrain/losses: change those. -->"
END = "<!-- /Written -->"


def text_of(cls: type[Config]) -> str:
    """The docstring as Markdown: indented formulas are code, Source and When paragraphs."""
    text = inspect.getdoc(cls) or ""
    text = re.sub(r"^(Source|When):", r"\n**\1:**", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


def fields_of(cls: type[Config]) -> list[str]:
    """The fields that the class itself declares."""
    return [name for name in cls.model_fields if name in cls.__annotations__]


def settings_of(cls: type[Config], shared: set[str]) -> str:
    """A line for each field of its own, or of a loss that it is a kind of, and the names and
    defaults of what is shared."""
    own = [x for x in cls.model_fields if x in cls.__annotations__ or x not in shared]
    lines = lines_of(cls, own)
    others = [x for x in cls.model_fields if x in shared and x not in own]
    if others:
        said = ", ".join(f"`{name}` {default_of(cls, name)}" for name in others)
        lines.append(f"- shared: {said}")
    return "\n".join(["", *lines, ""])


def lines_of(cls: type[Config], names: list[str]) -> list[str]:
    """What these fields are."""
    return [f"- `{x}` ({default_of(cls, x)}): {cls.model_fields[x].description}" for x in names]


def default_of(cls: type[Config], name: str) -> str:
    field = cls.model_fields[name]
    if field.is_required():
        return "required"
    if isinstance(field.default, Config):
        return "as below"
    return "none" if field.default is None else str(field.default).lower()


def row_of(name: str, cls: type[PairLoss] | type[UnpairedLoss]) -> str:
    made = cls()
    needs = "yes" if "reference_logps" in made.needs else "no"
    data = {"twinned": "labelled, with mismatched twins"}.get(made.data, made.data)
    coupled = made.coupled or "its own"
    first = (inspect.getdoc(cls) or "").split("\n")[0]
    return f"| [`{name}`](#{name}) | {first} | {data} | {needs} | {coupled} |"


def online() -> list[str]:
    """Of learning online: advantages, losses, the KL."""
    shared = fields_of(PolicyLoss)
    parts = ["# Learning online\n", *chapter("Advantages", "advantage.type", ADVANTAGES)]
    parts += chapter("Policy losses", "loss.type", POLICY_LOSSES, shared)
    parts += ["### Settings of all policy losses\n", *lines_of(PolicyLoss, shared), ""]
    parts += ["### loss.correction\n", text_of(Correction), ""]
    parts += [*lines_of(Correction, fields_of(Correction)), ""]
    parts += chapter("What a critic minimises", "critic.loss.type", VALUE_LOSSES)
    parts += ["## The KL\n", inspect.getdoc(kl) or "", ""]
    return [*parts, *lines_of(kl.KL, fields_of(kl.KL)), ""]


def chapter(
    title: str, key: str, registry: Mapping[str, type[Config]], shared: Sequence[str] = ()
) -> list[str]:
    """A table of a registry's classes, then each of them."""
    parts = [f"## {title}\n", f"| `{key}` | |", "|---|---|"]
    first = {name: (inspect.getdoc(cls) or "").split("\n")[0] for name, cls in registry.items()}
    parts += [f"| `{name}` | {line} |" for name, line in first.items()]
    parts.append("")
    for name, cls in registry.items():
        parts += [f"### {key}: {name}\n", text_of(cls), settings_of(cls, set(shared))]
    return parts


def page(before: str) -> str:
    """docs/losses.md, of which `before` is any version: what stands between the marks is new."""
    losses: dict[str, type[PairLoss] | type[UnpairedLoss]] = {**PAIR_LOSSES, **UNPAIRED_LOSSES}
    parts = ["| `loss.type` | | data | reference | a term depends on |", "|---|---|---|---|---|"]
    parts += [row_of(name, cls) for name, cls in losses.items()]
    whole = (inspect.getdoc(Mixture) or "").split("\n")[0]
    parts += [f"| [`mixture`](#mixture) | {whole} | pairs | as its parts | as its parts |", ""]
    bases = {
        "All losses on pairs": PairLoss,
        "Those with a reference": ReferenceLoss,
        "Those of the margin between the two answers": MarginLoss,
        "Those on labelled answers": UnpairedLoss,
    }
    shared = {name for base in bases.values() for name in fields_of(base)}
    for name, cls in {**losses, "mixture": Mixture}.items():
        parts += [f"## {name}\n", text_of(cls), settings_of(cls, shared)]
    parts.append("## Settings that several losses share\n")
    for title, base in bases.items():
        parts += [f"### {title}\n", text_of(base), "", *lines_of(base, fields_of(base)), ""]
    parts += online()
    head, rest = before.split(BEGIN)
    return "\n".join([f"{head}{BEGIN}\n", *parts, f"{END}{rest.split(END)[1]}"])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
