"""Where an answer lies in what a model wrote, and the number that it is."""

from __future__ import annotations

import re
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LONGEST = 400  # characters of what may be a number
_SIGN = "[-+\N{MINUS SIGN}]"
_POWER = r"(?:[eE][-+]?\d{1,3}(?!\d))?(?![eE][-+]?\d)"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+){_POWER}"
# a sign right after a digit, a letter or a bracket takes away: 10-4
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![\w)\]}}]){_SIGN}\s?)?[$€£]?(?:(?<=[$€£]){_SIGN})?{_DIGITS}(?:\s?/\s?\d+)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_LEAD = re.compile(r"####|\banswer(?:\s+is|\s*[:=])|\bis\s*:", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of balanced braces holds; None: there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for k in range(match.end(), len(text)):
            depth += (text[k] == "{") - (text[k] == "}")
            if not depth:
                return text[match.end() : k].strip()
    return None


def final_number(text: str) -> Fraction | None:
    r"""The number that a text comes to: in its last \boxed{}; else the first after its last `####`
    or "the answer is"; else the last in it. None: there is none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return number(boxed)
    leads = list(_LEAD.finditer(text))
    if leads and (found := _numbers(text[leads[-1].end() :])):
        return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def number(text: str) -> Fraction | None:
    """The one number in a short text, units and money signs beside it passed over: "$1,234.50",
    "3/4", "-2 m". None: there is none, or several."""
    found = _numbers(text)
    return found[0] if len(found) == 1 else None


def _numbers(text: str) -> list[Fraction]:
    plain = _FRACTION.sub(r" \1/\2 ", text).replace("{,}", ",").replace("\\$", "$")
    plain = plain.replace("\\!", "").replace("\\,", "")
    values = (_value(match[0]) for match in _NUMBER.finditer(plain))
    return [value for value in values if value is not None]


def _value(text: str) -> Fraction | None:
    text = re.sub(r"[\s,$€£]", "", text).replace("\N{MINUS SIGN}", "-")
    if len(text) > _LONGEST:
        return None
    top, _, bottom = text.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
