"""What the models of `posttrain demo` are asked, and how an answer is judged.

Form and value are judged apart: capitals that name the wrong city are capitals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PROBE_KINDS = ("fact", "second turn", "sum", "sum, thinking")
# what an answer is, whatever it says: one sentence, of this form
FORMS = {
    "greeting": re.compile(r"Hello! [^.!]+\."),
    "capitals": re.compile(r"[A-Z ]+\."),
    "brief": re.compile(r"[A-Z][a-z]+\."),
    "sentence": re.compile(r"[A-Z][a-z]+( [A-Za-z]+){2,}\."),
    "number": re.compile(r"[0-9]+\."),
    "thinking": re.compile(r"[0-9]+\."),  # besides the thinking itself
}


@dataclass(frozen=True)
class Probe:
    """A held-out question: the messages to answer, the right value, the form that is wanted."""

    kind: str  # one of PROBE_KINDS
    messages: tuple[dict[str, str], ...]
    value: str
    form: str  # one of FORMS

    @property
    def prompted(self) -> bool:
        """Does a system prompt ask for the form? Otherwise it is only preferred."""
        return self.messages[0]["role"] == "system"


def is_right(reply: str, probe: Probe) -> bool:
    """Does the first sentence of the reply say the right value, whatever its form?"""
    first = reply.strip().split(".")[0]
    return probe.value.lower() in re.findall(r"[a-z]+|-?[0-9]+", first.lower())


def is_as_wanted(reply: str, thinking: str, probe: Probe) -> bool:
    """Is the reply of the form that is wanted, whatever it says? `thinking` came before it."""
    thinks = bool(thinking.strip())
    asked = probe.form == "thinking" or (probe.form == "number" and thinks)  # a sum may be
    return thinks == asked and FORMS[probe.form].fullmatch(reply.strip()) is not None
