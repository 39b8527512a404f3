"""Findings as tests look at them."""

from __future__ import annotations

from posttrain.doctor.base import Check, Finding, Level, Subject


def found(check: Check, on: Subject) -> dict[str, Finding]:
    """What a check finds, by name; all that is not well says what to do."""
    findings = {finding.what: finding for finding in check(on)}
    assert all(bool(f.todo) == (f.level > Level.OK) for f in findings.values()), findings
    return findings


def bad(findings: dict[str, Finding]) -> dict[str, Level]:
    """Name -> level of what is not well."""
    return {name: f.level for name, f in findings.items() if f.level > Level.OK}
