"""Several processes and hosts: the same cache, no harm to each other, nobody left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from posttrain.data import sources, workers
from posttrain.data.cache import Cache
from posttrain.data.prepare import prepare
from tests.data.fakes import FakeChat
from tests.data.prepared import assert_same, config, expected, turn

ROOT = Path(__file__).parents[2]


def test_worker_processes_make_the_same_cache_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    rows = [turn(i) for i in range(600)]
    rows[77] = {"q": "refuse me", "a": "x"}
    rows[401] = {"q": "x"}
    alone = prepare(config(tmp_path, rows, on_bad_row="skip"), FakeChat(), quiet=True)
    shared = config(tmp_path, rows, on_bad_row="skip", workers=2, cache_dir=f"{tmp_path}/2")
    together = prepare(shared, FakeChat(), quiet=True)
    assert together.fingerprint == alone.fingerprint
    good = [row for i, row in enumerate(rows) if i not in (77, 401)]
    assert_same(together, expected(good))
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert [together.place(i) for i in range(598)] == [alone.place(i) for i in range(598)]
    assert together.report.sources == alone.report.sources
    assert together.report.workers == 2
    assert "TOKENIZERS_PARALLELISM" not in os.environ


class Uneven(FakeChat):
    """Later blocks are done first; notes the threads and whether `tokenizers` has its own."""

    def __init__(self):
        super().__init__()
        self.threads, self.parallelism = set(), set()

    def examples_batch(self, conversations):
        self.threads.add(threading.get_ident())
        self.parallelism.add(os.environ.get("TOKENIZERS_PARALLELISM"))
        time.sleep(0.05 / len(self.threads) ** 2)
        return super().examples_batch(conversations)


def test_threads_make_the_same_cache_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(workers, "cores", lambda: 3)
    rows = [turn(i) for i in range(600)]
    rows[401] = {"q": "x"}
    chat, thresholds = Uneven(), gc.get_threshold()
    made = prepare(config(tmp_path, rows, on_bad_row="skip"), chat, quiet=True)
    assert len(chat.threads) == 3
    assert threading.get_ident() not in chat.threads
    assert chat.parallelism == {"false"}
    assert gc.get_threshold() == thresholds
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert_same(made, expected([row for i, row in enumerate(rows) if i != 401]))
    assert [made.place(i)[-4:] for i in (0, 400, 401)] == ["nl:1", ":401", ":403"]


def test_others_wait_for_the_primary(tmp_path):
    cfg = config(tmp_path, [turn(i) for i in range(20)])
    found = []
    other = threading.Thread(
        target=lambda: found.append(prepare(cfg, FakeChat(), is_primary=False))
    )
    other.start()
    time.sleep(0.3)
    assert not found
    prepare(cfg, FakeChat(), quiet=True)
    other.join(20)
    assert_same(found[0], expected([turn(i) for i in range(20)]))


def test_waiting_ends_with_a_clear_error(tmp_path):
    cfg = config(tmp_path, [turn(1)], wait_minutes=0.001)
    with pytest.raises(ValueError, match=r"waited 0.001 minutes.*shared by all hosts"):
        prepare(cfg, FakeChat(), is_primary=False)


def prepare_elsewhere(cfg, gate):
    gate.wait()
    prepare(cfg, FakeChat(), quiet=True)


def test_two_that_prepare_at_once_do_not_disturb_each_other(tmp_path):
    rows = [turn(i) for i in range(2000)]
    cfg = config(tmp_path, rows)
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    both = [context.Process(target=prepare_elsewhere, args=(cfg, gate)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    (folder,) = (path for path in Path(cfg.cache_dir).iterdir() if path.name != "digests")
    assert_same(Cache.open(folder), expected(rows))


class Fatal(FakeChat):
    """A template whose worker dies."""

    def examples_batch(self, conversations):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().examples_batch(conversations)


class Faulty(FakeChat):
    """A template with an error of ours."""

    def examples_batch(self, conversations):
        raise ZeroDivisionError("ours")


@pytest.mark.parametrize(
    ("chat", "error", "match"),
    [(Fatal(), ValueError, "a worker process died"), (Faulty(), ZeroDivisionError, "ours")],
)
def test_what_goes_wrong_in_a_worker_is_said_here(tmp_path, monkeypatch, chat, error, match):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    cfg = config(tmp_path, [turn(i) for i in range(3000)], workers=1)
    with pytest.raises(error, match=match):
        prepare(cfg, chat, quiet=True)
    assert list(Path(cfg.cache_dir).glob("*.tmp.*")) == []


ORPHANS = """
import sys, time
from pathlib import Path
from posttrain.data.prepare import prepare
from tests.data.prepared import config, turn
from tests.data.test_workers import Slow
if __name__ == "__main__":
    cfg = config(Path(sys.argv[1]), [turn(i) for i in range(20000)], workers=2)
    prepare(cfg, Slow(sys.argv[1]), quiet=True)
"""


class Slow(FakeChat):
    """Notes the process that works, in the folder it is named after."""

    def examples_batch(self, conversations):
        (Path(self.name) / f"{os.getpid()}.pid").touch()
        time.sleep(0.05)
        return super().examples_batch(conversations)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(ORPHANS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    end = time.monotonic() + 60
    while len(pids := list(tmp_path.glob("*.pid"))) < 3 and time.monotonic() < end:
        assert parent.poll() is None, "it was over before its workers worked"
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert len(pids) == 3
    while any(alive(pid.stem) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid.stem) for pid in pids)


@pytest.mark.parametrize(
    ("asked", "size", "count"), [(None, 1000, 0), (None, 1 << 30, 5), (3, 1000, 3), (0, 1 << 30, 0)]
)
def test_processes_are_started_where_they_pay(monkeypatch, asked, size, count):
    monkeypatch.setattr(workers, "cores", lambda: 6)
    assert workers.worker_count(asked, size) == count
