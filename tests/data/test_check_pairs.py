"""One file with every defect of pairs that we know of: each at its line, with field and fix."""

from __future__ import annotations

import json

import pytest

from posttrain.data.check import check
from posttrain.data.config import DataConfig
from tests.data.fakes import FakeChat

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
LONG = {**GOOD, "content": "x" * 99}
REFUSED = {**USER, "content": "refuse me"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}


def explicit(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def implicit(chosen, rejected, **columns):
    return {"chosen": chosen, "rejected": rejected, **columns}


def human(*texts):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(texts))


def rated(*answers):
    return {"instruction": "q", "completions": list(answers)}


def answer(text, score):
    return {"response": text, "overall_score": score}


def said(text):
    return {"from": "gpt", "value": text}


TURN = {"from": "human", "value": "q"}
# the format, the row, the field, what was found, what to do
DEFECTS = [
    ("preference", [1], "row", "wrong type: a list of 1", "make it an object"),
    ("preference", explicit([USER], [GOOD], [GOOD]), "rejected", "teaches nothing", "remove"),
    ("preference", explicit("q", "a", "a"), "rejected", "the same as chosen", "remove the row"),
    ("preference", implicit([USER, GOOD], [USER, GOOD]), "rejected", "teaches nothing", "remove"),
    ("preference", explicit("q", "a", " "), "rejected", 'empty text " "', "remove the row"),
    ("preference", explicit("", "a", "b"), "prompt", "empty text", "write the text"),
    ("preference", explicit([USER], "", [BAD]), "chosen", 'empty answer ""', "write the answer"),
    ("preference", explicit([USER], [], [BAD]), "chosen", "an empty list", "write the answer"),
    (
        "preference",
        explicit([USER], [{**GOOD, "content": ""}], [BAD]),
        "chosen[0].content",
        "empty answer",
        "write the answer",
    ),
    ("preference", explicit([USER], [GOOD], 3), "rejected", "wrong type: int 3", "a list of"),
    ("preference", explicit([USER], [GOOD], None), "rejected", "missing or null", "a text or a"),
    ("preference", explicit(4, [GOOD], [BAD]), "prompt", "wrong type: int 4", "a text or a list"),
    ("preference", implicit("a", "b"), "prompt", "where the answers begin", "map its column"),
    ("preference", explicit([], [GOOD], [BAD]), "prompt", "no message before", "what is answered"),
    (
        "preference",
        explicit([USER, GOOD], [GOOD], [BAD]),
        "prompt[1]",
        "ends with a message of role assistant",
        "end it with",
    ),
    (
        "preference",
        explicit([SYSTEM], [GOOD], [BAD]),
        "prompt[0]",
        "ends with a message of role system",
        "end it with",
    ),
    (
        "preference",
        explicit([USER], [USER, GOOD], [BAD]),
        "chosen[0]",
        "the answer begins with a message of role user",
        "put it into prompt",
    ),
    (
        "preference",
        explicit("other", [USER, GOOD], [USER, BAD]),
        "prompt",
        "not what chosen and rejected both begin with",
        "leave it out: fields:",
    ),
    (
        "preference",
        explicit([SYSTEM, USER], [USER, GOOD], [USER, BAD]),
        "prompt",
        "not what chosen and rejected both begin with",
        "correct it",
    ),
    (
        "preference",
        implicit([USER, GOOD, USER, GOOD], [USER, GOOD]),
        "rejected",
        "the beginning of chosen: no answer is left",
        "put the shared turns into prompt",
    ),
    (
        "preference",
        implicit([USER, GOOD], [SYSTEM, USER, BAD]),
        "chosen[0]|rejected[0]",
        "shares no first message",
        "begin with one prompt",
    ),
    (
        "preference",
        implicit([USER, GOOD, USER, GOOD], [USER, GOOD, SYSTEM, BAD]),
        "chosen[2]|rejected[2]",
        "the sides part at a message of role",
        "put the prompt into prompt",
    ),
    (
        "preference",
        implicit([USER, GOOD, BAD], [USER, GOOD, GOOD]),
        "chosen[1]",
        "the prompt ends with a message of role assistant",
        "end it with",
    ),
    (  # said once, though both sides have it
        "preference",
        explicit([{**USER, "role": "usr"}], [GOOD], [BAD]),
        "prompt[0].role",
        'unknown role "usr"',
        "write user",
    ),
    ("preference", explicit([USER], [GOOD], [BAD], tools="["), "tools", "no JSON", "the list of"),
    ("preference", explicit("q", "a", "b", system="s"), "system", "plain texts", "fields: {user"),
    (
        "preference",
        explicit([USER], [CALLS], [CALLS, USER]),
        "rejected[1].role",
        "last message has role user",
        "add the answer",
    ),
    ("preference", {**explicit("q", "a", "b"), "promt": "q", "prompt": None}, "promt", "like", "?"),
    ("hh", implicit(human("q", ""), human("q", "b")), "chosen[1].content", "empty answer", "write"),
    (
        "hh",
        implicit(human("q", "a", "why"), human("q", "a", "b")),
        "chosen[2]|rejected[2]",
        "part at a message of role user",
        "prompt",
    ),
    (
        "hh",
        implicit(human("q", "a", "why"), human("q", "b")),
        "chosen[2].role",
        "last message has role user",
        "add the answer",
    ),
    ("hh", implicit(human("q", "a"), "b"), "rejected", 'begins with "b"', "begin with"),
    ("hh", implicit(human("q", "a"), human("p", "b")), "chosen[0]|rejected[0]", "shares no", "one"),
    ("hh", implicit(human("q", "a"), human("q", "a ")), "rejected", "teaches nothing", "remove"),
    (
        "llama_factory",
        {"conversations": [TURN], "chosen": said(""), "rejected": said("b")},
        "chosen.content",
        "empty answer",
        "write the answer",
    ),
    (
        "llama_factory",
        {"conversations": [TURN], "chosen": said("a"), "rejected": {"from": "bot", "value": "b"}},
        "rejected.from",
        'unknown role "bot"',
        "use one of",
    ),
    (
        "llama_factory",
        {"conversations": "q", "chosen": said("a"), "rejected": said("b")},
        "conversations",
        'wrong type: "q"',
        "a list of turns",
    ),
    (
        "llama_factory",
        {"conversations": [TURN, said("c")], "chosen": said("a"), "rejected": said("b")},
        "conversations[1]",
        "ends with a message of role assistant",
        "end it with",
    ),
    (
        "llama_factory",
        {"instruction": "q", "chosen": "a", "rejected": ""},
        "rejected",
        "empty answer",
        "write the answer",
    ),
    ("ultrafeedback", rated(answer("a", 1)), "completions", "1 completion(s)", "add another"),
    ("ultrafeedback", rated(answer("a", 1), answer("b", 1)), "completions", "score 1", "remove"),
    ("ultrafeedback", rated({"response": "a"}, answer("b", 1)), "completions", "no score", "score"),
    (
        "ultrafeedback",
        rated(answer("a", "N/A"), answer("b", 1)),
        "completions[0].overall_score",
        'no number: "N/A"',
        "write the score",
    ),
    (
        "ultrafeedback",
        rated(answer("a", True), answer("b", 0.5)),
        "completions[0].overall_score",
        "no number: bool True",
        "write the score",
    ),
    (
        "llama_factory",
        {"instruction": "q", "chosen": "a", "rejected": None},
        "rejected",
        "missing or null",
        "give it an answer, or remove the row",
    ),
    (
        "ultrafeedback",
        rated(answer("a", 2), answer(" ", 1)),
        "completions[1].response",
        "empty answer",
        "write the answer",
    ),
    (
        "ultrafeedback",
        rated(answer("a", 2), answer("a", 1)),
        "completions[1].response",
        "the same as completions[0].response",
        "remove the row",
    ),
    (
        "preference",
        explicit([USER], [{**GOOD, "weight": 0.5}], [BAD]),
        "chosen[0].weight",
        "float 0.5 in an answer of a pair",
        "write 0 (not trained) or 1",
    ),
    (
        "preference",
        explicit("q", [{"role": "user"}, GOOD], [{"role": "user"}, BAD]),
        "prompt",
        "not what chosen and rejected both begin with",
        "correct it",
    ),
    # what only tokens show
    ("preference", explicit([REFUSED], [GOOD], [BAD]), "row", "the template refuses", "chat"),
    ("preference", explicit([USER], [GOOD], "refuse me"), "rejected", "refuses", "chat section"),
    ("preference", explicit([USER], [GOOD], [LONG]), "rejected", "103 tokens, over", "raise data"),
    (
        "preference",
        explicit([USER], [LONG], [{**LONG, "content": "y" * 99}]),
        "chosen|rejected",
        "103 tokens, over",
        "shorten or drop it",
    ),
    (
        "preference",
        explicit([USER], [{**GOOD, "weight": 0}], [BAD]),
        "chosen",
        "no token of it is trained",
        "a weight over 0",
    ),
    (
        "preference",
        explicit([USER], [GOOD], [{**GOOD, "reasoning_content": "unseen"}]),
        "rejected",
        "the tokens of chosen: the pair teaches nothing",
        "remove the row",
    ),
]
SEEN_IN_TOKENS = 6
GOOD_ROWS = {
    "preference": explicit([USER], [GOOD], [BAD]),
    "hh": implicit(human("q", "a"), human("q", "b")),
    "llama_factory": {"conversations": [TURN], "chosen": said("a"), "rejected": said("b")},
    "ultrafeedback": rated(answer("a", 2), answer("b", 1)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each format; a good row stands before each bad one."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {}
    for form, good in GOOD_ROWS.items():
        rows = [row for name, row, *_ in DEFECTS if name == form]
        files[form] = str(folder / f"{form}.jsonl")
        (folder / f"{form}.jsonl").write_text(
            "".join(f"{json.dumps(good)}\n{json.dumps(row)}\n" for row in rows)
        )
    return files


def config(files):
    sources = {form: {"path": path, "format": form} for form, path in files.items()}
    return DataConfig(sources=sources, seq_len=100, too_long="error", workers=0)


@pytest.fixture(scope="module")
def checked(files):
    return check(config(files), FakeChat(), kind="pairs")


def place(files, k):
    form = DEFECTS[k][0]
    return files[form], 2 * [n for n, row in enumerate(DEFECTS) if row[0] == form].index(k) + 2


@pytest.mark.parametrize("k", range(len(DEFECTS)))
def test_each_defect_is_at_its_line_with_field_and_fix(checked, files, k):
    _, _, fields, what, fix = DEFECTS[k]
    here = [d for d in checked.defects if (d.file, d.line) == place(files, k)]
    assert [d.field for d in here] == fields.split("|"), here
    for defect in here:
        assert what in defect.found
        assert fix in defect.fix
        assert str(defect).isprintable()


def test_good_rows_have_no_defect(checked, files):
    assert {(d.file, d.line) for d in checked.defects} == {
        place(files, k) for k in range(len(DEFECTS))
    }
    assert checked.rows == 2 * len(DEFECTS)


def test_without_a_template_the_form_alone_is_checked(checked, files):
    form = check(config(files), None, kind="pairs").defects
    missing = {(d.file, d.line) for d in checked.defects} - {(d.file, d.line) for d in form}
    last = range(len(DEFECTS) - SEEN_IN_TOKENS, len(DEFECTS))
    assert missing == {place(files, k) for k in last}
