"""`posttrain demo`: a tiny one goes through all stages; the rates it shows are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.config import ConfigError
from posttrain.data.world_probe import Probe
from posttrain.data.world_runs import stage_config
from posttrain.jobs import chat, demo, rl
from posttrain.report.before_after import (
    Answers,
    as_json,
    examples,
    measure,
    show_examples,
    show_rates,
)
from tests.jobs.runs import Finished

END, USER = 3, 5
TINY = {
    "documents": 3,
    "conversations": 60,
    "hidden_size": 16,
    "layers": 1,
    "rows": 8,
    "base_steps": 3,
    "sft_steps": 2,
    "dpo_steps": 2,
    "dpo_pairs": 4,
    "rl_steps": 2,
    "rl_prompts": 4,
    "rl_answers": 2,
    "probes": 2,
    "max_new_tokens": 4,
}


def _config(folder: Path, **changes: object) -> demo.Config:
    return demo.Config.model_validate({**TINY, "work_dir": folder, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.run(_config(folder)) == 0
    return folder


def test_every_stage_trains_on_the_one_before_and_exports(finished: Path) -> None:
    stages = (("base", 3, "model"), ("sft", 2, "base"), ("dpo", 2, "sft"), ("rl", 2, "dpo"))
    last = {}
    for stage, steps, start in stages:
        trained = Finished(0, finished / stage).metrics
        assert [line["step"] for line in trained] == list(range(1, steps + 1))
        for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
            assert (finished / stage / "export" / name).is_file(), (stage, name)
        resolved = yaml.safe_load((finished / stage / "resolved.yaml").read_text())
        assert Path(resolved["model"]["path"]).relative_to(finished).parts[0] == start
        last[stage] = trained[-1]
    assert "rewards/accuracies" in last["dpo"]
    assert last["rl"]["answers"] == 8


def test_the_longest_sum_leaves_room_for_its_answer(finished: Path) -> None:
    online = rl.Config.model_validate(stage_config(demo.Config(), "rl"))
    tokenizer = Tokenizer.load(finished / "model")
    template = ChatTemplate.load(finished / "model", tokenizer, ChatConfig())
    longest = [{"role": "user", "content": "Work out 9+9-9+9-9+9."}]
    prompt = len(template.generation_prompt(longest))
    worked = "<think>9+9=18 18-9=9 9+9=18 18-9=9 9+9=18</think>18.<|end|>"
    assert prompt + online.sampling.max_new_tokens <= online.round.seq_len
    assert len(tokenizer.encode(worked).ids) <= online.sampling.max_new_tokens


def test_the_report_holds_every_rate_with_its_n(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["max_new_tokens"] == 4
    assert [of["temperature"] for of in report["rates"]] == [0.7, 1.0]
    n = {"stops by itself": 32, "keeps to one turn": 32, "right": 32}
    n |= {"follows system prompt": 20, "follows: thinking": 8}
    n |= {f"follows: {form}": 4 for form in ("capitals", "brief", "sentence")}
    n |= {"works sums out unasked": 8}
    n |= {"preferred: greets": 2, "preferred: only once": 2, "preferred: not with a sum": 8}
    n |= {f"right: {kind}": 8 for kind in ("fact", "second turn", "sum", "sum, thinking")}
    for of in report["rates"]:
        assert [*of["models"]] == ["base, plain text", "base, chat", "SFT", "DPO", "GRPO"]
        for rates in of["models"].values():
            assert {name: rate["n"] for name, rate in rates.items()} == n
            assert all(0 <= rate["value"] <= 1 for rate in rates.values())
    assert len(report["examples"]["answers"]) == 7
    assert {*report["seconds"]} == {"world", "base", "sft", "dpo", "rl", "asking"}


def test_the_trained_model_chats(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model": {"path": str(finished / "rl/export")}, "prompt": "Where does Ugo live?"}
    assert chat.run(chat.Config.model_validate({**keys, "max_new_tokens": 2})) == 0
    assert capsys.readouterr().out.strip()


def test_a_second_start_keeps_what_is_finished(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = [finished / s / "export/model.safetensors" for s in demo.STAGES]
    before = [file.stat().st_mtime_ns for file in weights]
    rates = json.loads((finished / "report.json").read_text())["rates"]
    assert demo.run(_config(finished)) == 0
    assert [file.stat().st_mtime_ns for file in weights] == before
    assert capsys.readouterr().out.count("finished before, kept") == 4
    assert json.loads((finished / "report.json").read_text())["rates"] == rates


def test_a_folder_of_another_demo_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft_lr: 0\.\d+, now 0\.5"):
        demo.run(_config(finished, sft_lr=0.5))


def _probe(kind: str, value: str, form: str, system: str = "") -> Probe:
    messages = [{"role": "system", "content": system}] if system else []
    return Probe(kind, (*messages, {"role": "user", "content": "?"}), value, form)


def test_rates_on_hand_made_replies() -> None:
    probes = [
        _probe("fact", "Rome", "greeting"),
        _probe("fact", "Rome", "capitals", "Answer in capitals."),
        _probe("second turn", "Oslo", "sentence"),
        _probe("sum", "12", "number"),
        _probe("sum, thinking", "7", "thinking", "Think first."),
        _probe("sum, thinking", "7", "thinking", "Think first."),
    ]
    replies = [[10, END], [10, END], [10, 11], [10, USER, END], [END], [10, 11]]
    said = ["Hello! Ugo lives in Rome.", "Rome.", "Ugo lives in Oslo.", "12.", "7.", "8."]
    messages = [{"content": text} for text in said]
    messages[3]["reasoning_content"] = "3+9=12"
    messages[-1]["reasoning_content"] = "3+5=8"
    rates = measure(replies, messages, probes, {END}, {USER})
    assert {name: (m.total, m.count) for name, m in rates.items()} == {
        "stops by itself": (4, 6),
        "keeps to one turn": (3, 6),
        "follows system prompt": (1, 3),  # thought, though wrongly; the other did not think
        "follows: capitals": (0, 1),
        "follows: brief": (0, 0),
        "follows: sentence": (0, 0),
        "follows: thinking": (1, 2),
        "preferred: greets": (1, 1),
        "preferred: only once": (1, 1),
        "preferred: not with a sum": (1, 1),
        "works sums out unasked": (1, 1),
        "right": (5, 6),
        "right: fact": (2, 2),
        "right: second turn": (1, 1),
        "right: sum": (1, 1),
        "right: sum, thinking": (1, 2),
    }


def test_the_tables_show_answers_rates_and_n(capsys: pytest.CaptureFixture[str]) -> None:
    probes = demo.worlds.probes(demo.worlds.make_world(0), each=1)
    replies = [[10, END]] * (len(probes) - 4) + [[10]] * 4
    messages = [{"content": "1."}] * len(probes)
    said = ["and on " * 50, *["1."] * (len(probes) - 1)]
    answers = {"[base]": Answers(said, measure(replies, messages, probes, {END}, set()))}
    found = examples(probes, answers)
    assert len(found) == 7  # four forms of a fact, a second turn, two kinds of sums
    assert found[0]["said"] == {"[base]": said[0]}
    show_examples(found, title="examples")
    show_rates(answers, title="a title", caption="a caption")
    printed = capsys.readouterr().out
    assert "75.0%" in printed
    assert "[base]" in printed  # markup in a reply or name is text, not style
    assert 5 < printed.count("and on") < 20  # a reply that goes on is cut
    (of,) = as_json({0.5: answers})
    assert of["temperature"] == 0.5
    assert of["models"]["[base]"]["stops by itself"] == {"value": 0.75, "n": 16}
