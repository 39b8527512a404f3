"""Every kind of file gives the same rows, each with its number; what cannot be read is said."""

from __future__ import annotations

import gzip
import json
import random
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem

from posttrain.data import hub, sources
from posttrain.data.config import SourceConfig
from posttrain.data.sources import Block, find_files, read_blocks
from tests.data.rows import read_rows

ROWS = [{"question": f"q{i} é\u2028", "answer": f"a{i}", "n": i} for i in range(700)]
JSONL = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def read(path, **config):
    return list(read_rows(SourceConfig(path=str(path), **config)))


def write_jsonl(path):
    path.write_bytes(JSONL)


def write_gzip(path):
    path.write_bytes(gzip.compress(JSONL))


def write_list(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_object(path):
    path.write_text(json.dumps({"version": 1, "data": ROWS}))


def write_gzip_list(path):
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=300)


def write_array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for line in JSONL.splitlines():
        writer.write(line)
    writer.close()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.ndjson", write_jsonl),
        ("a.jsonl.gz", write_gzip),
        ("a.json", write_list),
        ("a.json.gz", write_gzip_list),
        ("b.json", write_object),
        ("lines.json", write_jsonl),
        ("a.parquet", write_parquet),
        ("a.array_record", write_array_record),
    ],
)
def test_all_kinds_give_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    rows = read(tmp_path / name)
    assert [row.value for row in rows] == ROWS
    assert [row.line for row in rows] == list(range(1, len(ROWS) + 1))
    assert {row.file for row in rows} == {str(tmp_path / name)}
    assert [row.value for row in read(tmp_path / name, limit=301)] == ROWS[:301]


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert [row.value for row in read(tmp_path / "a.txt")] == [{"text": "one\ntwo\n"}]
    (tmp_path / "a.txt").write_bytes(b"one\xff")
    assert "invalid UTF-8 at byte 3" in read(tmp_path / "a.txt")[0].problems[0].found


def test_one_conversation_in_a_json_file_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert [r.value for r in read(tmp_path / "a.json")] == [row]


def test_lines_keep_their_numbers_wherever_the_blocks_end(tmp_path, monkeypatch):
    """Against a split of the whole file; blank lines, CRLF, no last line feed included."""
    shuffle = random.Random(0)
    for size in (1, 3, 7, 64, 1000):
        monkeypatch.setattr(sources, "BLOCK_BYTES", size)
        lines = [
            shuffle.choice([b'{"a": 1}', b'{"b": "\\u00e9 longer than a block"}', b"", b"  ", b"["])
            for _ in range(40)
        ]
        lines.append(b'{"last": 1}')
        for ending in (b"", b"\n", b"\r\n", b"\n\n \n"):
            path = tmp_path / "a.jsonl"
            path.write_bytes(b"\n".join(lines) + ending)
            rows = read(path)
            assert [row.line for row in rows] == list(range(1, 42))
            for row, line in zip(rows, lines, strict=True):
                good = line.startswith(b"{")
                assert row.value == (json.loads(line) if good else None)
                assert bool(row.problems) is not good


def test_limit_counts_over_blocks_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(JSONL)
    cfg = SourceConfig(path=str(tmp_path / "*.jsonl"), limit=710)
    assert [r.value["n"] for r in read_rows(cfg)] == [*range(700), *range(10)]


def test_globs_lists_and_what_matches_nothing(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).write_bytes(b'{"a": 1}\n')
    names = [file[len(str(tmp_path)) + 1 :] for file in find_files(source(tmp_path, "*.jsonl"))]
    assert names == ["a.jsonl", "b.jsonl"]
    assert len(find_files(source(tmp_path, "**/*.jsonl"))) == 3
    assert len(find_files(source(tmp_path, "b.jsonl", "deep/?.jsonl"))) == 2
    for pattern, message in [
        ("none*.jsonl", "no file matches"),
        ("none.jsonl", "no such file"),
        ("deep", "is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_files(source(tmp_path, pattern))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"unknown kind of file; known: .jsonl"):
        find_files(source(tmp_path, "a.csv"))
    (tmp_path / "a.parquet.gz").write_text("")
    with pytest.raises(ValueError, match="unpack it"):
        find_files(source(tmp_path, "a.parquet.gz"))


def source(folder, *names):
    return SourceConfig(path=tuple(str(folder / name) for name in names))


def test_nulls_that_parquet_puts_into_arguments_are_problems(tmp_path):
    calls = [{"a": 1}, {"b": "x"}, {"a": 2}]
    rows = [{"tool_calls": [{"function": {"name": "f", "arguments": call}}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.problems[0].field for row in read(tmp_path / "a.parquet")] == [
        "tool_calls[0].function.arguments"
    ] * 3
    for row in rows:
        function = row["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in read(tmp_path / "a.parquet")] == rows


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read(tmp_path / "a.jsonl")[0].value == {"a": 1}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"a": 1', "bad JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7: 0xff"),
        (b'{"a": 1, "a": 2}', "key given twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_problem_of_that_line(tmp_path, line, found):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    rows = read(tmp_path / "a.jsonl")
    assert [row.value for row in rows] == [{"a": 1}, None, {"b": 2}]
    assert found in rows[1].problems[0].found
    assert rows[1].line == 2


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL)[:2000], "broken gzip"),
        ("a.jsonl.gz", b"not gzip", "broken gzip"),
        ("a.parquet", b"PAR1 not really", "no Parquet file"),
        ("a.array_record", b"x" * 100, "no ArrayRecord file"),
        ("a.json", b"[1, 2", "bad JSON"),
        ("a.json", b"3", "int 3"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of objects: a, b"),
    ],
)
def test_a_broken_file_is_one_problem(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data)
    last = read(tmp_path / name)[-1]
    assert last.value is None
    assert found in last.problems[0].found


def test_blocks_are_small_enough_to_share_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL * 30)
    blocks = list(read_blocks(SourceConfig(path=str(tmp_path / "a.jsonl"))))
    assert len(blocks) == len(JSONL * 30) // sources.BLOCK_BYTES + 1
    assert blocks[-1].read == len(JSONL * 30)
    assert all(isinstance(block, Block) and len(block.payload) < 1 << 18 for block in blocks)


LISTED = [
    "README.md",
    "main/train-00000-of-00002.parquet",
    "main/train-00001-of-00002.parquet",
    "main/test-00000-of-00001.parquet",
    "socratic/train.jsonl",
    "data/validation_x/0.json",
]


@pytest.mark.parametrize(
    ("folder", "split", "chosen"),
    [
        ("main", "train", LISTED[1:3]),
        ("socratic", "train", LISTED[4:5]),
        (None, "test", LISTED[3:4]),
        (None, "validation_x", LISTED[5:]),
    ],
)
def test_the_files_of_a_split(folder, split, chosen):
    assert hub.choose(LISTED, tuple(sources.KINDS), folder, split, "hf:a/b") == chosen


def test_what_the_hub_has_not_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"several places.*main, socratic"):
        hub.choose(LISTED, tuple(sources.KINDS), None, "train", "hf:a/b")
    with pytest.raises(ValueError, match="no files of split 'dev'; files it could read: data/val"):
        hub.choose(LISTED, tuple(sources.KINDS), None, "dev", "hf:a/b")
    with pytest.raises(ValueError, match="write hf:owner/name"):
        find_files(SourceConfig(path="hf:gsm8k"))


def test_a_split_is_downloaded_file_by_file(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def list_files(self, repo, *, repo_type, revision):
        asked.append((repo, repo_type, revision))
        return LISTED

    def get(repo, file, *, repo_type, revision):
        return f"{tmp_path}/{repo}/{file}"

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    files = find_files(SourceConfig(path="hf:openai/gsm8k/main@v1:train"))
    assert files == [f"{tmp_path}/openai/gsm8k/{file}" for file in LISTED[1:3]]
    assert asked == [("openai/gsm8k", "dataset", "v1")]


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    with pytest.raises(ValueError, match=r"hf:a/b: the hub is out of reach .*path: folder"):
        find_files(SourceConfig(path="hf:a/b"))


class Bucket(MemoryFileSystem):
    """Object storage as epath sees it, in memory."""

    store: ClassVar[dict] = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


def test_a_bucket_is_read_like_a_folder(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: bucket)
    bucket.makedirs("/bucket/deep")
    for name in ("b.jsonl", "a.jsonl"):
        bucket.pipe(f"/bucket/deep/{name}", b'{"name": "%s"}\n' % name.encode())
    rows = list(read_rows(SourceConfig(path="gs://bucket/*/?.jsonl")))
    assert [row.value["name"] for row in rows] == ["a.jsonl", "b.jsonl"]
    assert rows[0].file == "gs://bucket/deep/a.jsonl"
    assert sources.size_of(["gs://bucket/deep/a.jsonl"]) == 20
    with pytest.raises(ValueError, match=r"gs://bucket/c\.jsonl: no such file"):
        find_files(SourceConfig(path="gs://bucket/c.jsonl"))


def test_a_storage_that_is_not_installed_is_said(monkeypatch):
    def missing(name, **options):
        raise ImportError(f"please install the {name} client")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/a.jsonl: please install the s3 client"):
        find_files(SourceConfig(path="s3://bucket/a.jsonl"))
