"""prepare: what is in the cache is what the template makes of the rows, whoever does the work."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data import progress, sources, workers
from posttrain.data.cache import Cache
from posttrain.data.config import DataConfig
from posttrain.data.prepare import BadRows, prepare
from posttrain.data.report import Report
from posttrain.types import Conversation, Text
from tests.data.fakes import FakeChat

ROOT = Path(__file__).parents[2]


def turn(i, answer=None):
    answer = f"answer {i} " + "x" * (i % 50) if answer is None else answer
    return {"q": f"question {i}", "a": answer}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, rows=None, **changes):
    """A config of one source `one`, made of these rows."""
    if rows is not None:
        changes["sources"] = {
            "one": {"path": write(tmp_path / "one.jsonl", rows), "fields": {"user": "q"}}
        }
        changes["sources"]["one"]["fields"]["assistant"] = "a"
    settings = {"cache_dir": str(tmp_path / "cache"), "workers": 0, "seq_len": 128, **changes}
    return DataConfig.model_validate(settings)


def expected(rows, chat=None):
    """The examples of turns, without prepare."""
    return [
        (chat or FakeChat()).examples(
            Conversation(
                ({"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]})
            )
        )[0]
        for r in rows
    ]


def assert_same(cache, wanted):
    assert len(cache) == len(wanted)
    for i, example in enumerate(wanted):
        got = cache[i]
        assert got.tokens.tolist() == example.tokens.tolist()
        assert got.loss_weights.tolist() == example.loss_weights.tolist()


def test_the_cache_holds_what_the_template_makes(tmp_path):
    rows = [turn(i) for i in range(40)]
    cache = prepare(config(tmp_path, rows), FakeChat(), quiet=True)
    assert_same(cache, expected(rows))
    assert cache.place(7) == f"{tmp_path}/one.jsonl:8"


def test_sources_keep_their_names_order_and_formats(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    parts = {
        "talk": {"path": write(tmp_path / "a.jsonl", [{"messages": messages}] * 3)},
        "prose": {"path": write(tmp_path / "b.jsonl", [{"text": "once"}] * 2)},
        "asked": {"path": write(tmp_path / "c.jsonl", [{"prompt": "p", "completion": "c"}])},
    }
    cache = prepare(config(tmp_path, sources=parts), FakeChat(), quiet=True)
    assert cache.source_names == ["talk", "prose", "asked"]
    assert cache.source_ids.tolist() == [0, 0, 0, 1, 1, 2]
    wanted = FakeChat().text_example(Text(prompt="p", completion="c"))
    assert cache[5].loss_weights.tolist() == wanted.loss_weights.tolist()
    assert {name: s.examples for name, s in cache.report.sources.items()} == {
        "talk": 3,
        "prose": 2,
        "asked": 1,
    }


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


# ---- too long


@pytest.mark.parametrize(
    ("how", "counted"),
    [
        ("truncate_end", {"truncated": 1, "cut_tokens": 73, "cut_trained": 73, "examples": 3}),
        ("truncate_start", {"truncated": 1, "cut_tokens": 73, "cut_trained": 63, "examples": 3}),
        ("split", {"split": 1, "pieces": 4, "examples": 6}),
        ("drop", {"dropped": {"longer than seq_len": 1}, "examples": 2}),
    ],
)
def test_what_is_too_long_is_counted(tmp_path, how, counted):
    rows = [turn(1, "ok"), {"q": "q" * 10, "a": "a" * 92}, turn(2, "ok")]  # 15, 105, 15 tokens
    cfg = config(tmp_path, rows, too_long=how, seq_len=32)
    cache = prepare(cfg, FakeChat(), quiet=True)
    source = cache.report.sources["one"]
    assert {name: getattr(source, name) for name in counted} == counted
    assert source.rows == 3
    assert cache.lengths.max() <= 32
    assert len(cache) == source.examples == len(cache.lengths)
    assert (source.tokens, source.trained) == (cache.lengths.sum(), cache.trained.sum())
    assert any("one: 1" in line for line in cache.report.losses())


def test_truncated_to_nothing_is_dropped_with_its_reason(tmp_path):
    rows = [turn(1, "ok"), {"q": "q" * 40, "a": "a"}]
    cache = prepare(config(tmp_path, rows, seq_len=32), FakeChat(), quiet=True)
    source = cache.report.sources["one"]
    assert source.dropped == {"no trained token left after truncate_end": 1}
    assert (source.truncated, len(cache)) == (0, 1)
    assert cache.report.losses() == ["one: 1 dropped: no trained token left after truncate_end"]


def test_too_long_can_be_an_error_whatever_becomes_of_bad_rows(tmp_path):
    rows = [turn(1, "ok"), {"q": "q", "a": "a" * 60}, {"q": "q"}, {"q": "q" * 50, "a": "a"}]
    cfg = config(tmp_path, rows, seq_len=32, too_long="error", on_bad_row="skip")
    with pytest.raises(BadRows) as caught:
        prepare(cfg, FakeChat(), quiet=True)
    assert [(d.line, d.found) for d in caught.value.defects] == [
        (2, "64 tokens, over data.seq_len (32)"),
        (4, "54 tokens, over data.seq_len (32)"),
    ]
    assert not list(Path(cfg.cache_dir).glob("*/index.json"))


# ---- bad rows


def test_all_bad_rows_are_reported_at_once_and_nothing_is_cached(tmp_path):
    rows = [turn(i) for i in range(200)]
    rows[3] = {"q": ""}
    rows[50] = {"q": "refuse me", "a": "a"}
    cfg = config(tmp_path, rows)
    with pytest.raises(BadRows) as caught:
        prepare(cfg, FakeChat(), quiet=True)
    file = cfg.sources["one"].path
    assert [(d.file, d.line, d.field) for d in caught.value.defects] == [
        (file, 4, "a"),
        (file, 51, "row"),
    ]
    assert str(caught.value).startswith("2 of 200 rows are bad:\n")
    assert f"{file}:4: a: missing field" in str(caught.value)
    assert "on_bad_row: skip" in str(caught.value)
    assert [path.name for path in Path(cfg.cache_dir).iterdir()] == []


def test_an_error_does_not_grow_with_the_data(tmp_path):
    with pytest.raises(BadRows) as caught:
        prepare(config(tmp_path, [{"q": "x"}] * 500), FakeChat(), quiet=True)
    assert len(caught.value.defects) == 500
    assert len(str(caught.value).splitlines()) < 60
    assert "and 450 more (500 x missing field" in str(caught.value)


def test_skipped_rows_are_counted_and_said(tmp_path):
    rows = [turn(1), {"q": "x"}, turn(2), {"q": "y"}]
    cache = prepare(config(tmp_path, rows, on_bad_row="skip"), FakeChat(), quiet=True)
    assert_same(cache, expected([rows[0], rows[2]]))
    assert cache.report.losses() == ["one: 2 bad rows skipped"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no example left of 0 rows"),
        ([{"q": "x"}], r"no example left of 1 rows \(1 bad\)"),
        ([{"q": "q" * 200, "a": "a"}], "1 dropped: no trained token left"),
    ],
)
def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path, rows, on_bad_row="skip"), FakeChat(), quiet=True)


def test_a_weight_that_is_not_read_is_an_error(tmp_path):
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "v", "weight": 0},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "w"},
    ]
    parts = {"one": {"path": write(tmp_path / "a.jsonl", [{"messages": messages}])}}
    cfg = config(tmp_path, sources=parts)
    with pytest.raises(BadRows, match=r"weight 0.0, which chat.train_on: all does not read"):
        prepare(cfg, FakeChat(cfg=ChatConfig(train_on="all")), quiet=True)
    assert len(prepare(cfg, FakeChat(cfg=ChatConfig(train_on="last")), quiet=True)) == 1
    assert prepare(cfg, FakeChat("weights"), quiet=True).trained.tolist() == [2]


# ---- the key


def test_the_same_data_is_not_prepared_again(tmp_path, capsys):
    class Once(FakeChat):
        def examples_batch(self, conversations):
            raise AssertionError("tokenised again")

    cfg = config(tmp_path, [turn(i) for i in range(20)])
    first = prepare(cfg, FakeChat())
    said = capsys.readouterr().out
    again = prepare(cfg, Once())
    assert again.folder == first.folder
    assert capsys.readouterr().out == said
    moved = tmp_path / "moved.jsonl"
    Path(cfg.sources["one"].path).rename(moved)
    one = cfg.sources["one"].model_copy(update={"path": str(moved), "weight": 2.0, "repeats": 3})
    elsewhere = cfg.model_copy(update={"sources": {"one": one}, "workers": 2, "wait_minutes": 1})
    assert prepare(elsewhere, Once(), quiet=True).folder == first.folder


def test_whatever_changes_the_examples_changes_the_key(tmp_path):
    rows = [turn(i) for i in range(20)]
    cfg = config(tmp_path, rows)
    keys = [prepare(cfg, FakeChat(), quiet=True).fingerprint]
    keys.append(prepare(cfg, FakeChat("other"), quiet=True).fingerprint)
    for change in ({"seq_len": 64}, {"too_long": "drop"}, {"on_bad_row": "skip"}):
        keys.append(prepare(cfg.model_copy(update=change), FakeChat(), quiet=True).fingerprint)
    for change in ({"limit": 3}, {"fields": {"user": "a", "assistant": "q"}}):
        one = {"one": cfg.sources["one"].model_copy(update=change)}
        changed = cfg.model_copy(update={"sources": one})
        keys.append(prepare(changed, FakeChat(), quiet=True).fingerprint)
    renamed = cfg.model_copy(update={"sources": {"two": cfg.sources["one"]}})
    keys.append(prepare(renamed, FakeChat(), quiet=True).fingerprint)
    # the same size at the same place, a moment later
    rows[0]["a"] = rows[0]["a"].replace("answer", "ANSWER")
    keys.append(prepare(config(tmp_path, rows), FakeChat(), quiet=True).fingerprint)
    assert len(set(keys)) == len(keys)


def test_digests_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    from posttrain.data import fingerprint

    cfg = config(tmp_path, [turn(i) for i in range(20)])
    file = cfg.sources["one"].path
    calls = []
    real = sources.digest
    monkeypatch.setattr(fingerprint, "digest", lambda f: calls.append(f) or real(f))
    monkeypatch.setattr(fingerprint, "_SETTLED", 0.0)
    time.sleep(0.05)
    key = fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]})
    assert fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]}) == key
    assert calls == [file]
    stat = os.stat(file)
    Path(file).write_bytes(Path(file).read_bytes().replace(b"question 0", b"QUESTION 0"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times does
    assert fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]}) != key


# ---- hosts and processes


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
    with pytest.raises(ValueError, match="local or mounted folder"):
        prepare(cfg.model_copy(update={"cache_dir": "gs://bucket/x"}), FakeChat())


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
from tests.data.test_prepare import Slow, config, turn
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


# ---- what is shown


def test_the_report_is_shown_and_kept(tmp_path, capsys):
    rows = [turn(i) for i in range(30)] + [{"q": "q", "a": "a" * 200}]
    cfg = config(tmp_path, rows)
    cache = prepare(cfg, FakeChat())
    said = capsys.readouterr().out
    report = Report.load(cache.folder / "report.json")
    assert report == cache.report
    total = report.total
    assert (total.tokens, total.trained) == (cache.lengths.sum(), cache.trained.sum())
    for number in (total.rows, total.tokens, total.trained):
        assert f"{number:,}" in said
    assert "one: 1 examples over 128 tokens cut (truncate_end): 76 tokens lost" in said
    lengths = [len(e.tokens) for e in expected(rows)]
    edges = [0, *report.edges, 10**9]
    assert report.histogram == [
        sum(low < n <= high for n in lengths) for low, high in pairwise(edges)
    ]
    saved = json.loads((cache.folder / "report.json").read_text())
    assert saved["tokens_per_second"] == pytest.approx(total.tokens / report.seconds)


def test_without_a_terminal_progress_is_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    rows = [turn(i) for i in range(100)]
    cfg = config(tmp_path, rows)
    data = Path(cfg.sources["one"].path)
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(data.read_bytes()))
    two = cfg.sources["one"].model_copy(update={"path": str(tmp_path / "two.jsonl.gz")})
    cfg = cfg.model_copy(update={"sources": {**cfg.sources, "two": two}})
    prepare(cfg, FakeChat())
    lines = capsys.readouterr().err.splitlines()
    shares = [int(line.split()[1].rstrip("%")) for line in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "200 examples" in lines[-1]
    assert "tokens/s, 0 s left" in lines[-1]


def test_real_rows_with_a_real_template(tmp_path, data_dir):
    """What is trained of gsm8k is the answer and the stop, through a model's own template."""
    folder = data_dir / "data" / "tokenizers" / "minimind"
    file = data_dir / "data" / "gsm8k" / "train.jsonl"
    tokenizer = Tokenizer.load(folder)
    source = {"path": str(file), "fields": {"user": "question", "assistant": "answer"}}
    cfg = config(tmp_path, sources={"gsm8k": {**source, "limit": 300}}, seq_len=1024, workers=1)
    cache = prepare(cfg, ChatTemplate.load(folder, tokenizer, ChatConfig()), quiet=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()[:300]]
    for i, row in enumerate(rows):
        example = cache[i]
        answer = tokenizer.decode(example.tokens[example.loss_weights > 0].tolist())
        assert answer == row["answer"].strip() + "<|im_end|>"
        assert row["question"] in tokenizer.decode(example.tokens.tolist())
