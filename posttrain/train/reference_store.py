"""What the reference said, on disk: per-token log-probs of examples, found by whose they are.

<data.cache_dir>/reference/<key>/ holds those of one cache's examples by one set of weights. It
grows by parts, which are whole or not there at all, and is shared by all runs and hosts.

Shape suffix: N examples of a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

_LANES = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # digits of pi: no structure
_STALE = 3600.0  # seconds after which a part's temporary file has nobody left who writes it


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection of 32-bit words in which every bit moves all others."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _lane_sums(x: jax.Array) -> list[jax.Array]:
    """Wrapping sums, one a lane, over the elements of their bits mixed with their place.

    All lanes in one reduction: several would each hold the mixed bits of the whole array.
    """
    x = x.reshape(1) if x.ndim == 0 else x
    if jnp.issubdtype(x.dtype, jnp.integer):
        bits = x.astype(jnp.uint32)
    else:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # two words name the place: the index along the first dim, and that within the rest
    outer = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0)
    inner = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(1, x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        inner = inner * np.uint32(x.shape[dim]) + index
    mixed = [_mix(bits ^ _mix(inner ^ _mix(outer + np.uint32(key)))) for key in _LANES]

    def add(some: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
        return [a + b for a, b in zip(some, others, strict=True)]

    return jax.lax.reduce(mixed, [np.uint32(0)] * len(_LANES), add, tuple(range(x.ndim)))


@jax.jit
def _all_sums(arrays: list[jax.Array]) -> list[list[jax.Array]]:
    return [_lane_sums(x) for x in arrays]


def fingerprint(params: Any) -> str:
    """32 hex digits of every bit of the parameters, their paths, shapes and dtypes.

    Worked out where they lie, by integer sums that wrap: equal on every mesh and process count,
    and a bit changed or two values swapped give another one. Holds no second copy of the weights.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = [x for _, x in leaves]
    parts = [
        [name, list(x.shape), str(x.dtype), [int(s) for s in lanes]]
        for name, x, lanes in zip(names, arrays, jax.device_get(_all_sums(arrays)), strict=True)
    ]
    return hashlib.blake2b(json.dumps(sorted(parts)).encode(), digest_size=16).hexdigest()


class Store:
    """Log-probs of a cache's examples, as far as they were computed; read from any thread.

    A part is one .npy of uint32 words: the number of its examples, their ids, the float32 log-probs
    of each one's trained tokens, and the CRC-32 of all that. It is written under another name and
    renamed: a part that is there is whole. Of an example in several parts the oldest is read, so
    that what was read once is read again.
    """

    def __init__(self, folder: Path, trained: Int[np.ndarray, " N"]):
        """trained: the number of trained tokens of each example of the cache."""
        self.folder = folder
        self._trained = trained
        self._parts: list[np.ndarray] = []
        self._names: set[str] = set()
        self._part_of = np.full(len(trained), -1, np.int32)
        self._start = np.zeros(len(trained), np.int64)
        self.refresh()

    @property
    def present(self) -> Bool[np.ndarray, " N"]:
        """Which examples it has."""
        return self._part_of >= 0

    def refresh(self) -> None:
        """Looks for parts written since. ValueError for one that is no part of this cache."""
        for file in sorted(self.folder.glob("*.part.npy")):
            if file.name in self._names:
                continue
            self._names.add(file.name)
            try:
                words = np.load(file, mmap_mode="r")
                count = int(words[0])
                ids = words[1 : 1 + count].astype(np.int64)
                ends = 1 + count + np.cumsum(self._trained[ids].astype(np.int64))
                whole = words.dtype == np.uint32 and len(words) == ends[-1] + 1
                whole = whole and zlib.crc32(words[:-1].data) == words[-1]
            except (ValueError, IndexError, EOFError):
                whole = False
            if not whole:
                raise ValueError(f"{file}: damaged; remove it, and it is computed again")
            new = ~self.present[ids]
            self._part_of[ids[new]] = len(self._parts)
            self._start[ids[new]] = (ends - self._trained[ids])[new]
            self._parts.append(words[:].view(np.float32))

    def read(self, ids: Sequence[int]) -> list[np.ndarray]:
        """float32 [trained tokens] of each. ValueError where one was not computed."""
        found = []
        for i in ids:
            if self._part_of[i] < 0:
                raise ValueError(f"{self.folder}: no reference log-probs of example {i}")
            start = self._start[i]
            found.append(self._parts[self._part_of[i]][start : start + self._trained[i]])
        return found

    def begin(self, missing: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """The examples that a pass over the missing ones is laid out for.

        A pass that was cut short has left them here: laid out alike, the rest gets the same rows,
        and the same last digits, as if nothing had happened.
        """
        for _, laid_out in self._passes():
            if np.array_equal(laid_out & ~self.present, missing):
                return laid_out
        self._write(f"{time.time_ns():020d}.{uuid.uuid4().hex[:8]}.pass.npy", missing)
        return missing

    def finish(self) -> None:
        """Forgets the passes that have all they were laid out for."""
        for file, laid_out in self._passes():
            if self.present[laid_out].all():
                file.unlink(missing_ok=True)

    def _passes(self) -> Iterator[tuple[Path, Bool[np.ndarray, " N"]]]:
        """What passes were laid out for; a file that cannot be read is forgotten with its pass."""
        for file in sorted(self.folder.glob("*.pass.npy")):
            try:
                laid_out = np.load(file)
            except FileNotFoundError:
                continue  # another run is done with it
            except (ValueError, EOFError):
                laid_out = np.zeros(0, bool)
            if laid_out.shape == self._part_of.shape and laid_out.dtype == bool:
                yield file, laid_out
            else:
                file.unlink(missing_ok=True)

    def add(self, ids: Sequence[int], logps: Sequence[np.ndarray]) -> None:
        """Writes a part; `refresh` sees it."""
        head = np.array([len(ids), *ids], np.uint32)
        words = np.concatenate([head, np.concatenate(logps).astype(np.float32).view(np.uint32)])
        words = np.append(words, np.uint32(zlib.crc32(words.data)))
        # by time, for the oldest to come first; the rest tells apart what hosts write at once
        self._write(f"{time.time_ns():020d}.{uuid.uuid4().hex[:8]}.part.npy", words)

    def _write(self, name: str, array: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.tmp"):
            try:
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
            except FileNotFoundError:
                pass  # another run removed it, or its writer is done
        temporary = self.folder / f"{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with temporary.open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before the data it names
        except OSError as error:  # numpy says of a full disk how many items it took
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"{self.folder}: the reference's log-probs cannot be written ({error}). Is the "
                "disk full? Make room, or set data.cache_dir to another disk, and start again: "
                "what is there is kept"
            ) from error
        temporary.replace(self.folder / name)
