"""A cache gives back what was written, from anywhere in it, and is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from posttrain.data import cache as cache_module
from posttrain.data.cache import Cache, CacheWriter
from posttrain.data.report import Report, SourceReport
from posttrain.types import Example


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in rng.integers(2, 300, count):
        weights = rng.choice([0.0, 0.5, 1.0], n).astype(np.float32)
        made.append(Example(rng.integers(0, 150_000, n).astype(np.int32), weights))
    return made


def report(key="k"):
    return Report(key, 1024, "drop", {"a": SourceReport(rows=3), "b": SourceReport()})


def fill(writer, made, file="f.jsonl", source=0, first=1):
    writer.add(
        np.concatenate([e.tokens for e in made]),
        np.concatenate([e.loss_weights for e in made]),
        np.array([len(e.tokens) for e in made], np.int32),
        np.arange(first, first + len(made)),
        np.array([e.margin for e in made], np.float32),
        np.array([e.label for e in made], np.int8),
        source,
        file,
    )


def write(folder, made, key="k", shard_bytes=cache_module.SHARD_BYTES):
    with CacheWriter(folder, ["a", "b"], shard_bytes) as writer:
        fill(writer, made[: len(made) // 2])
        fill(writer, made[len(made) // 2 :], "g.jsonl", 1, 10)
        return writer.finish(key, report(key))


@pytest.fixture
def small_disk():
    """While it lasts, no file of this process grows past 1,000 bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("shard_bytes", [cache_module.SHARD_BYTES, 100])
def test_a_full_disk_is_told_with_its_folder_and_nothing_is_left(tmp_path, small_disk, shard_bytes):
    """Met when the one file is closed, or when the first of many is."""
    with pytest.raises(OSError, match=rf"{tmp_path}/k: the prepared data cannot be .*cache_dir"):
        write(tmp_path / "k", examples(40), shard_bytes=shard_bytes)
    assert not list(tmp_path.iterdir())


def same(got, wanted):
    return (
        got.tokens.dtype == np.int32
        and got.loss_weights.dtype == np.float32
        and np.array_equal(got.tokens, wanted.tokens)
        and np.array_equal(got.loss_weights, wanted.loss_weights)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = examples(501)
    folder = tmp_path_factory.mktemp("cache") / "k"
    return write(folder, made, shard_bytes=60_000), made


def test_every_example_comes_back(whole):
    cache, made = whole
    assert len(list(cache.folder.glob("*.array_record"))) > 5
    assert len(cache) == len(made)
    assert all(same(cache[i], made[i]) for i in range(len(made)))
    ids = np.random.default_rng(1).permutation(len(made))
    got = cache.read(ids)
    assert all(same(e, made[i]) for e, i in zip(got, ids, strict=True))
    assert cache.read([]) == []


def test_the_index_says_what_is_in_it(whole):
    cache, made = whole
    assert cache.lengths.tolist() == [len(e.tokens) for e in made]
    assert cache.trained.tolist() == [int((e.loss_weights > 0).sum()) for e in made]
    assert cache.source_ids.tolist() == [0] * 250 + [1] * 251
    assert (cache.source_names, cache.fingerprint) == (["a", "b"], "k")
    assert [a.dtype for a in (cache.lengths, cache.trained, cache.source_ids)] == [np.int32] * 3
    assert [cache.place(i) for i in (0, 249, 250)] == ["f.jsonl:1", "f.jsonl:250", "g.jsonl:10"]
    assert cache.report == report()


@pytest.mark.parametrize("i", [-1, 501])
def test_there_is_nothing_outside_of_it(whole, i):
    with pytest.raises(IndexError):
        whole[0][i]


def test_threads_and_other_processes_read_the_same(whole):
    cache, made = whole
    again = pickle.loads(pickle.dumps(cache))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: again[i % len(made)], range(2000)))
    assert all(same(e, made[i % len(made)]) for i, e in enumerate(got))


@pytest.mark.parametrize("damage", ["index", "shard cut", "shard gone", "array", "version"])
def test_what_is_not_whole_is_refused_by_name(tmp_path, damage):
    folder = tmp_path / "k"
    write(folder, examples(20))
    shard, index = folder / "00000.array_record", folder / cache_module.INDEX
    if damage == "index":
        index.unlink()
        match = "no prepared data"
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
        match = f"{shard}.*bytes instead of"
    elif damage == "shard gone":
        shard.unlink()
        match = f"{shard}: None bytes"
    elif damage == "array":
        np.save(folder / "lengths.npy", np.zeros(3))
        match = "lengths.npy: missing or short"
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 0}))
        match = "cache version 0"
    with pytest.raises(ValueError, match=match):
        Cache.open(folder)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def fail():
        with CacheWriter(tmp_path / "k", ["a"]) as writer:
            fill(writer, examples(5))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from posttrain.data.cache import CacheWriter
from tests.data.test_cache import examples, fill, report
with CacheWriter(Path(sys.argv[1]) / "k", ["a", "b"]) as writer:
    fill(writer, examples(50))
    print("written", flush=True)
    time.sleep(60)
"""


def test_killed_half_way_it_is_no_cache_and_the_next_one_cleans_up(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert ".tmp." in left[0].name
    for folder in (tmp_path / "k", left[0]):
        with pytest.raises(ValueError, match="no prepared data"):
            Cache.open(folder)
    assert len(write(tmp_path / "k", examples(6))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_what_a_living_process_writes_is_left_alone_and_the_first_to_finish_wins(tmp_path):
    slow, fast = examples(6, 1), examples(8, 2)
    with CacheWriter(tmp_path / "k", ["a", "b"]) as first:
        fill(first, slow)
        write(tmp_path / "k", fast, "fast")
        opened = first.finish("slow", report())
    assert opened.fingerprint == "fast"
    assert all(same(opened[i], fast[i]) for i in range(8))
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def race(folder, seed, gate):
    gate.wait()  # both stand at it
    write(Path(folder) / "k", examples(300, seed), str(seed))


def test_of_two_writers_one_wins_and_its_files_stay_together(tmp_path):
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    both = [context.Process(target=race, args=(str(tmp_path), seed, gate)) for seed in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    cache = Cache.open(tmp_path / "k")
    made = examples(300, int(cache.fingerprint))
    assert all(same(cache[i], made[i]) for i in range(300))
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_the_name_half_written_holds_the_host_and_the_process(tmp_path):
    with CacheWriter(tmp_path / "k", ["a"]):
        assert f".{os.getpid()}." in next(tmp_path.iterdir()).name
