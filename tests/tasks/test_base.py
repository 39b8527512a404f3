"""Tasks in general: ids, splits, laziness, and every defect of a file at once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Config, ConfigError, load, semantic
from posttrain.data.prepare import BadRows
from posttrain.data.world import is_held_out as held_out_of_the_world
from posttrain.tasks import TASKS
from posttrain.tasks.base import Prompts, is_held_out
from posttrain.types import Prompt


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict]:
    return [{"question": f"{i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(count)]


def test_prompts_are_made_when_they_are_looked_at():
    made = []

    def make(i: int) -> Prompt:
        made.append(i)
        return Prompt(str(i), ())

    prompts = Prompts(10, make)
    assert len(prompts) == 10
    assert not made
    assert (prompts[3].id, prompts[-1].id, prompts[2:8:3][1].id) == ("3", "9", "5")
    assert made == [3, 9, 5]
    assert [p.id for p in prompts[8:]] == ["8", "9"]
    with pytest.raises(IndexError):
        prompts[10]


def test_the_split_by_hash_is_that_of_the_generated_world():
    keys = [f"Work out {i}+1." for i in range(500)]
    assert [is_held_out(k, 8) for k in keys] == [held_out_of_the_world(k) for k in keys]
    assert 0.15 < sum(is_held_out(str(i), 5) for i in range(2000)) / 2000 < 0.25


def test_ids_are_numbers_of_rows_whatever_the_split(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(100))
    whole = TASKS["gsm8k"](path=path).prompts("train")
    assert [p.id for p in whole] == [f"gsm8k/train/{i}" for i in range(100)]
    task = TASKS["gsm8k"](path=path, held_out_one_in=4)
    train, held_out = task.prompts("train"), task.prompts("held_out")
    numbers = [{p.id.rpartition("/")[2] for p in split} for split in (train, held_out)]
    assert numbers[0] | numbers[1] == {str(i) for i in range(100)}
    assert not numbers[0] & numbers[1]
    assert len(held_out) == sum(is_held_out(row["question"], 4) for row in sums(100))
    assert held_out[0].id.startswith("gsm8k/held_out/")
    limited = TASKS["gsm8k"](path=path, held_out_one_in=4, limit=3)
    assert [p.id for p in limited.prompts("train")] == [p.id for p in train[:3]]


def test_files_of_their_own_are_held_out(tmp_path):
    paths = {"path": write(tmp_path / "a.jsonl", sums(5))}
    zipped = tmp_path / "b.jsonl.gz"
    with gzip.open(zipped, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in sums(9)[5:]))
    task = TASKS["gsm8k"](**paths, held_out_path=str(zipped))
    assert len(task.prompts("train")) == 5
    assert [p.answer for p in task.prompts("held_out")] == ["6", "7", "8", "9"]
    with pytest.raises(ConfigError, match="no problem is held out: name their files"):
        TASKS["gsm8k"](**paths).prompts("held_out")
    with pytest.raises(ConfigError, match=r"task\.path: names no file"):
        TASKS["gsm8k"](held_out_path=str(zipped)).prompts("train")
    with pytest.raises(ConfigError, match=r"task\.path: .*nowhere.jsonl: no such file"):
        TASKS["gsm8k"](path=str(tmp_path / "nowhere.jsonl")).prompts("train")
    for wrong in ({}, {**paths, "held_out_path": str(zipped), "held_out_one_in": 8}):
        with pytest.raises(ValueError, match=r"names no file|say one of the two"):
            TASKS["gsm8k"](**wrong)


def test_a_file_without_a_held_out_problem_is_told(tmp_path):
    row = next(row for row in sums(20) if not is_held_out(row["question"], 8))
    task = TASKS["gsm8k"](path=write(tmp_path / "a.jsonl", [row]), held_out_one_in=8)
    with pytest.raises(ConfigError, match="has no held_out problem"):
        task.prompts("held_out")


def test_everything_bad_is_told_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [
        json.dumps(sums(1)[0]),
        '{"question": "No answer?"}',
        '{"question": "", "answer": 7}',
        "{broken",
        '{"question": "No mark?", "answer": "it is 7"}',
        "[1]",
    ]
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(BadRows) as error:
        TASKS["gsm8k"](path=str(path)).prompts("train")
    said = str(error.value)
    assert said.startswith("5 of 6 rows are bad:")
    assert f"{path}:2: answer: missing or null (the row has question) -> give it a text" in said
    assert f"{path}:3: question: empty text" in said
    assert f"{path}:3: answer: wrong type: int 7 -> make it a string" in said
    assert f"{path}:4: line: bad JSON" in said
    assert f'{path}:5: answer: ends with "it is 7" -> end it with #### and the number' in said
    assert f"{path}:6: row: wrong type: a list of 1 -> make it an object" in said
    assert said.endswith("repair these rows, or remove them (task.path)")


def test_system_prompt_and_instruction_stand_around_the_question(tmp_path):
    task = TASKS["gsm8k"](
        path=write(tmp_path / "a.jsonl", sums(1)), system="Be brief.", instruction="In one word."
    )
    (prompt,) = task.prompts("train")
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "0 + 1?\nIn one word."},
    )
    assert (prompt.answer, prompt.source, prompt.tools) == ("1", "gsm8k", ())


def test_generated_problems_are_a_function_of_seed_split_and_number():
    task = TASKS["arithmetic"](size=300, held_out_size=300)
    train = [p.messages[-1]["content"] for p in task.prompts("train")]
    held_out = [p.messages[-1]["content"] for p in task.prompts("held_out")]
    assert not set(train) & set(held_out)
    assert all(map(held_out_of_the_world, held_out))
    assert len(set(train)) > 250
    assert task.prompts("train")[7] == task.prompts("train")[7]
    other = TASKS["arithmetic"](size=300, seed=1)
    assert sum(p.messages[-1]["content"] in train for p in other.prompts("train")) < 30
    assert not {p.messages[-1]["content"] for p in other.prompts("train")} & set(held_out)


def test_limits_that_nothing_fits_are_told():
    task = TASKS["arithmetic"](terms=(2, 2), largest=1, operators=("+",))  # there is but 1+1
    split = "train" if is_held_out("Work out 1+1.", 8) else "held_out"
    with pytest.raises(ConfigError, match=f"no {split} problem of arithmetic"):
        task.prompts(split)[0]


def test_a_config_names_its_task():
    from typing import Annotated

    from posttrain.config import variant
    from posttrain.tasks.base import Task

    class Job(Config):
        task: Annotated[Task, variant(TASKS)] = semantic(help="the task")

    cfg = load(Job, [], ["task.type=arithmetic", "task.terms=[2,3]"])
    assert cfg.task.terms == (2, 3)
    with pytest.raises(ConfigError, match=r"task\.largset.*did you mean 'largest'"):
        load(Job, [], ["task.type=arithmetic", "task.largset=3"])
