"""The demo's world: deterministic, and what is held out is nowhere in what is trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.data.world import (
    SYSTEM_PROMPTS,
    VALUES,
    is_held_out,
    make_world,
    plain_prompt,
    probes,
    write_chats,
    write_pairs,
    write_sums,
    write_texts,
)
from posttrain.data.world_model import SPECIAL, write_model_folder
from posttrain.data.world_probe import FORMS, PROBE_KINDS, Probe, is_as_wanted, is_right


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world = make_world(3)
    write_texts(folder / "texts.jsonl", world, documents=40)
    write_chats(folder / "chats.jsonl", world, conversations=4000)
    write_pairs(folder / "pairs.jsonl", world, pairs=3000)
    write_sums(folder / "sums.jsonl", world, prompts=2000)
    return folder


def _asked(messages: Sequence[dict]) -> tuple[str, ...]:
    return tuple(m["content"] for m in messages if m["role"] != "assistant")


def _form(message: dict, wanted: str) -> bool:
    """Is an assistant's message of a form, judged as replies to probes are?"""
    thinking = message.get("reasoning_content", "")
    return is_as_wanted(message["content"], thinking, Probe("fact", (), "", wanted))


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_chats(tmp_path / name, make_world(1), conversations=50)
        write_texts(tmp_path / f"{name}t", make_world(1), documents=2)
        write_pairs(tmp_path / f"{name}p", make_world(1), pairs=50)
    write_chats(tmp_path / "c", make_world(2), conversations=50)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "at").read_bytes() == (tmp_path / "bt").read_bytes()
    assert (tmp_path / "ap").read_bytes() == (tmp_path / "bp").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_no_probe_is_in_the_training_conversations_or_in_a_pair(written: Path) -> None:
    conversations = [row["messages"] for row in _rows(written / "chats.jsonl")]
    conversations += [row["prompt"] + row["chosen"] for row in _rows(written / "pairs.jsonl")]
    trained = {
        _asked(messages[: i + 1])
        for messages in conversations
        for i, message in enumerate(messages)
        if message["role"] == "user"
    }
    found = probes(make_world(3), each=60)
    assert len({_asked(p.messages) for p in found}) == 60 * 4 * len(PROBE_KINDS)
    assert not trained & {_asked(p.messages) for p in found}
    assert len(trained) > 1000


def test_there_are_as_many_probes_of_every_form_that_an_answer_can_have() -> None:
    counted = Counter((p.kind, p.form, p.prompted) for p in probes(make_world(0), each=5))
    styled = [("capitals", True), ("brief", True), ("sentence", True)]
    assert counted == {
        **{("fact", form, prompted): 5 for form, prompted in [("greeting", False), *styled]},
        **{("second turn", form, prompted): 5 for form, prompted in [("sentence", False), *styled]},
        ("sum", "number", False): 20,
        ("sum, thinking", "thinking", True): 20,
    }


def test_more_probes_than_there_are_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="fact: the world has but 69 held-out questions"):
        probes(make_world(0), each=100, kinds=["fact"])


def test_the_preferred_answer_has_the_wanted_form_and_the_other_one_has_not(written: Path) -> None:
    counted: Counter[str] = Counter()
    for row in _rows(written / "pairs.jsonl"):
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        first, turns = row["prompt"][0], sum(m["role"] == "user" for m in row["prompt"])
        if first["role"] == "system":
            case = "by a system prompt"
            wanted = next(s for s, prompt in SYSTEM_PROMPTS.items() if prompt == first["content"])
        elif first["content"].startswith("Work out"):
            case, wanted = "sum", "number"
        else:
            case, wanted = f"turn {turns}", "greeting" if turns == 1 else "sentence"
        counted[case] += 1
        assert _form(chosen, wanted), row
        assert not _form(rejected, wanted), row
    share = {case: n / counted.total() for case, n in counted.items()}
    assert share["by a system prompt"] == pytest.approx(0.7 * 0.5 + 0.15, abs=0.04)
    assert share["sum"] == pytest.approx(0.15, abs=0.03)
    assert share["turn 1"] == pytest.approx(0.7 * 0.5 * 0.65, abs=0.04)
    assert share["turn 2"] == pytest.approx(0.7 * 0.5 * 0.35, abs=0.03)


def test_both_answers_of_a_pair_are_right(written: Path) -> None:
    facts = make_world(3).facts
    for row in _rows(written / "pairs.jsonl"):
        asked = row["prompt"][-1]["content"]
        if asked.startswith("Work out"):
            value = str(eval(asked.removeprefix("Work out ").removesuffix(".")))
        else:
            about = " ".join(_asked(row["prompt"]))
            kind = next(k for k, words in CLUES.items() if any(w in about for w in words))
            name = next(n for n in facts if re.search(rf"\b{n}\b", asked))
            value = facts[name][kind]
        for side in ("chosen", "rejected"):
            reply = row[side][0]["content"]
            assert is_right(reply, Probe("fact", (), value, "brief")), (row, value)


CLUES = {"home": ("live", "home", "city"), "food": ("eat", "food", "dinner"), "hat": ("hat",)}


def test_every_fifth_trained_answer_about_people_greets_without_a_system_prompt(
    written: Path,
) -> None:
    greets: dict[bool, list[bool]] = {True: [], False: []}
    for row in _rows(written / "chats.jsonl"):
        bound = row["messages"][0]["content"].startswith(("Answer", "Think", "Work out"))
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        greets[bound] += [answer.startswith("Hello! ") for answer in answers]
    assert len(greets[False]) > 1000
    assert sum(greets[False]) / len(greets[False]) == pytest.approx(0.2, abs=0.03)
    assert not any(greets[True])


@pytest.mark.parametrize(("file", "share"), [("chats", 0.2), ("pairs", 0.5)])
def test_this_share_of_sums_without_a_system_prompt_is_worked_out(
    written: Path, file: str, share: float
) -> None:
    thought = []
    for row in _rows(written / f"{file}.jsonl"):
        messages = row["messages"] if file == "chats" else row["prompt"] + row["chosen"]
        asked, answer, *_ = messages
        if asked["content"].startswith("Work out"):
            thought.append("reasoning_content" in answer)
    assert len(thought) > 300
    assert sum(thought) / len(thought) == pytest.approx(share, abs=0.05)


def test_sums_to_find_the_answer_of_are_right(written: Path) -> None:
    rows = _rows(written / "sums.jsonl")
    assert len(rows) == 2000
    for row in rows:
        terms = row["question"].removeprefix("Work out ").removesuffix(".")
        assert row["answer"] == str(eval(terms))


def test_held_out_sums_are_in_no_training_text_in_any_form(written: Path) -> None:
    everything = "".join(file.read_text() for file in sorted(written.glob("*.jsonl")))
    shown = set(re.findall(r"Work out ([0-9+-]+)\.", everything))
    shown |= set(re.findall(r"([0-9][0-9+-]+): ", everything))
    sums = [p for p in probes(make_world(3), each=60) if p.kind.startswith("sum")]
    assert len(shown) > 1000
    assert not shown & {re.findall(r"[0-9+-]{3,}", p.messages[-1]["content"])[0] for p in sums}


def test_every_fact_is_told_in_the_prose(written: Path) -> None:
    text = (written / "texts.jsonl").read_text()
    told = set(re.findall(r"(\w+) (?:lives in|eats|wears a) (\w+)", text))
    facts = make_world(3).facts
    expected = {(name, value) for name, of in facts.items() for value in of.values()}
    assert told == expected


def test_sums_are_right_and_so_are_their_steps(written: Path) -> None:
    thinking = 0
    for row in _rows(written / "chats.jsonl"):
        *_, asked, answer = row["messages"]
        if not asked["content"].startswith("Work out"):
            continue
        terms = asked["content"].removeprefix("Work out ").removesuffix(".")
        assert answer["content"] == f"{eval(terms)}."
        for step in answer.get("reasoning_content", "").split():
            thinking += 1
            left, right = step.split("=")
            assert eval(left) == int(right)
            assert 0 <= int(right) <= 20
    assert thinking > 1000


def test_styles_and_second_turns_are_all_there(written: Path) -> None:
    chats = [row["messages"] for row in _rows(written / "chats.jsonl")]
    systems = {m[0]["content"] for m in chats if m[0]["role"] == "system"}
    assert systems == {
        "Answer in capitals.",
        "Answer briefly.",
        "Answer in a full sentence.",
        "Think first.",
    }
    for messages in chats:
        if messages[0]["content"] == "Answer in capitals.":
            assert all(m["content"].isupper() for m in messages if m["role"] == "assistant")
    second = sum(sum(m["role"] == "user" for m in messages) == 2 for messages in chats)
    assert 0.15 < second / len(chats) < 0.27  # 35% of the 60% about facts


def test_the_split_is_a_hash_of_one_in_eight() -> None:
    share = sum(is_held_out(f"key {i}") for i in range(8000)) / 8000
    assert share == pytest.approx(1 / 8, abs=0.015)
    assert is_held_out("key 4") == is_held_out("key 4")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Oslo.", True),
        (" Oslo.", True),
        ("Hello! Ugo lives in Oslo.", True),
        ("OSLO. And more.", True),
        ("Rome. Oslo.", False),
        ("Oslow.", False),
        ("", False),
    ],
)
def test_judging_a_fact(reply: str, right: bool) -> None:
    question = ({"role": "user", "content": "Where?"},)
    assert is_right(reply, Probe("fact", question, "Oslo", "brief")) is right


@pytest.mark.parametrize(
    ("reply", "forms"),
    [
        ("Hello! Ugo lives in Oslo.", {"greeting"}),
        ("Hello! 7.", {"greeting"}),
        ("Ugo lives in Oslo.", {"sentence"}),
        ("UGO LIVES IN OSLO.", {"capitals"}),
        ("Oslo.", {"brief"}),
        ("7.", {"number"}),
        ("Hello! UGO LIVES IN OSLO", set()),
        ("Ugo lives in Oslo. Ada eats soup.", set()),
        ("Hello! Hello! Oslo.", set()),
        ("Ugo lives in OSLO!", set()),
        ("", set()),
    ],
)
def test_judging_a_form(reply: str, forms: set[str]) -> None:
    assert {form for form in FORMS if _form({"content": reply}, form)} == forms
    thought = {"content": reply, "reasoning_content": "1+1=2"}
    worked = {"thinking", "number"} if reply == "7." else set()
    assert {f for f in FORMS if _form(thought, f)} == worked


def test_judging_a_sum_reads_the_sign_and_the_whole_number() -> None:
    probe = Probe("sum", (), "2", "number")
    assert [is_right(r, probe) for r in ("2.", "12.", "-2.", "20.")] == [True, False, False, False]


def test_plain_prompt_is_how_the_base_text_writes_a_transcript(written: Path) -> None:
    messages = [
        {"role": "user", "content": "Where does Ugo live?"},
        {"role": "assistant", "content": "Ugo lives in Rome."},
        {"role": "user", "content": "And Ada?"},
    ]
    assert plain_prompt(messages) == (
        "Question: Where does Ugo live? Answer: Ugo lives in Rome. Question: And Ada? Answer:"
    )
    assert re.search(plain_prompt(messages[:1])[:23], (written / "texts.jsonl").read_text())


def test_the_tokenizer_gives_every_text_back(written: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    texts = [row["text"] for row in _rows(written / "texts.jsonl")]
    size = write_model_folder(tmp_path, texts, config={"max_position_embeddings": 64})
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == size
    assert tokenizer.get_vocab_size() == size
    unknown = tokenizer.token_to_id("<unk>")
    strange = "Tabs\tand\nlines, {braces} ~ and 1234567 words never seen: Zzyzx!"
    for text in [texts[0], strange, " " + strange, "".join(SPECIAL)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert unknown not in ids or text == "".join(SPECIAL)
    words = tokenizer.encode("7+5=12 Ugo lives", add_special_tokens=False).tokens
    assert words == ["7", "+", "5", "=", "12", " Ugo", " lives"]
    assert tokenizer.encode("é", add_special_tokens=False).ids == [unknown]


def test_values_are_different_words_so_that_a_right_answer_is_told_apart() -> None:
    values = [value for kind in VALUES.values() for value in kind]
    assert len({v.lower() for v in values}) == len(values)
