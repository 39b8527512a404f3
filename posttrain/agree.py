"""Words between the processes of a run that need no device, and what all of them must agree on.

Two hosts with different configs, code or data train on without an error, and what comes out is
neither's. So each writes down what it has, process 0 compares, and where one has something else,
all leave: the odd one is named, with what it has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config import ConfigError, diff, plain_dict, versions

_OWN = ("distributed", "cache_dir")  # keys, at any depth, in which hosts may differ
_SHOWN = 8  # differences of a process that are told


class Channel:
    """Words that jax's coordinator passes on."""

    def __init__(self, seconds: float, room: str = "doctor"):
        """`seconds`: how long one process waits for another's word. Rooms share no words."""
        self._seconds, self._room = seconds, room
        from jax._src import distributed  # jax has no public name for its key-value store

        self._joined: Any = distributed.global_state
        self._client: Any = self._joined.client

    @property
    def processes(self) -> int:
        return 1 if self._client is None else self._joined.num_processes

    @property
    def process(self) -> int:
        return 0 if self._client is None else self._joined.process_id

    def tell(self, name: str, word: str) -> None:
        """This process's word of that name; a name can be used once."""
        if self._client is not None:
            self._client.key_value_set(f"posttrain/{self._room}/{name}/{self.process}", word)

    def hear(self, name: str, process: int, seconds: float | None = None) -> str | None:
        """Another process's word of that name; None if it does not come in time."""
        wait = int((self._seconds if seconds is None else seconds) * 1000)
        try:
            key = f"posttrain/{self._room}/{name}/{process}"
            return self._client.blocking_key_value_get(key, max(wait, 1))
        except Exception:  # its type is private to jaxlib: late, or the coordinator is gone
            return None

    def everybody(self, name: str, word: str) -> list[str | None]:
        """Tells, and hears all: the words by process, this one's included."""
        self.tell(name, word)
        others = range(self.processes)
        return [word if i == self.process else self.hear(name, i) for i in others]


_talks = itertools.count()  # all processes have them in the same order


def agree_on_run(cfg: Any, seconds: float) -> None:
    """That all have the config (runtime keys too: a mesh is everybody's), the code, the packages.

    Raises what `agree` does.
    """
    if Channel(seconds).processes > 1:
        agree({"config": _shared(plain_dict(cfg)), "code": code(), "versions": versions()}, seconds)


def agree(mine: Mapping[str, Any], seconds: float) -> None:
    """Returns where all processes have the same (JSON), or there is one.

    Raises ConfigError that names the odd ones, or TimeoutError where one says nothing in time.
    """
    channel = Channel(seconds, "agree")
    if channel.processes == 1:
        return
    talk = str(next(_talks))
    channel.tell(talk, json.dumps({"host": socket.gethostname(), "has": mine}))
    if channel.process == 0:
        until = time.monotonic() + seconds
        words = [channel.hear(talk, i, until - time.monotonic()) for i in range(channel.processes)]
        found = verdict([json.loads(word) if word else None for word in words], seconds)
        channel.tell(f"{talk}/verdict", json.dumps(found))
        if found["text"]:  # jax's service ends with this process: the others hear it first
            for i in range(1, channel.processes):
                channel.hear(f"{talk}/heard", i, 5 if words[i] else 0)
            time.sleep(1)
    else:
        word = channel.hear(f"{talk}/verdict", 0, 2 * seconds)
        lost = f"process 0 has not compared what the hosts have within {2 * seconds:g} s"
        found = json.loads(word) if word else {"text": lost, "wrong": False}
        if word and found["text"]:
            channel.tell(f"{talk}/heard", "")
    if found["text"]:
        raise ConfigError(found["text"]) if found["wrong"] else TimeoutError(found["text"])


def verdict(words: list[dict[str, Any] | None], seconds: float) -> dict[str, Any]:
    """{"text": what is told, "" if all is well; "wrong": whether anybody has something else}.

    Right is what most processes have; of as many, what process 0 has.
    """
    given = [word for word in words if word is not None]
    usual = Counter(json.dumps(word["has"], sort_keys=True) for word in given).most_common(1)
    right = json.loads(usual[0][0]) if usual else {}
    odd, silent = [], []
    for i, word in enumerate(words):
        if word is None:
            silent.append(str(i))
            continue
        found = diff(right, word["has"])
        told = [f"{_key(k)} is {has!r}, not {want!r}" for k, (want, has) in found.items()]
        more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        if told:
            odd.append(f"process {i} on {word['host']}: " + "; ".join([*told[:_SHOWN], *more]))
    if odd:
        same = usual[0][1]
        head = f"not all processes of this run have the same ({same} of {len(words)} do):"
        if silent:
            odd.append(f"process {', '.join(silent)} has told nothing")
        todo = "start the same code with the same config and data on every host"
        return {"text": "\n    ".join([head, *odd, todo]), "wrong": True}
    if silent:
        said = f"process {', '.join(silent)} of {len(words)} has not told what it runs"
        return {"text": f"{said} within {seconds:g} s: what became of it?", "wrong": False}
    return {"text": "", "wrong": False}


def code() -> str:
    """A hash of this package's source files, which no uncommitted change escapes."""
    here, found = Path(__file__).parent, hashlib.blake2b(digest_size=8)
    for file in sorted(here.rglob("*.py")):
        found.update(str(file.relative_to(here)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _key(dotted: str) -> str:
    """As the config has it; what is no key of it under its own name."""
    return dotted.removeprefix("config.")


def _shared(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _shared(v) for k, v in tree.items() if k not in _OWN}
    return tree
