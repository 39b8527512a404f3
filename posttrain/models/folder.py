"""A model folder on disk: where it is, and its *.safetensors read and written tensor by tensor."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from posttrain.config import ConfigError
from posttrain.models.config_json import read_json
from posttrain.models.keys import Slices

_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def local_folder(path: str, *, weights: bool = True) -> Path:
    """The folder of a model: `path` itself, or a download where it is a hub id (owner/name).

    weights: False leaves them out of the download. Raises ConfigError where it is neither,
    ValueError where the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ConfigError(f"model path {path!r}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", *["*.safetensors"] * weights]
    copies = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=copies))
    except Exception as e:
        raise ValueError(
            f"model path {path!r}: no such folder here, and the hub did not give it: "
            f"{type(e).__name__}: {e}"
        ) from e


_READ = {name: dtype for dtype, name in _DTYPES.items()} | {"F64": np.dtype(np.float64)}


class _File:
    """A *.safetensors file: its header, checked, and its bytes, mapped.

    What is read is copied and its pages are let go, which would count as this process's memory
    until all of the file was in it. Raises ValueError where the file is cut short or another.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            self._begin = 8 + length
            try:
                header = json.loads(file.read(length) if self._begin <= size else b"")
                self.tensors = {k: v for k, v in header.items() if k != "__metadata__"}
                fits = all(map(self._fits, self.tensors.values(), [size] * len(self.tensors)))
            except (ValueError, AttributeError, KeyError, TypeError):
                fits = False
            if not fits:
                raise ValueError(
                    f"{path}: not a whole safetensors file ({size:,} bytes): copy it again"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _fits(self, tensor: dict[str, Any], size: int) -> bool:
        begin, end = tensor["data_offsets"]
        dtype = _READ.get(tensor["dtype"])
        whole = math.prod(tensor["shape"]) * dtype.itemsize if dtype else end - begin
        return 0 <= begin <= end <= size - self._begin and whole == end - begin

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A copy of a part of a tensor."""
        tensor = self.tensors[name]
        dtype, shape = _READ[tensor["dtype"]], tensor["shape"]
        begin = self._begin + tensor["data_offsets"][0]
        whole = np.frombuffer(self._map, dtype, math.prod(shape), begin).reshape(shape)
        piece = whole[slices].copy()
        row = whole[0].nbytes if shape[0] else 0
        first, last, _ = slices[0].indices(shape[0])
        page = (begin + first * row) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, page, begin + last * row - page)
        return piece


# Of a model that sees images: what its text model's names begin with, and what they are here.
_TEXT = {"model.language_model.": "model.", "language_model.": ""}
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


class Tensors:
    """The tensors of a folder's *.safetensors, by name; reads slices, holds files open.

    images: of a model that sees images, its text model's, named as if they were all. at: what its
    names begin with.
    """

    def __init__(self, folder: Path, *, images: bool = False, at: str = ""):
        self.folder = folder
        index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if one.is_file():
            files = [one]
        elif index.is_file():
            names = set(read_json(index).get("weight_map", {}).values())
            files = [folder / Path(name).name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
            hint = (
                f"{pickles[0]} is a pickle, which can run code when it is read: save the model "
                "with safe_serialization=True first"
                if pickles
                else "for a random model from config.json alone set model.random_init=true"
            )
            raise ValueError(f"{folder}: no *.safetensors; {hint}")
        self._where: dict[str, tuple[_File, str]] = {}  # name -> (file, its name there)
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index}: names {file.name}, which is not in the folder")
            opened = _File(file)
            for stored in opened.tensors:
                if not images:
                    self._where[stored] = opened, stored
                elif not _IMAGES.match(stored):
                    prefix = next((p for p in _TEXT if stored.startswith(at + p)), None)
                    text = prefix and at + _TEXT[prefix] + stored.removeprefix(at + prefix)
                    self._where[text or stored] = opened, stored

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it (F32, BF16, ...)."""
        return self._entry(name)["dtype"]

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A part of one tensor."""
        file, stored = self._where[name]
        return file.read(stored, slices)

    def _entry(self, name: str) -> dict[str, Any]:
        file, stored = self._where[name]
        return file.tensors[stored]

    def mean(self, name: str, count: int, columns: slice, rows: int = 4096) -> np.ndarray:
        """The mean of a table's first `count` rows, float64; `rows` of them in memory at a time."""
        total = np.zeros(columns.stop - columns.start)
        for i in range(0, count, rows):
            cut = slice(i, min(i + rows, count))
            total += self.read(name, (cut, columns)).sum(0, dtype=np.float64)
        return total / count

    def equal(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors hold the same values; `rows` of each in memory at a time."""
        if self.shape(one) != self.shape(other):
            return False
        n = self.shape(one)[0]
        cuts = [(slice(i, min(i + rows, n)),) for i in range(0, n, rows)]
        return all(np.array_equal(self.read(one, cut), self.read(other, cut)) for cut in cuts)


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes safetensors files block by block, in any order: headers first, then rows in place.

    Everything is planned before: the files' sizes, and so their headers and names, follow from the
    shapes. Files carry the end `.partial` until finish() renames them, and removes the weights
    that an earlier export left in the folder. Used as a context, it removes its own where an error
    (a full disk) ends it before.
    """

    def __init__(self, folder: Path, planned: Sequence[Planned], shard_bytes: int):
        self._folder = folder
        groups: list[list[Planned]] = [[]]
        for tensor in planned:
            size = sum(t.bytes for t in groups[-1])
            if groups[-1] and size + tensor.bytes > shard_bytes:
                groups.append([])
            groups[-1].append(tensor)
        n = len(groups)
        self._names = (
            ["model.safetensors"]
            if n == 1
            else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        )
        for left in folder.glob("model*.safetensors*.partial"):  # of an export that was killed
            left.unlink()
        self._files: list[IO[bytes]] = []
        # tensor -> (its number of a file, where its bytes begin in it, what it is)
        self._places: dict[str, tuple[int, int, Planned]] = {}
        self._left = {tensor.name: tensor.bytes for tensor in planned}
        for file, group in enumerate(groups):
            self._begin(file, group)

    def _begin(self, file: int, group: Sequence[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in group:
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.bytes],
            }
            offset += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        opened = (self._folder / (self._names[file] + ".partial")).open("wb")
        opened.write(len(text).to_bytes(8, "little") + text)
        self._files.append(opened)
        for tensor in group:
            begin = 8 + len(text) + header[tensor.name]["data_offsets"][0]
            self._places[tensor.name] = file, begin, tensor

    def write(self, name: str, first: int, rows: np.ndarray) -> None:
        """Rows of a tensor, from its row `first` on."""
        file, begin, tensor = self._places[name]
        assert (rows.shape[1:], rows.dtype) == (tensor.shape[1:], tensor.dtype), name
        row = tensor.bytes // tensor.shape[0]
        self._files[file].seek(begin + first * row)
        self._files[file].write(np.ascontiguousarray(rows).view(np.uint8).data)
        self._left[name] -= rows.nbytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if kind is None:
            return
        for file in self._files:
            with suppress(OSError):  # what it still held is not wanted
                file.close()
        for name in self._names:
            (self._folder / (name + ".partial")).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk
            raise OSError(error.errno, error.strerror, str(self._folder)) from error

    def finish(self) -> None:
        """All are written: gives the files their names, and an index where they are several.

        A model is in the folder until the other stands beside it whole: one file comes before an
        index where both are there. Only of files that have the same names is there none meanwhile,
        rather than some of each.
        """
        assert not any(self._left.values()), "tensors of the plan were not written, or twice"
        for file in self._files:
            file.close()
        index, new = self._folder / "model.safetensors.index.json", set(self._names)
        if len(new) > 1:
            for name in new:
                (self._folder / name).unlink(missing_ok=True)
        for name in self._names:
            (self._folder / (name + ".partial")).replace(self._folder / name)
        if len(new) > 1:
            text = {
                "metadata": {"total_size": sum(t.bytes for _, _, t in self._places.values())},
                "weight_map": {name: self._names[at] for name, (at, _, _) in self._places.items()},
            }
            partial = index.with_name(index.name + ".partial")
            partial.write_text(json.dumps(text, indent=2) + "\n")
            partial.replace(index)
            new.add(index.name)
        for old in self._folder.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()
