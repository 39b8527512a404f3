"""Files in, rows out. A file is read in blocks that are cheap to hand to another process: raw bytes
of JSONL lines, Arrow record batches, ArrayRecord records. Whoever has the block parses it.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from posttrain.data.config import SourceConfig
from posttrain.data.hub import HF_PREFIX, download
from posttrain.data.rows import Problem, Row, null_arguments, show

BLOCK_BYTES = 1 << 17
BLOCK_ROWS = 256
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".txt": "text",
}


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file. `first` is the number of the first one, from 1.

    kind says what the payload is: "lines" bytes of JSONL, "arrow" an IPC stream, "records" a list
    of JSON bytes, "values" a list of objects, "problem" a Problem with the whole file.
    """

    file: str
    first: int
    count: int
    kind: str
    payload: Any
    read: int  # bytes of the file (as stored) read so far

    def rows(self) -> Iterator[Row]:
        """The parsed rows; one that cannot be parsed comes with its problem."""
        if self.kind == "problem":
            yield Row(self.file, self.first, None, (self.payload,))
        elif self.kind == "values":
            for i, value in enumerate(self.payload):
                yield Row(self.file, self.first + i, value)
        elif self.kind == "arrow":
            import pyarrow as pa

            table = pa.ipc.open_stream(self.payload).read_all()
            structs = "arguments: struct" in str(table.schema)
            for i, value in enumerate(table.to_pylist()):
                problem = null_arguments(value) if structs else None
                yield Row(self.file, self.first + i, value, (problem,) if problem else ())
        else:
            lines = self.payload.split(b"\n") if self.kind == "lines" else self.payload
            if self.kind == "lines" and lines and not lines[-1]:
                lines.pop()  # what follows the last line feed is not a line
            for i, line in enumerate(lines):
                yield parse_line(line, self.file, self.first + i)

    def head(self, count: int) -> Block:
        """The block's first `count` rows."""
        if count >= self.count:
            return self
        payload = self.payload
        if self.kind == "lines":
            payload = b"".join(payload.splitlines(keepends=True)[:count])
        elif self.kind == "arrow":
            import pyarrow as pa

            payload = _ipc(pa.ipc.open_stream(payload).read_all().slice(0, count))
        elif self.kind != "problem":
            payload = payload[:count]
        return replace(self, count=count, payload=payload)


def parse_line(line: bytes, file: str, number: int) -> Row:
    """One JSON text as a Row; bytes that are no UTF-8 and text that is no JSON as problems."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"invalid UTF-8 at byte {error.start}: 0x{line[error.start]:02x}"
        problem = Problem("line", found, "save the file as UTF-8, or repair the line")
        return Row(file, number, None, (problem,))
    if not text.strip():
        problem = Problem("line", "blank line", "remove it")
        return Row(file, number, None, (problem,))
    try:
        return Row(file, number, _DECODER.decode(text))
    except _DuplicateKey as error:
        problem = Problem(str(error.args[0]), "key given twice in one object", "keep one of them")
    except RecursionError:
        problem = Problem("line", "bad JSON: nested too deeply", "flatten the row")
    except ValueError as error:
        problem = Problem("line", f"bad JSON: {error}", "write one JSON object per line")
    return Row(file, number, None, (problem,))


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def find_files(cfg: SourceConfig) -> list[str]:
    """The source's files: globs expanded and sorted, hub data sets downloaded.

    Raises ValueError for a pattern that nothing matches, a folder, or a suffix nothing reads.
    """
    files: list[str] = []
    for pattern in cfg.paths:
        try:
            found = _find(pattern)
        except (ImportError, RuntimeError) as error:  # no client for gs:// or s3://; no home for ~
            raise ValueError(f"{pattern}: {error}") from error
        if not found:
            raise ValueError(f"{pattern}: no file matches")
        files += found
    for file in files:
        kind_of(file)
    return files


def _find(pattern: str) -> list[str]:
    from etils import epath

    if pattern.startswith(HF_PREFIX):
        return download(pattern, tuple(KINDS))
    if any(c in pattern for c in "*?["):
        return _expand(pattern)
    path = epath.Path(pattern).expanduser()
    if not path.exists():
        raise ValueError(f"{pattern}: no such file")
    if path.is_dir():
        raise ValueError(f"{pattern}: is a folder; name its files, as in {pattern}/*.jsonl")
    return [str(path)]


def _expand(pattern: str) -> list[str]:
    from etils import epath

    if "://" not in pattern:
        return sorted(glob.glob(str(epath.Path(pattern).expanduser()), recursive=True))
    parts = pattern.split("/")
    wild = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    folder = epath.Path("/".join(parts[:wild]))
    return sorted(str(path) for path in folder.glob("/".join(parts[wild:])))


def kind_of(file: str) -> str:
    """The entry of KINDS that reads the file. ValueError: none does."""
    name = file.lower().removesuffix(".gz")
    for suffix, kind in KINDS.items():
        if name.endswith(suffix):
            if file.lower().endswith(".gz") and kind not in ("lines", "json", "text"):
                raise ValueError(f"{file}: .gz of {suffix} is not read; unpack it")
            return kind
    known = ", ".join(KINDS)
    raise ValueError(f"{file}: unknown kind of file; known: {known} (and .jsonl.gz, .json.gz)")


def size_of(files: list[str]) -> int:
    """Bytes of the files as stored."""
    from etils import epath

    return sum(epath.Path(file).stat().length for file in files)


def digest(file: str) -> str:
    """BLAKE2b of the file's bytes as stored."""
    from etils import epath

    state = hashlib.blake2b(digest_size=16)
    with epath.Path(file).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def read_blocks(cfg: SourceConfig, files: list[str] | None = None) -> Iterator[Block]:
    """The source's blocks in the order of its files, up to `limit` rows."""
    left = cfg.limit
    for file in find_files(cfg) if files is None else files:
        for block in _read_file(file):
            if left is not None:
                block = block.head(left)
                left -= block.count
            yield block
            if left == 0:
                return


def _read_file(file: str) -> Iterator[Block]:
    from etils import epath

    kind = kind_of(file)
    if kind == "array_record":
        yield from _array_record(file)
        return
    with epath.Path(file).open("rb") as raw:
        try:
            if kind == "parquet":
                yield from _parquet(file, raw)
                return
            stream = gzip.GzipFile(fileobj=raw) if file.lower().endswith(".gz") else raw
            if kind == "lines":
                yield from _lines(file, stream, raw)
            else:
                yield from _whole(file, kind, stream.read())
        except (EOFError, gzip.BadGzipFile) as error:
            yield _broken(file, f"broken gzip: {error}", "compress the file again")


def _lines(file: str, stream: Any, raw: Any) -> Iterator[Block]:
    """Blocks that end with a line; blank lines at the end of the file belong to no block. What the
    last chunk leaves over, a line without an end perhaps, goes into the block before it."""
    rest, first = b"", 1
    last: Block | None = None
    while chunk := stream.read(BLOCK_BYTES):
        if first == 1 and not rest:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        rest += chunk
        # cut after the last line that is not blank and is whole; the blank ones may be the end
        cut = rest.find(b"\n", len(rest[: rest.rfind(b"\n") + 1].rstrip())) + 1
        if cut and (head := rest[:cut]).strip():
            count = head.count(b"\n")
            if last is not None:
                yield last
            last = Block(file, first, count, "lines", head, raw.tell())
            rest, first = rest[cut:], first + count
    if rest.strip():
        rest = rest.rstrip(b"\r\n \t") + b"\n"
        count, before = rest.count(b"\n"), b"" if last is None else last.payload
        last = last or Block(file, first, 0, "lines", b"", 0)
        last = replace(last, count=last.count + count, payload=before + rest, read=raw.tell())
    if last is not None:
        yield last


def _whole(file: str, kind: str, data: bytes) -> Iterator[Block]:
    """A .json or .txt file. JSON that is one object after another is read as JSONL."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if kind == "text":
        try:
            yield Block(file, 1, 1, "values", [{"text": data.decode("utf-8")}], len(data))
        except UnicodeDecodeError as error:
            found = f"invalid UTF-8 at byte {error.start}: 0x{data[error.start]:02x}"
            yield _broken(file, found, "save the file as UTF-8")
        return
    row = parse_line(data, file, 1)
    if row.problems:
        first = data.lstrip().split(b"\n", 1)[0]
        if first.startswith(b"{") and not parse_line(first, file, 1).problems:
            yield from _lines(file, io.BytesIO(data), io.BytesIO())
        else:
            yield _broken(file, row.problems[0].found, "write one list of objects")
        return
    rows = row.value
    if isinstance(rows, dict):
        lists = [k for k, v in rows.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if any({"role", "from"} & rows[key][0].keys() for key in lists):
            rows = [rows]  # the file is one conversation
        elif len(lists) > 1:
            found = f"an object with several lists of objects: {', '.join(lists)}"
            yield _broken(file, found, "keep the one with the rows")
            return
        else:
            rows = rows[lists[0]] if lists else [rows]
    if not isinstance(rows, list):
        yield _broken(file, show(rows), "write a list of objects, or an object with one")
        return
    for at in range(0, len(rows), BLOCK_ROWS):
        part = rows[at : at + BLOCK_ROWS]
        yield Block(file, at + 1, len(part), "values", part, len(data))


def _broken(file: str, found: str, fix: str) -> Block:
    return Block(file, 1, 1, "problem", Problem("file", found, fix), 0)


def _ipc(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    return sink.getvalue().to_pybytes()


def _parquet(file: str, raw: IO[bytes]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw)
    except pa.ArrowInvalid as error:
        yield _broken(file, f"no Parquet file: {error}", "write it again")
        return
    first = 1
    for batch in table.iter_batches(batch_size=BLOCK_ROWS):
        yield Block(file, first, batch.num_rows, "arrow", _ipc(batch), raw.tell())
        first += batch.num_rows


def _array_record(file: str) -> Iterator[Block]:
    from array_record.python.array_record_module import ArrayRecordReader
    from etils import epath

    if "://" in file:
        raise ValueError(f"{file}: ArrayRecord is read from local files; copy it here first")
    size = epath.Path(file).stat().length
    reader = ArrayRecordReader(file)
    total = reader.num_records()
    if not reader.ok() or (total == 0 and size > 0):
        # nor can such a reader be closed
        yield _broken(file, "no ArrayRecord file, or cut short", "write it again")
        return
    for at in range(0, total, BLOCK_ROWS):
        end = min(at + BLOCK_ROWS, total)
        records = reader.read(at, end)
        yield Block(file, at + 1, end - at, "records", records, size * end // total)
    reader.close()
