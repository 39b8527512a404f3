"""The answers of a round as training takes them: arrays, kept on disk until they are trained on.

What is here is what an interrupted round cannot make again: the policy that the answers were drawn
from, and that old log-probs are by, is gone once the first of the round's steps is made.

Shapes: N answers, n tokens of one answer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from posttrain.checkpoint import is_primary

Tokens = Sequence[np.ndarray]
"""Of each answer, an array [n]."""


@dataclass(frozen=True)
class Answers:
    """N answers, each with its prompt. Of each, per token [n]: int32 tokens, else float32.

    weights: 1 where the token was sampled and is trained, else 0. None: not known, not needed.
    """

    tokens: Tokens
    weights: Tokens
    sampled_logps: Tokens
    advantages: Tokens | None = None
    old_logps: Tokens | None = None
    reference_logps: Tokens | None = None
    old_values: Tokens | None = None
    returns: Tokens | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]"""
        return np.array([len(t) for t in self.tokens], np.int64)

    @property
    def trained(self) -> np.ndarray:
        """int64 [N]: trained tokens of each."""
        return np.array([np.count_nonzero(w) for w in self.weights], np.int64)

    def take(self, ids: Sequence[int]) -> Answers:
        """Those answers, in that order."""
        chosen = {name: [values[i] for i in ids] for name, values in self.known()}
        return Answers(**chosen)

    def known(self) -> list[tuple[str, Tokens]]:
        """(name, values) of the fields that are not None."""
        found = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, values) for name, values in found if values is not None]


@dataclass(frozen=True)
class Round:
    """A round that was sampled, scored and weighed.

    number: from 0. position: of the first prompt that no round has taken yet, among all that come.
    metrics: what is reported of it, with its first step.
    """

    number: int
    position: int
    answers: Answers
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """An .npz file of flat arrays."""
        meta = {"number": self.number, "position": self.position, "metrics": dict(self.metrics)}
        flat: dict[str, Any] = {
            name: np.concatenate(list(values)) for name, values in self.answers.known()
        }
        out = io.BytesIO()
        text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(out, meta=text, lengths=self.answers.lengths, **flat)
        return out.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Round:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        ends = np.cumsum(arrays.pop("lengths"))[:-1]
        answers = Answers(**{name: np.split(flat, ends) for name, flat in arrays.items()})
        return Round(meta["number"], meta["position"], answers, meta["metrics"])


def shared(make: Callable[[], bytes]) -> bytes:
    """What process 0 makes, on every process; make() runs there alone.

    An exception in it is raised on process 0; elsewhere RuntimeError, so that nobody waits.
    """
    if jax.process_count() == 1:
        return make()
    data, error = b"", None
    if is_primary():
        try:
            data = make()
        except Exception as raised:
            error = raised
    size = -1 if error is not None else len(data)
    size = int(multihost_utils.broadcast_one_to_all(np.int64(size)))
    if error is not None:
        raise error
    if not size:
        return b""
    if size < 0:
        raise RuntimeError("process 0 failed: what it says is the reason")
    buffer = np.zeros(size, np.uint8)
    if is_primary():
        buffer[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


def on_first(do: Callable[[], None]) -> None:
    """Process 0 does it, and the others wait. An exception: as of shared()."""

    def done() -> bytes:
        do()
        return b""

    shared(done)


class RoundFiles:
    """<folder>/<number>.npz: rounds that a checkpoint, or the run itself, stands in the middle of.

    Process 0 reads and writes; what it reads all have, and what it cannot write ends all.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.npz"

    def write(self, made: Round, keep: Callable[[int], bool]) -> None:
        """Before it is trained on. Of earlier rounds those that keep(number) names stay."""

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self.folder.glob("*.npz"):
                if file.stem.isdigit() and not keep(int(file.stem)):
                    file.unlink()
            temporary = self._file(made.number).with_suffix(".tmp")
            temporary.write_bytes(made.to_bytes())
            temporary.replace(self._file(made.number))

        on_first(write)

    def read(self, number: int) -> Round | None:
        """None: there is no such file."""

        def data() -> bytes:
            file = self._file(number)
            return file.read_bytes() if file.exists() else b""

        found = shared(data)
        return Round.from_bytes(found) if found else None
