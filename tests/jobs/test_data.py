"""The data job from its command line, on a config of its own and on one of sft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli

GOOD = {"q": "2+2?", "a": "4"}


@pytest.fixture
def write_config(tmp_path, data_dir):
    """Writes the rows and a config that names them; gives the config's path."""
    tokenizer = data_dir / "data" / "tokenizers" / "minimind"

    def write(rows, job="data", extra="", fields="user: q, assistant: a", batch="rows: 2"):
        data = tmp_path / "rows.jsonl"
        data.write_bytes(
            b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
        )
        config = tmp_path / f"{job}.yaml"
        config.write_text(
            f"job: {job}\n"
            f"model: {{path: {tokenizer}}}\n"
            "chat: {template: chatml}\n"
            "data:\n"
            f"  cache_dir: {tmp_path / 'cache'}\n"
            f"  sources: {{sums: {{path: {data}, fields: {{{fields}}}}}}}\n"
            f"batch: {{{batch}}}\n{extra}"
        )
        return str(config)

    return write


def test_prepare_says_what_it_did_and_where(write_config, tmp_path, capsys):
    config = write_config([GOOD] * 3)
    assert cli.main(["data", "prepare", config]) == 0
    said = capsys.readouterr().out
    folder = said.splitlines()[-1]
    assert folder.startswith(str(tmp_path / "cache"))
    report = json.loads(Path(folder, "report.json").read_text())
    assert report["sources"]["sums"]["examples"] == 3
    assert cli.main(["data", "prepare", config, "data.seq_len=8"]) == 1
    assert "no example left of 3 rows" in capsys.readouterr().err


def test_check_lists_the_bad_lines_of_an_sft_config(write_config, tmp_path, capsys):
    config = write_config([GOOD, b"{", {"q": "x", "a": " "}], "sft", "optim: {lr: 1e-3}\n")
    assert cli.main(["data", "check", config]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/rows.jsonl:2: line: bad JSON")
    assert lines[1].startswith(f"{tmp_path}/rows.jsonl:3: a: empty text")
    assert lines[2] == "2 defects in 2 of 3 rows"
    assert cli.main(["data", "check", write_config([GOOD], "sft")]) == 0
    assert capsys.readouterr().out == "1 rows: no defect\n"


def test_prepare_stops_at_bad_rows_with_all_of_them(write_config, capsys):
    assert cli.main(["data", "prepare", write_config([GOOD, {"q": "x"}, b"["])]) == 1
    said = capsys.readouterr().err
    assert "2 of 3 rows are bad" in said
    assert "rows.jsonl:2: a: missing field" in said
    assert "rows.jsonl:3: line: bad JSON" in said


REFUSES = """{% for m in messages %}{% if 'odd' in m.content|string %}
{{ raise_exception('odd rows are not for me') }}{% endif %}{{ m.content }}{% endfor %}"""


def test_what_the_template_refuses_is_a_defect_too(write_config, tmp_path, capsys):
    template = tmp_path / "refuses.jinja"
    template.write_text(REFUSES)
    config = write_config([{"q": "odd", "a": "b"}, GOOD])
    assert cli.main(["data", "check", config, f"chat.template={template}"]) == 1
    said = capsys.readouterr().out
    assert "rows.jsonl:1: row: " in said
    assert "odd rows are not for me" in said
    # the second has no stop token that ends its answer: the rendered text is shown
    assert "rows.jsonl:2: row: " in said
    assert said.rstrip().endswith("2 defects in 2 of 2 rows")
    assert "what the template made of the first row that it refuses:\n2+2?4" in said


def test_preview_shows_the_rows_and_writes_a_page(write_config, tmp_path, capsys):
    page = tmp_path / "page.html"
    config = write_config([GOOD] * 3)
    assert cli.main(["data", "preview", config, f"preview.html={page}", "preview.rows=1"]) == 0
    said = capsys.readouterr().out
    assert "2+2?" in said
    assert f"{tmp_path}/rows.jsonl:2" in page.read_text()


def test_a_model_that_is_not_there_is_said(write_config, capsys):
    config = write_config([GOOD])
    assert cli.main(["data", "check", config, "model.path=./none"]) == 1
    assert "model.path: ./none: no such folder" in capsys.readouterr().err


def test_neither_the_job_nor_its_workers_load_jax(write_config):
    """A device that training holds must not be touched, nor a second of import paid."""
    config = write_config([GOOD])
    program = (
        "import sys; from posttrain import cli; "
        f"assert cli.main(['data', 'preview', {config!r}, 'preview.html=null']) == 0; "
        "import posttrain.data.workers; "
        "heavy = {'jax', 'flax', 'grain', 'torch', 'transformers'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_config_of_a_loss_on_labelled_answers_has_them(
    write_config, tmp_path, capsys, loss
) -> None:
    rows = [{"q": f"{i}+2?", "a": str(i), "ok": i > 0} for i in range(3)]
    fields, batch = "user: q, assistant: a, label: ok", "examples: 2, order: sequential"
    config = write_config(rows, "preference", f"loss: {{type: {loss}}}\n", fields, batch)
    words = [config, f"preview.html={tmp_path / 'page.html'}"]
    assert cli.main(["data", "check", *words]) == 0
    assert cli.main(["data", "prepare", *words]) == 0
    index = json.loads(Path(capsys.readouterr().out.splitlines()[-1], "index.json").read_text())
    twins = loss == "kto"
    assert (index["sides"], index["examples"]) == ((2, 6) if twins else (1, 3))
    assert cli.main(["data", "preview", *words, "preview.rows=2"]) == 0
    said = capsys.readouterr().out
    for name in ("desirable", "undesirable", *["mismatched twin"] * twins):
        assert f"{name}, sums" in said
        assert f"{name}, sums" in (tmp_path / "page.html").read_text()
    assert f"2 answers{' and twins' * twins} in" in said
    config = write_config([*rows, {"q": "x", "a": "y", "ok": "no"}], "preference",
                          f"loss: {{type: {loss}}}\n", fields, batch)  # fmt: skip
    assert cli.main(["data", "check", config]) == 1
    assert 'rows.jsonl:4: ok: wrong type: "no"' in capsys.readouterr().out
    config = write_config(rows, "preference", "loss: {type: ktoo}\n", fields, batch)
    assert cli.main(["data", "check", config]) == 2
    assert "loss.type: unknown 'ktoo'; did you mean 'kto'" in capsys.readouterr().err


def test_a_config_of_preference_has_pairs(write_config, tmp_path, capsys):
    """The same three actions, on the config that training takes; the others' rows are refused."""
    rows = [{"q": "2+2?", "good": "4", "bad": answer} for answer in ("5", "six", "22")]
    fields, batch = "user: q, chosen: good, rejected: bad", "examples: 2, order: sequential"
    extra = "optim: {lr: 1e-6}\nreference: live\n"
    config = write_config(rows, "preference", extra, fields, batch)
    words = [config, f"preview.html={tmp_path / 'page.html'}"]
    assert cli.main(["data", "check", *words]) == 0
    assert capsys.readouterr().out == "3 rows: no defect\n"
    assert cli.main(["data", "prepare", *words]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    index = json.loads(Path(folder, "index.json").read_text())
    assert (index["sides"], index["examples"]) == (2, 6)
    assert cli.main(["data", "preview", *words, "preview.rows=1"]) == 0
    said = capsys.readouterr().out
    for name in ("pair 0, chosen, sums", "pair 0, rejected, sums", "pair 1, rejected, sums"):
        assert name in said
        assert name in (tmp_path / "page.html").read_text()
    assert "pair 2" not in said, "it is in the second step"
    assert cli.main(["data", "check", *words, "kind=samples"]) == 1
    assert "`posttrain preference`" in capsys.readouterr().err
    assert cli.main(["data", "check", write_config([GOOD], "preference")]) == 1
    assert "`posttrain sft`" in capsys.readouterr().err
