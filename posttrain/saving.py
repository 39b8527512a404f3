"""Saves that fail: tried again, then the end of the run, with the reason.

A save copies the arrays and goes on in the background. That it failed is known at the next one,
which is then waited for, as is one that fails at once: with `retries` attempts more, after 2, 4, 8
.. seconds. Of several processes all do the same, since they hear of each other's errors.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}


class Saver:
    """Orbax's checkpointer, with attempts. open_ makes one, and removes what is half written."""

    def __init__(self, folder: Path, open_: Callable[[], Any], retries: int):
        self._folder, self._open, self._retries = folder, open_, retries
        self.orbax = open_()
        self._writing: Any = None  # what orbax promised

    def save(self, step: int, state: Any, record: dict[str, Any] | None, *, wait: bool) -> None:
        """Does nothing where the step is there. record: its metadata. wait: until it is written.

        Raises OSError when no attempt is left; its errno is ENOSPC or EDQUOT where that is why.
        """
        error, newest = None, self.orbax.latest
        if newest is None or newest.step != step:
            error = self._written() or self._begun(step, state, record)
        if wait and error is None:
            error = self._written()
        for attempt in range(self._retries):
            if error is None:
                return
            pause = 2 ** (attempt + 1)
            if jax.process_index() == 0:
                said = f"{reason(error)}: saving step {step} again in {pause} s"
                print(f"checkpoint: {said}", file=sys.stderr, flush=True)
            time.sleep(pause)
            error = self._begun(step, state, record) or self._written()
        if error is not None:
            raise self._hopeless(step, error)

    def settle(self) -> None:
        """Waits for what is being written; where that fails, it is told, and not tried again."""
        if (error := self._written()) is not None and jax.process_index() == 0:
            print(f"checkpoint: not saved: {reason(error)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Waits for what is being written; says what became of it, where nobody can mend it."""
        try:
            self.orbax.close()
        except Exception as error:
            print(f"checkpoint: not saved: {reason(error)}", file=sys.stderr, flush=True)

    def _begun(self, step: int, state: Any, record: dict[str, Any] | None) -> Exception | None:
        error, newest = None, self.orbax.latest
        if newest is not None and newest.step == step:
            return self._agreed(None)  # what failed came after it: the removal of an older one
        try:
            self._writing = self.orbax.save_async(step, state, force=True, custom_metadata=record)
        except Exception as raised:  # orbax, tensorstore and the system each have their own
            error = raised
        return self._agreed(error)

    def _written(self) -> Exception | None:
        """Waits for what is being written; why it is not there."""
        error, promise = None, self._writing
        if promise is None:
            return None
        try:
            promise.result()
        except Exception as raised:
            error = raised
        self._writing = None
        return self._agreed(error)

    def _agreed(self, error: Exception | None) -> Exception | None:
        """The error, or the news that another process had one; after it, all begin anew."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            failed = multihost_utils.process_allgather(np.array([error is not None])).reshape(-1)
            if error is None and failed.any():
                error = OSError(f"process {int(failed.argmax())} could not save")
        if error is not None:
            self._writing = None
            with suppress(Exception):  # what it says was said
                self.orbax.close()
            self.orbax = self._open()
        return error

    def _hopeless(self, step: int, error: Exception) -> OSError:
        newest, number = self.orbax.latest, full_disk(error)
        text = f"step {step} could not be saved in {self._folder}: {reason(error)}"
        with suppress(OSError):
            free = shutil.disk_usage(self._folder).free / 2**20
            text += f"; {free:,.0f} MiB are free there" if number else ""
        stands = "there is no checkpoint" if newest is None else f"checkpoint {newest.step} stands"
        text += f"; given up after {1 + self._retries} attempts, {stands}"
        said = OSError(number, text) if number else OSError(text)
        said.__cause__ = error
        return said


def full_disk(error: BaseException | None) -> int:
    """ENOSPC or EDQUOT, if that is what an error or one of its causes says; else 0.

    tensorstore has no type of its own for it: its message has the system's number.
    """
    while error is not None:
        for number in _FULL:
            named = f"os_error_code='{number}'" in str(error) or os.strerror(number) in str(error)
            if named or (isinstance(error, OSError) and error.errno == number):
                return number
        error = error.__cause__ or error.__context__
    return 0


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    number = full_disk(error)
    return f"{_FULL[number]} ({first_line(error)})" if number else first_line(error)


def first_line(error: Exception) -> str:
    """The type and the first line of what an error says."""
    text = str(error).strip() or "?"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
