"""The compile cache: on and hit, off, not writable, never hit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from posttrain.doctor import compiling
from posttrain.doctor.base import Level, Subject
from tests.doctor.found import bad, found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A compile cache of the test's own; the tests' common one comes back after."""
    before = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_second_compile_is_read_from_the_cache_and_the_probe_is_removed(
    subject: Subject, folder: Path
) -> None:
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    said = found(compiling.compile_cache, subject)
    assert not bad(said)
    assert said["cache"].said.startswith(f"{folder}: the second time")
    assert said["compile"].figures["cold_s"] > said["compile"].figures["warm_s"]
    assert not list(folder.glob("*doctor*"))
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == least


def test_a_cache_that_is_off_is_a_warning(subject: Subject, folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    assert bad(found(compiling.compile_cache, subject)) == {"cache": Level.WARNING}


def test_a_cache_that_cannot_be_written_is_a_problem(subject: Subject, folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", "/proc/sys/cache")
    all_found = found(compiling.compile_cache, subject)
    assert bad(all_found) == {"cache": Level.PROBLEM}
    assert all_found["cache"].said.startswith("/proc/sys/cache: Error reading")
    assert all_found["cache"].todo.startswith("make /proc/sys/cache writable")


def test_a_cache_that_is_never_hit_is_a_problem(
    subject: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, salts = compiling._probe, iter(range(100))
    monkeypatch.setattr(compiling, "_probe", lambda salt: probe(salt + next(salts)))
    all_found = found(compiling.compile_cache, subject)
    assert bad(all_found) == {"cache": Level.PROBLEM}
    assert "not read again" in all_found["cache"].said


def test_what_another_doctor_keeps_in_the_same_folder_is_left_to_it(
    subject: Subject, folder: Path
) -> None:
    """Two at once would take each other's entries away, and both report a cache never hit."""
    with compiling._every_entry_kept():
        compiling._probe(123).compile()
    theirs = {path.name for path in folder.glob("*doctor*")}
    assert theirs
    assert not bad(found(compiling.compile_cache, subject))
    assert {path.name for path in folder.glob("*doctor*")} == theirs
