"""Runs whose folder and prepared data are in an object store (posttrain/mirror.py, data/stored.py).

The store is a stand-in: tests/gcs.py says what of the real one it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from posttrain import checkpoint, cli, config, folder, mirror
from posttrain.config import ConfigError
from posttrain.data import prepare
from posttrain.jobs import sft
from tests.gcs import stand_in
from tests.jobs.runs import Finished, Runner

URL = "gs://bucket/runs/one"
STORED = [f"run_dir={URL}", "data.cache_dir=gs://bucket/cache"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the bucket."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch, stand_in(folder, patch) as root:
        yield root / "bucket"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Goes on another machine of that name: nothing is there but what the store has."""

    def goes(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name

    return goes


def test_a_run_in_a_store_is_resumed_on_another_machine_and_loses_nothing(
    store: Path,
    machine: Callable[[str], Path],
    run_sft: Runner,
    tiny_sft: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [*tiny_sft, "checkpoint.every=2", "log.tensorboard=true"]
    alone = run_sft(*keys, "train.steps=6", devices=1)

    machine("first")
    with monkeypatch.context() as patch:  # two checkpoints, and no time for anything after them
        push, ended = mirror.push, list[Path]()
        patch.setattr(checkpoint.Checkpoints, "close", lambda self: ended.append(self._run_dir))
        patch.setattr(mirror, "push", lambda folder: None if folder in ended else push(folder))
        run_sft(*keys, "train.steps=4", "export=false", *STORED, devices=1)
    run = Finished(0, store / "runs" / "one")
    assert run.metrics[-1]["step"] == 4
    assert f"run_dir: {URL}\n" in (run.folder / "resolved.yaml").read_text()
    assert not (run.folder / "lock").exists()

    machine("second")
    monkeypatch.setattr(prepare, "_make", lambda *_: pytest.fail("the data are in the store"))
    run_sft(*keys, "train.steps=6", "checkpoint.resume=must", *STORED, devices=1)
    assert [line["step"] for line in run.metrics] == list(range(1, 7))
    np.testing.assert_array_equal(run.losses, alone.losses)
    for name, want in alone.weights.items():
        np.testing.assert_array_equal(run.weights[name], want, err_msg=name)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["4", "6"]
    assert len(list((run.folder / "tensorboard").iterdir())) == 2

    last = checkpoint.find_checkpoint(URL)
    assert str(last) == f"{URL}/checkpoints/6"
    assert str(checkpoint.find_checkpoint(f"{URL}@4")) == f"{URL}/checkpoints/4"
    (run.folder / "checkpoints" / "6" / "commit_success.txt").unlink()
    assert str(checkpoint.find_checkpoint(URL)) == f"{URL}/checkpoints/4", "a save was cut short"
    with pytest.raises(ConfigError, match=r"the run has steps \[4\]"):
        checkpoint.find_checkpoint(f"{URL}@6")


@pytest.fixture
def of_a_run(machine: Callable[[str], Path]) -> sft.Config:
    machine("first")
    needed = ["model.path=m", "data.sources.a.path=x", "batch.rows=1"]
    return config.load(sft.Config, [], [*needed, "run_dir=gs://bucket/two"])


def test_what_has_changed_is_in_the_store_before_a_checkpoint_and_at_the_end(
    store: Path, machine: Callable[[str], Path], of_a_run: sft.Config
) -> None:
    there = store / "two"
    with folder.at_work(of_a_run) as cfg:
        (cfg.run_dir / "rounds").mkdir()
        lines, part = cfg.run_dir / "metrics.jsonl", cfg.run_dir / "rounds" / "1.npz"
        lines.write_text("1\n")
        part.write_text("round")
        mirror.push(cfg.run_dir)
        assert (there / "metrics.jsonl").read_text() == "1\n"
        (there / "metrics.jsonl").write_text("touched")
        mirror.push(cfg.run_dir)
        assert (there / "metrics.jsonl").read_text() == "touched", "only what has changed travels"
        part.rename(part.with_name("2.npz"))
        lines.write_text("1\n2\n")
    assert (there / "metrics.jsonl").read_text() == "1\n2\n"
    assert [p.name for p in (there / "rounds").iterdir()] == ["2.npz"]
    assert mirror.home_of(cfg.run_dir) == cfg.run_dir, "it is over"

    left = cfg.run_dir / "metrics.jsonl"
    left.write_text("1\n2\n3, after the last checkpoint of a start that was killed\n")
    for name in ("first", "second"):
        machine(name)
        with folder.at_work(of_a_run) as cfg:
            assert (cfg.run_dir / "metrics.jsonl").read_text() == "1\n2\n"
            assert (cfg.run_dir / "rounds" / "2.npz").read_text() == "round"


def test_a_store_that_takes_nothing_ends_the_run(
    store: Path, of_a_run: sft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(mirror.time, "sleep", pauses.append)

    def refuses(*_: object) -> None:
        raise RuntimeError("403")

    monkeypatch.setattr(mirror, "send", refuses)
    with folder.at_work(of_a_run) as cfg:
        (cfg.run_dir / "metrics.jsonl").write_text("1\n")
        with pytest.raises(OSError, match=r"RuntimeError: 403\); given up after 4 attempts"):
            mirror.push(cfg.run_dir)
        (cfg.run_dir / "metrics.jsonl").unlink()
    assert pauses == [2, 4, 8]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("run_dir=s3://bucket/one", "or gs://BUCKET/FOLDER"),
        ("run_dir=", "must be a folder"),
        ("data.cache_dir=ftp://bucket/one", "no store is known by 'ftp://'"),
    ],
)
def test_other_addresses_are_refused(
    key: str, said: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = data_dir / "golden"
    needed = [f"model.path={golden / 'model'}", f"data.sources.a.path={golden}/sft.jsonl"]
    given = [*needed, f"run_dir={tmp_path}", "batch.rows=8", "train.steps=1", key]
    assert cli.main(["sft", *given]) == 2
    assert said in capsys.readouterr().err


def test_compiled_programs_are_kept_in_a_store_too(store: Path) -> None:
    """By jax itself, where JAX_COMPILATION_CACHE_DIR names one."""
    before = jax.config.values["jax_compilation_cache_dir"]
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    compilation_cache.reset_cache()
    try:
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: x * 41.5)(2.0)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert list((store / "compiled").glob("jit__lambda*"))
    assert "/jax/compilation_cache/cache_hits" in hits
