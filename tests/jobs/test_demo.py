"""`posttrain demo`: a tiny one goes through both stages; the rates it shows are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config import ConfigError
from posttrain.data.world import Probe
from posttrain.jobs import demo
from posttrain.report.before_after import Answers, as_json, measure, show

END, USER = 3, 5
TINY = {
    "documents": 3,
    "conversations": 60,
    "hidden_size": 16,
    "layers": 1,
    "rows": 8,
    "base_steps": 3,
    "sft_steps": 2,
    "probes": 3,
    "max_new_tokens": 4,
}


def _config(folder: Path, **changes: object) -> demo.Config:
    return demo.Config.model_validate({**TINY, "work_dir": folder, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.run(_config(folder)) == 0
    return folder


def test_both_stages_train_and_export(finished: Path) -> None:
    for stage, steps in (("base", 3), ("sft", 2)):
        lines = (finished / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
        for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
            assert (finished / stage / "export" / name).is_file(), (stage, name)
    resolved = (finished / "sft/resolved.yaml").read_text()
    assert str(finished / "base/export") in resolved  # SFT starts from the base it trained


def test_the_report_holds_every_rate_with_its_n(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert (report["temperature"], report["max_new_tokens"]) == (1.0, 4)
    assert len(report["rates"]) == 3
    for rates in report["rates"].values():
        assert rates["stops by itself"]["n"] == rates["keeps to one turn"]["n"] == 4 * 3
        assert {name: r["n"] for name, r in rates.items() if name.startswith("right: ")} == {
            f"right: {kind}": 3 for kind in ("fact", "second turn", "sum", "sum, thinking")
        }
        assert all(0 <= r["value"] <= 1 for r in rates.values())


def test_a_second_start_keeps_what_is_finished(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = [finished / s / "export/model.safetensors" for s in ("base", "sft")]
    before = [file.stat().st_mtime_ns for file in weights]
    rates = json.loads((finished / "report.json").read_text())["rates"]
    assert demo.run(_config(finished)) == 0
    assert [file.stat().st_mtime_ns for file in weights] == before
    assert capsys.readouterr().out.count("finished before, kept") == 2
    assert json.loads((finished / "report.json").read_text())["rates"] == rates


def test_a_folder_of_another_demo_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft_lr: 0\.\d+, now 0\.5"):
        demo.run(_config(finished, sft_lr=0.5))


def _probe(kind: str, value: str, reply: str) -> Probe:
    return Probe(kind, ({"role": "user", "content": "?"},), value, reply)


def test_rates_on_hand_made_replies() -> None:
    probes = [
        _probe("fact", "Rome", "Ugo lives in Rome."),
        _probe("fact", "Rome", "ROME."),
        _probe("second turn", "Oslo", "Oslo."),
        _probe("sum", "12", "12."),
        _probe("sum, thinking", "7", "7."),
        _probe("sum, thinking", "7", "7."),
    ]
    replies = [[10, END], [10, END], [10, 11], [10, USER, END], [END], [10, 11]]
    said = ["Ugo lives in Rome.", "Rome.", "Oslo. And", "12.", "", "8."]
    rates = measure(replies, said, probes, {END}, {USER})
    assert {name: (m.total, m.count) for name, m in rates.items()} == {
        "stops by itself": (4, 6),
        "keeps to one turn": (3, 6),
        "right: fact": (2, 2),
        "right: second turn": (1, 1),
        "right: sum": (1, 1),
        "right: sum, thinking": (0, 2),
        "right to the letter": (2, 6),
    }


def test_the_table_shows_rates_and_n(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("fact", "second turn", "sum", "sum, thinking")
    probes = [_probe(kind, "1", "1.") for kind in kinds]
    replies, said = [[10, END]] * 3 + [[10]], ["1."] * 4
    answers = {"[base]": Answers(said, measure(replies, said, probes, {END}, set()))}
    show(probes, answers, title="a title", caption="a caption")
    printed = capsys.readouterr().out
    assert "75.0%" in printed
    assert "[base]" in printed  # markup in a reply or name is text, not style
    assert as_json(answers)["[base]"]["stops by itself"] == {"value": 0.75, "n": 4}
