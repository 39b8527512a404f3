"""`posttrain rejection`: what is written, what is said, and that a run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from posttrain import config
from posttrain.cli import main
from posttrain.config import ConfigError
from posttrain.jobs import evaluate, rejection
from posttrain.sampling.request import Completion, OnDone, Request
from posttrain.tasks import TASKS
from posttrain.types import Prompt
from tests.chat.samples import byte_tokenizer
from tests.http_server import said, serving
from tests.jobs.runs import Runner, finish, start_together

SUMS = ["model.path=none", "task.type=arithmetic", "prompts=6", "n=4", "sampling.max_new_tokens=40"]


class Worker:
    """Answers the sums of the task: the first of the n right and worked, the second right, the
    third wrong, the fourth cut off. Dies in the middle of a request, where it is told to."""

    def __init__(self, chat: Any):
        self.chat, self.dies_after, self.answered = chat, -1, 0

    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        assert on_done is not None
        for index, request in enumerate(requests):
            problem = self.chat.tokenizer.decode(list(request.tokens)).split("Work out ")[1]
            value = eval(problem.split(".")[0])
            for which in range(request.n):
                if self.answered == self.dies_after:
                    raise KeyboardInterrupt
                self.answered += 1
                said = [f"I think: {value}", f"{value}", f"{value + 1}", "Well, " * 9][which]
                ids = [*self.chat.tokenizer.encode(said).ids, *self.chat.stop_ids[:1]]
                finish = "stop" if which < 3 else "length"
                ids = ids[: request.sampling.max_new_tokens]
                on_done(index, which, Completion(ids, [0.0] * len(ids), [0.0] * len(ids), finish))
        return []

    def update(self, params: Any) -> None:
        raise AssertionError("nobody has weights to give here")


@pytest.fixture
def worker(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    from posttrain.chat.config import ChatConfig
    from posttrain.chat.template import ChatTemplate
    from posttrain.chat.templates import TEMPLATES

    tokenizer = byte_tokenizer(data_dir, ("<|im_end|>", "<|im_start|>"), "<|im_end|>")
    made = Worker(ChatTemplate(TEMPLATES["chatml"], tokenizer, ChatConfig()))

    def opened(cfg: rejection.Answering, prompts: Sequence[Prompt]) -> rejection.Answerer:
        return rejection.Answerer(made, made.chat, 4096, {})

    monkeypatch.setattr(rejection, "open_answerer", opened)
    monkeypatch.setattr(evaluate, "open_answerer", opened)
    return made


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(out: Path, *keys: str) -> list[dict]:
    assert rejection.run(config.load(rejection.Config, [], [*SUMS, f"out={out}", *keys])) == 0
    return rows_of(out)


def test_the_best_answer_to_each_prompt_is_written_with_where_it_is_from(worker, tmp_path, capsys):
    rows = run(tmp_path / "a.jsonl", "seed=7", "sampling.temperature=0.7")
    prompts = TASKS["arithmetic"]().prompts("train")[:6]
    for row, prompt in zip(rows, prompts, strict=True):
        assert row["messages"] == [
            *prompt.messages,
            {"role": "assistant", "content": f"I think: {prompt.answer}"},
        ]
        assert row["reward"] == 1.0
        own = row["from"]
        assert own["prompt"] == prompt.id
        assert (own["index"], own["rewards"], own["seed"]) == (0, {"correct": 1.0}, 7)
        assert (own["model"], own["task"]) == ("none", "arithmetic")
        assert own["sampling"]["temperature"] == 0.7
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("6 prompts, 24 answers of ")
    assert said[0].endswith("6 cut off")
    figures = dict(line.split()[:2] for line in said if line.startswith("  ") and "." in line)
    assert figures == {
        "reward": "0.5000",
        "rewards/correct": "0.5000",
        "pass@1": "0.5000",
        "pass@2": "0.8333",
        "pass@4": "1.0000",
        "maj@4": "1.0000",
        "best@4": "1.0000",
    }
    assert said[-4:] == [
        "6 rows of 6 of 24 answers; 0 of 6 prompts gave none",
        "        12 not among the best",
        "         6 cut off",
        f"{tmp_path / 'a.jsonl'}: posttrain sft reads it",
    ]


def test_all_right_answers_or_pairs(worker, tmp_path):
    rows = run(tmp_path / "a.jsonl", "keep.most=4", "keep.at_least=1")
    assert len(rows) == 12
    rows = run(tmp_path / "b.jsonl", "keep.type=preference")
    prompts = TASKS["arithmetic"]().prompts("train")[:6]
    for row, prompt in zip(rows, prompts, strict=True):
        assert row["chosen"][0]["content"] == f"I think: {prompt.answer}"
        assert row["rejected"][0]["content"] == str(int(prompt.answer) + 1)


@pytest.mark.parametrize("dies_after", [0, 3, 9, 17])
def test_a_run_that_dies_goes_on_where_it_was(worker, tmp_path, dies_after):
    whole = run(tmp_path / "whole.jsonl")
    out = tmp_path / "a.jsonl"
    worker.answered, worker.dies_after = 0, dies_after
    with pytest.raises(KeyboardInterrupt):
        run(out, "prompts_at_once=2")
    assert len(rows_of(out)) >= dies_after // 8 * 2, "those handed over before are written"
    worker.answered, worker.dies_after = 0, -1
    before = len(rows_of(out))
    assert run(out, "prompts_at_once=4") == whole
    assert worker.answered == 4 * (6 - before), "what is written is not asked again"


def test_a_run_goes_on_with_the_weights_that_it_began_with(worker, tmp_path, monkeypatch):
    opened, weights = rejection.open_answerer, ["a"]

    def with_weights(*given: Any) -> rejection.Answerer:
        return replace(opened(*given), weights=weights[0])

    monkeypatch.setattr(rejection, "open_answerer", with_weights)
    worker.dies_after = 9
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.jsonl", "prompts_at_once=1")
    worker.dies_after, weights[0] = -1, "b"
    with pytest.raises(ConfigError, match="was answered by other weights than none has now"):
        run(tmp_path / "a.jsonl", "prompts_at_once=1")
    weights[0] = "a"
    assert run(tmp_path / "a.jsonl", "prompts_at_once=1") == run(tmp_path / "whole.jsonl")


def test_a_run_that_is_done_only_says_so(worker, tmp_path, capsys):
    first = run(tmp_path / "a.jsonl")
    said = capsys.readouterr().out
    worker.dies_after = worker.answered
    assert run(tmp_path / "a.jsonl") == first
    again = capsys.readouterr().out
    assert again == f"{tmp_path / 'a.jsonl'}: 6 of 6 prompts are done with\n{said}"
    with pytest.raises(ConfigError, match=r"n = 4 \(now 5\)"):
        run(tmp_path / "a.jsonl", "n=5")


def test_evaluation_says_the_same_figures_and_writes_nothing(worker, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config.load(evaluate.Config, [], [*SUMS, "split=train"])
    assert evaluate.run(cfg) == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out.splitlines()
    run(tmp_path / "a.jsonl")
    assert said == capsys.readouterr().out.splitlines()[: len(said)]
    assert [line.split()[0] for line in said[1:]] == [
        *("reward", "rewards/correct", "pass@1", "pass@2", "pass@4", "maj@4", "best@4"),
    ]
    assert main(["evaluate", *SUMS[:-2], "n=1"]) == 0
    said = capsys.readouterr().out
    assert "pass@1" in said, "and of a single answer no vote"
    assert "maj@" not in said


def test_answers_that_would_all_be_the_same_are_refused() -> None:
    for job in (rejection.Config, evaluate.Config):
        out = ["out=x.jsonl"] if job is rejection.Config else []
        with pytest.raises(ConfigError, match=r"temperature is 0: all n=4 answers"):
            config.load(job, [], [*SUMS, *out, "sampling.temperature=0"])
        assert config.load(job, [], [*SUMS, *out, "sampling.temperature=0", "n=1"]).n == 1


def test_other_problems_under_the_same_config_are_noticed(worker, tmp_path):
    problems = tmp_path / "p.jsonl"
    keys = ["task.type=jsonl", f"task.path={problems}", "rewards.correct.type=exact"]
    problems.write_text('{"question": "Work out 1+1.", "answer": "2"}\n')
    run(tmp_path / "a.jsonl", *keys)
    problems.write_text('{"question": "Work out 1+2.", "answer": "3"}\n')
    with pytest.raises(ConfigError, match="prompts' hash = "):
        run(tmp_path / "a.jsonl", *keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["task.type=jsonl", "task.path=x.jsonl"], "name at least one, as {correct: {type"),
        (["task.type=jsonl"], "names no file"),
        (["right=corect"], "no part of rewards is 'corect'; did you mean 'correct'?"),
        (["shaping.total=batch"], "compared with those to the same prompt alone"),
        (["keep.type=best"], "unknown 'best'"),
        (["split=test"], "split"),
    ],
)
def test_a_wrong_config_is_told(keys, said, tmp_path, capsys):
    assert main(["rejection", *SUMS, f"out={tmp_path / 'a.jsonl'}", *keys]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.fixture(scope="module")
def answered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What a tiny random model answers to four prompts, and the keys that make it so."""
    folder = tmp_path_factory.mktemp("rejection")
    rows = [{"question": f"Which is more, {i} or {i * i}?", "answer": str(i)} for i in range(4)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [
        *(f"model.path={tiny_model}", "model.dtype=float32", "mesh.fsdp=1", "n=3", "slots=8"),
        *("task.type=jsonl", f"task.path={folder / 'p.jsonl'}", "sampling.max_new_tokens=12"),
        *("rewards.short.type=length", "rewards.short.unit=characters", "rewards.short.per=10"),
        *("keep.finished=false", "keep.most=2"),
    ]
    out = folder / "one.jsonl"
    cfg = config.load(rejection.Config, [], [*keys, f"out={out}"])
    with pytest.MonkeyPatch.context() as patch:
        some = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: some)
        assert rejection.run(cfg) == 0
    return out, keys


def test_rejection_feeds_sft(answered: tuple[Path, list[str]], run_sft: Runner, tiny_model: Path):
    out, _ = answered
    rows = rows_of(out)
    assert {row["from"]["prompt"] for row in rows} == {f"jsonl/train/{i}" for i in range(4)}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["from"]["prompt"] == second["from"]["prompt"]
        assert first["reward"] >= second["reward"]
    source = [f"data.sources.gsm8k.path={out}", f"model.path={tiny_model}"]
    done = run_sft(*source, "train.steps=2", "batch.examples=4", "export=false", devices=1)
    assert done.code == 0
    assert np.isfinite(done.losses).all()
    assert len(done.losses) == 2


def test_two_processes_write_what_one_does(answered: tuple[Path, list[str]], tmp_path: Path):
    one, keys = answered
    out = tmp_path / "two.jsonl"
    keys = [key for key in keys if key != "mesh.fsdp=1"]
    running = start_together([*keys, "mesh.fsdp=2", f"out={out}"], 2, 1, "rejection")
    assert finish(running) == [0, 0]
    assert rows_of(out) == rows_of(one)


def test_a_server_may_answer(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """No weights are read: the folder is the server's tokenizer and template."""
    byte_tokenizer(data_dir, ("<|im_end|>", "<|im_start|>"), "<|im_end|>").save(tmp_path)

    def answer(number: int, body: dict) -> tuple[int, dict, dict]:
        problem = body["messages"][-1]["content"].removeprefix("Work out ").split(".")[0]
        return 200, said(f"It is {eval(problem)}."), {}

    with serving(answer) as served:
        server = [f"server.base_url={served.base_url}", "server.model=big", "server.api=chat"]
        keys = [*SUMS, *server, f"model.path={tmp_path}", "chat.template=chatml"]
        assert main(["rejection", *keys, f"out={tmp_path / 'a.jsonl'}"]) == 0
        assert "24 of 24 answers came back as text alone" in capsys.readouterr().out
        assert main(["evaluate", *keys, "prompts=3"]) == 0
        assert "correct" in capsys.readouterr().out
    assert len(served.asked) == 6 * 4 + 3 * 4
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row["from"]["model"] for row in rows] == ["big"] * 6
    assert all(row["reward"] == 1 for row in rows)
