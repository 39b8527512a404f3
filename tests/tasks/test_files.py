"""The tasks of files: real rows of each data set, and what is said of bad ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.prepare import BadRows
from posttrain.tasks import TASKS
from posttrain.tasks.base import Task
from posttrain.tasks.function_calling import right_call
from posttrain.tasks.multiple_choice import LETTER
from posttrain.tasks.word_problems import number
from posttrain.types import Message, Prompt, Rollout

Make = Callable[..., Task]


@pytest.fixture
def of(tmp_path: Path) -> Make:
    """of(name, *rows, **options): the task with a file of these rows."""

    def make(name: str, *rows: Any, **options: Any) -> Task:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TASKS[name](path=str(path), **options)

    return make


def asked(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def said_of(task: Task) -> str:
    with pytest.raises(BadRows) as error:
        task.prompts("train")
    return str(error.value)


def test_gsm8k_rows(data_dir, of):
    prompts = TASKS["gsm8k"](path=str(data_dir / "data/gsm8k/train.jsonl")).prompts("train")
    assert len(prompts) == 7473
    assert [p.answer for p in prompts[:3]] == ["72", "10", "5"]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", p.answer) for p in prompts)
    assert asked(prompts[0]).endswith("?\nThink step by step, and end with the final number in "
                                      "\\boxed{}.")  # fmt: skip
    row = {"question": "How much?", "answer": "Much.\n#### $1,234.50"}
    task = of("gsm8k", row, calculator=True)
    assert (task.prompts("train")[0].answer, task.tools) == ("1234.50", ("calculator",))


def test_math_rows(data_dir, of):
    path = str(data_dir / "data/math/math_test_minus_math500.jsonl")
    assert len(TASKS["math"](path=path).prompts("train")) == 4500
    some = TASKS["math"](path=path, levels=(4, 5), subjects=("Algebra",)).prompts("train")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    want = [r for r in rows if r["level"][-1] in "45" and r["type"] == "Algebra"]
    assert [asked(p).rpartition("\n")[0] for p in some] == [r["problem"] for r in want]
    assert some[0].id == f"math/train/{rows.index(want[0])}"
    row = {"problem": "?", "solution": r"It is \boxed{3}. No: \boxed {\frac{1}{\sqrt{2}}}."}
    assert of("math", row).prompts("train")[0].answer == r"\frac{1}{\sqrt{2}}"
    assert of("math", row | {"answer": "0.7"}).prompts("train")[0].answer == "0.7"
    said = said_of(of("math", {"problem": "?", "solution": r"\boxed{1"}, row | {"level": "hard"},
                      levels=(1,)))  # fmt: skip
    assert 'level: missing or null -> write "Level 1"' in said or "level: null" in said
    assert 'rows.jsonl:2: level: "hard"' in said
    assert "box the answer" in said_of(of("math", {"problem": "?", "solution": r"\boxed{1"}))


def test_svamp_and_mawps_rows(data_dir, of):
    prompts = TASKS["svamp"](path=str(data_dir / "data/math/svamp_test.jsonl")).prompts("train")
    assert len(prompts) == 1000
    assert prompts[0].answer == "145"
    assert "93 groups. How big is" in asked(prompts[0])
    first = {"sQuestion": " Two and one? ", "lSolutions": [3.0], "iIndex": 1}
    second = {"input": "A half?", "target": "0.5"}
    prompts = of("mawps", first, second, instruction="").prompts("train")
    assert [(asked(p), p.answer) for p in prompts] == [("Two and one?", "3"), ("A half?", "0.5")]
    said = said_of(of("mawps", first | {"lSolutions": [1, 2]}, second | {"target": "x"}))
    assert "lSolutions: a list of 2 -> make it a list of one number" in said
    assert 'target: no number: "x"' in said
    assert number({"x": 12345678901234567}, "x") == "12345678901234567"


def test_options_are_shuffled_by_the_seed(data_dir, of):
    path = str(data_dir / "data/aqua/dev.jsonl")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    prompts = TASKS["aqua"](path=path).prompts("train")
    for row, prompt in zip(rows, prompts, strict=True):
        right = next(o for o in row["options"] if o[0] == row["correct"])[2:].strip()
        assert f"\n{prompt.answer}) {right}\n" in asked(prompt)
    assert min(Counter(p.answer for p in prompts).values()) > 30
    other = TASKS["aqua"](path=path, seed=1).prompts("train")
    assert sum(a != b for a, b in zip(prompts, other, strict=True)) > 200
    plain = TASKS["aqua"](path=path, shuffle=False).prompts("train")
    assert [p.answer for p in plain] == [row["correct"] for row in rows]
    last = {"question": "?", "options": ["A)1", "B)2", "C)None of these"], "correct": "C"}
    for seed in range(9):
        assert of("aqua", last, seed=seed).prompts("train")[0].answer == "C"


def test_truthfulqa_has_one_right_option(data_dir):
    path = data_dir / "data/truthfulqa/truthfulqa_shared.jsonl"
    prompts = TASKS["truthfulqa"](path=str(path)).prompts("train")
    rows = [json.loads(line) for line in path.open()]
    for row, prompt in zip(rows, prompts, strict=True):
        assert f"\n{prompt.answer}) {row['Best Answer'].strip()}\n" in asked(prompt)
        options = re.findall(r"^[A-Z]\) ", asked(prompt), re.MULTILINE)
        assert len(options) == 1 + len(
            [x for x in row["Incorrect Answers"].split(";") if x.strip()]
        )


def test_bad_options_are_told(of):
    good = {"question": "?", "options": ["A)1", "B)2"], "correct": "B"}
    said = said_of(
        of("aqua", good, good | {"correct": "C"}, good | {"options": ["A)1", "C)2"]},
           good | {"options": "A)1"})
    )  # fmt: skip
    assert 'rows.jsonl:2: correct: "C" -> make it one of A, B' in said
    assert 'rows.jsonl:3: options[1]: "C)2" -> begin it with "B)"' in said
    assert "rows.jsonl:4: options: " in said
    row = {"Question": "?", "Best Answer": "x", "Incorrect Answers": " ; x"}
    assert "Incorrect Answers: 0 options" in said_of(of("truthfulqa", row))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{A} so \boxed{B}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{B) 72}", "B"),
        (r"\boxed{Bob}", None),
        ("B", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert (re.findall(LETTER, text) or [None])[-1] == letter


def test_ifeval_rows(data_dir, of):
    path = data_dir / "data/ifeval/input_data_shared.jsonl"
    prompts = TASKS["ifeval"](path=str(path)).prompts("train")
    rows = [json.loads(line) for line in path.open()]
    assert [asked(p) for p in prompts] == [row["prompt"] for row in rows]
    assert prompts[0].answer == {k: rows[0][k] for k in ("instruction_id_list", "kwargs")}
    row = {"prompt": "?", "instruction_id_list": ["a:b"], "kwargs": [{"n": 1, "m": None}]}
    assert of("ifeval", row).prompts("train")[0].answer["kwargs"] == [{"n": 1}]
    said = said_of(of("ifeval", row | {"kwargs": []}, row | {"instruction_id_list": "a:b"}))
    assert "rows.jsonl:1: kwargs: a list of 0 -> make it a list of 1 objects" in said
    assert 'rows.jsonl:2: instruction_id_list: "a:b"' in said


def bfcl(data_dir: Path, *kinds: str) -> Task:
    files = [
        (f"{data_dir}/data/bfcl/{k}.jsonl", f"{data_dir}/data/bfcl/{k}.answers.jsonl")
        for k in kinds
    ]
    return TASKS["bfcl"](path=tuple(a for a, _ in files), answers=tuple(b for _, b in files))


def calling(prompt: Prompt, *calls: tuple[str, Any]) -> Rollout:
    functions = [{"function": {"name": name, "arguments": given}} for name, given in calls]
    nothing = np.zeros(0, np.float32)
    said: Message = {"role": "assistant", "content": ""}
    if calls:
        said = {**said, "tool_calls": functions}
    return Rollout(prompt, (said,), "", "stop", nothing, nothing, nothing, nothing)


def test_bfcl_rows_and_the_calls_that_are_right(data_dir):
    prompts = bfcl(data_dir, "simple_python", "multiple").prompts("train")
    assert len(prompts) == 600
    assert (prompts[0].id, prompts[400].id) == ("bfcl/simple_python_0", "bfcl/multiple_0")
    scored = Counter()
    for prompt in prompts:
        tools = json.dumps(prompt.tools)
        assert not re.search(r'"type": "(dict|float|tuple|any)"', tools)
        ((name, right),) = prompt.answer[0].items()
        values = {k: [v for v in right[k] if v != ""] for k in right}
        first = {k: plain(v[0]) for k, v in values.items() if v}
        scored["first"] += right_call(calling(prompt, (name, first)))
        scored["none"] += right_call(calling(prompt))
        scored["twice"] += right_call(calling(prompt, (name, first), (name, first)))
        scored["other"] += right_call(calling(prompt, ("other", first)))
        scored["more"] += right_call(calling(prompt, (name, {**first, "unheard_of": 1})))
        needed = next(k for k in right if "" not in right[k])
        fewer = {k: v for k, v in first.items() if k != needed}
        scored["fewer"] += right_call(calling(prompt, (name, fewer)))
        wrong = {**first, needed: "no such value"}
        scored["wrong"] += right_call(calling(prompt, (name, wrong)))
    assert scored == {"first": 600, **dict.fromkeys(
        ("none", "twice", "other", "more", "fewer", "wrong"), 0)}  # fmt: skip


def plain(value: Any) -> Any:
    """A right value as one passes it: an object's values are lists of right ones."""
    if isinstance(value, dict):
        return {k: plain(v[0]) for k, v in value.items() if v[0] != ""}
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("arguments", "score"),
    [
        ({"n": 5, "x": 2.5, "s": "New-York"}, 1),
        ({"n": 5, "x": 3, "s": "new york"}, 1),  # whole numbers are numbers, marks don't count
        ({"n": 5.0, "x": 3, "s": "new york"}, 0),  # but not the other way round
        ({"n": True, "x": 3, "s": "new york"}, 0),
        ({"n": "5", "x": 3, "s": "new york"}, 0),
        ({"n": 5, "x": 3, "s": "new jersey"}, 0),
        ({"n": 5, "x": 3, "s": "new york", "o": ""}, 1),
        ({"n": 5, "x": 3, "s": "new york", "o": "b c"}, 1),
        ({"n": 5, "x": 3, "s": "new york", "o": "d"}, 0),
        ({"n": 5, "x": 3, "s": "new york", "l": ["A b", "c"]}, 1),
        ({"n": 5, "x": 3, "s": "new york", "l": ["c", "a b"]}, 0),
        ({"n": 5, "x": 3, "s": "new york", "l": [1]}, 1),
        ({"n": 5, "x": 3, "s": "new york", "l": [True]}, 0),
        ({"n": 5, "x": 3, "s": "new york", "d": {"k": 1}}, 1),
        ({"n": 5, "x": 3, "s": "new york", "d": {"k": 3, "j": "z"}}, 0),
        ({"n": 5, "x": 3, "s": "new york", "d": {}}, 0),
        ({"n": 5, "x": 3}, 0),
        ("n=5", 0),
    ],
)
def test_bfcl_matches_types_and_values(of, arguments, score):
    types = {"n": "integer", "x": "float", "s": "string", "o": "string", "l": "array", "d": "dict"}
    function = {
        "name": "f",
        "description": "",
        "parameters": {
            "type": "dict",
            "properties": {name: {"type": kind} for name, kind in types.items()},
            "required": ["n", "x", "s"],
        },
    }
    right = {
        "n": [5],
        "x": [2.5, 3],
        "s": ["New York"],
        "o": ["", "b.c"],
        "l": ["", ["a b", "C"], [1]],
        "d": ["", {"k": [1, 2], "j": ["", "z"]}],
    }
    row = {
        "id": "a",
        "question": [[{"role": "user", "content": "?"}]],
        "function": [function],
        "ground_truth": [{"f": right}],
    }
    (prompt,) = of("bfcl", row).prompts("train")
    assert right_call(calling(prompt, ("f", arguments))) == score


def test_bfcl_rows_that_do_not_fit_are_told(data_dir, of, tmp_path):
    row = {
        "id": "a",
        "question": [[{"role": "user", "content": "?"}]],
        "function": [{"name": "f", "parameters": {}}],
        "ground_truth": [{"g": {}}],
    }
    said = said_of(of("bfcl", row, row | {"id": "b", "question": []}, row | {"ground_truth": 3}))
    assert "rows.jsonl:1: ground_truth: calls g, and the functions are f" in said
    assert "rows.jsonl:2: question: a list of 0" in said
    assert "rows.jsonl:3: ground_truth: int 3" in said
    good = row | {"ground_truth": [{"f": {}}]}
    said = said_of(of("bfcl", good, good))
    assert 'rows.jsonl:2: id: "bfcl/a" is the id of an earlier row -> give each row' in said
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "b", "ground_truth": [{"f": {}}]}\n')
    said = said_of(of("bfcl", row, answers=str(answers)))
    assert 'id: "a" has no answer -> add its ground_truth to the files of task.answers' in said


def test_own_columns(of):
    row = {"q": "Why?", "data": {"a": [1, "so"]}, "who": "You are wise.", "key": 7}
    fields = {"question": "{q} Say.", "answer": "data.a.1", "system": "who", "id": "key"}
    (prompt,) = of("jsonl", row, fields=fields, system="Of the task").prompts("train")
    assert prompt == Prompt(
        "7",
        ({"role": "system", "content": "You are wise."}, {"role": "user", "content": "Why? Say."}),
        "so",
        source="jsonl",
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "2?"},
    ]
    row = {"messages": turns, "tools": json.dumps([tool])}
    task = of("jsonl", row, fields={"messages": "messages", "tools": "tools"}, instruction="Now.")
    (prompt,) = task.prompts("train")
    assert prompt.messages == (*turns[:2], {"role": "user", "content": "2?\nNow."})
    assert prompt.tools == (tool,)


def test_own_columns_that_are_wrong(of):
    fields = {"messages": "m", "answer": "a"}
    ends = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    said = said_of(
        of("jsonl", {"m": [], "a": 1}, {"m": ends, "a": 1}, {"m": 3, "a": 1}, {"m": ends},
           fields=fields)
    )  # fmt: skip
    assert "rows.jsonl:1: m: wrong type: a list of 0" in said
    assert "rows.jsonl:2: m: the last message is of role assistant: it asks nothing" in said
    assert "rows.jsonl:3: m: wrong type: int 3" in said
    assert "rows.jsonl:4: a: missing field (the row has m)" in said
    assert of("jsonl", fields={"answer": "a"}).fields == {"question": "question", "answer": "a"}
    for wrong in ({"question": "q", "messages": "m"}, {"qestion": "q"}):
        with pytest.raises(ValueError, match=r"name one of|did you mean 'question'"):
            of("jsonl", fields=wrong)
