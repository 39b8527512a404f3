"""Blocks through worker processes (or, for little data, threads), in order, with this process
working too where it would wait."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from posttrain.data.tokenise import Job, Result, Task

# A worker takes half a second of a core to import what it needs. Threads cost nothing to start, but
# only encoding leaves the interpreter: they gain up to about four.
BYTES_WORTH_WORKERS = 8 << 20
_MOST_THREADS = 4
_COLLECT_AFTER = 50_000  # allocations between two looks of the garbage collector
_QUEUED = 3  # blocks per worker that are handed out at a time

_job: bytes | Job = b""  # of a worker process: pickled until its first task


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(asked: int | None, data_bytes: int) -> int:
    """Processes beside this one: as asked, else one per further core where the data is worth it
    (else 0: threads)."""
    if asked is not None:
        return asked
    return 0 if data_bytes < BYTES_WORTH_WORKERS else cores() - 1


def run_tasks(job: Job, tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """job.run of every task, in the order of the tasks, with `workers` spawned processes; in
    threads of this process where there are none.

    An error of a task is raised in its place. ValueError: a worker died.
    """
    with _set_for_many_rows():
        if workers:
            yield from _in_processes(job, tasks, workers)
        else:
            yield from _in_threads(job, tasks, min(cores(), _MOST_THREADS))


@contextlib.contextmanager
def _set_for_many_rows() -> Iterator[None]:
    """Settings of the process that suit the work; put back at the end."""
    # each process or thread works on one core; threads of `tokenizers` would only get in its way
    before, thresholds = os.environ.get("TOKENIZERS_PARALLELISM"), gc.get_threshold()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _collect_less_often()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _collect_less_often() -> None:
    """A block makes thousands of objects that die with it: looking for cycles among them every
    700 allocations takes a twentieth of the time."""
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])


def _in_threads(job: Job, tasks: Iterable[Task], threads: int) -> Iterator[Result]:
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(job.run, task))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_processes(job: Job, tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(pickle.dumps(job),),
    )
    try:
        yield from _in_order(job, iter(tasks), pool, _QUEUED * workers)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died (out of memory?): set data.workers lower, or 0"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    job: Job, tasks: Iterator[Task], pool: ProcessPoolExecutor, queued: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    more = True
    while more or waiting:
        while more and sum(not f.done() for f in waiting) < queued and len(waiting) < 4 * queued:
            task = next(tasks, None)
            if task is None:
                more = False
            else:
                waiting.append(pool.submit(_work, task))
        if waiting and waiting[0].done():
            yield waiting.popleft().result()
            continue
        # nothing is ready: do a block here (while workers start, all are done here)
        task = next(tasks, None) if more and len(waiting) < 4 * queued else None
        if task is not None:
            own: Future[Result] = Future()
            own.set_result(job.run(task))
            waiting.append(own)
        elif waiting:
            yield waiting.popleft().result()


def _start(job: bytes) -> None:
    global _job
    _job = job  # read with the first task, so that an error in it reaches the parent
    _collect_less_often()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers: they watch it themselves."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    parent.join()
    os._exit(1)


def _work(task: Task) -> Result:
    global _job
    if isinstance(_job, bytes):
        _job = pickle.loads(_job)
        assert isinstance(_job, Job), "the parent sends a Job"
    return _job.run(task)
