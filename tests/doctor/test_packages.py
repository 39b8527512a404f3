"""Packages that do not fit each other, are not the tested ones, or cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.doctor import packages
from posttrain.doctor.base import Level, Subject
from tests.doctor.found import bad, found


def with_versions(**changed: str | None):
    names = {name.replace("_", "-"): version for name, version in changed.items()}
    return lambda name: names[name] if name in names else packages.installed(name)


def test_this_environment_is_as_tested(subject: Subject) -> None:
    assert not bad(found(packages.versions, subject))


def test_a_package_too_old_or_absent_is_named_with_who_wants_it() -> None:
    said = list(packages.unmet("posttrain", with_versions(jax="0.4.1", optax=None)))
    assert "posttrain needs jax>=0.10.2, found 0.4.1" in said
    assert "posttrain needs optax>=0.2.8, found none" in said
    assert any(line.startswith("flax needs jax") for line in said), "what ours require, too"


def test_a_plugin_of_another_release_than_jax_is_unmet() -> None:
    """JAX passes over such a plugin with a line in the log, and computes on the CPU."""
    said = list(packages.unmet("posttrain", with_versions(jax_cuda13_plugin="0.9.0")))
    assert len(said) == 1
    assert said[0].startswith("jax needs jax-cuda13-plugin")
    assert said[0].endswith("found 0.9.0")
    assert not list(packages.unmet("posttrain", with_versions(jax_cuda13_plugin="0.10.2")))
    (said,) = packages.unmet("posttrain", with_versions(libtpu="0.0.1"))
    assert said.startswith("jax needs libtpu==0.0.")


def test_unmet_requirements_are_a_problem(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "unmet", lambda name: iter(["flax needs jax>=9, found 1"]))
    assert bad(found(packages.versions, subject)) == {"requirements": Level.PROBLEM}


def test_other_versions_than_the_tested_are_a_warning(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("jax==0.0.1\nflax==" + str(packages.installed("flax")) + "\n")
    monkeypatch.setattr(packages, "_CONSTRAINTS", path)
    all_found = found(packages.versions, subject)
    assert bad(all_found) == {"tested with": Level.WARNING}
    said = all_found["tested with"].said
    assert "(tested: 0.0.1)" in said
    assert "flax" not in said


def test_libraries_that_cannot_be_imported_are_a_problem(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_TRAINING", "posttrain.no_such_module")
    assert bad(found(packages.versions, subject)) == {"imports": Level.PROBLEM}


def test_a_checkout_that_is_not_installed_is_not_called_complete(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = packages.installed
    monkeypatch.setattr(packages, "installed", lambda n: None if n == "posttrain" else installed(n))
    monkeypatch.setattr(packages, "unmet", lambda name: iter(()))  # nobody says what it asks for
    assert bad(found(packages.versions, subject)) == {"requirements": Level.WARNING}
