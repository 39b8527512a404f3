"""The demo's world: deterministic, and what is held out is nowhere in what is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from posttrain.data.world import (
    PROBE_KINDS,
    VALUES,
    Probe,
    is_as_asked,
    is_held_out,
    is_right,
    make_world,
    plain_prompt,
    probes,
    write_chats,
    write_texts,
)
from posttrain.data.world_model import SPECIAL, write_model_folder


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world = make_world(3)
    write_texts(folder / "texts.jsonl", world, documents=40)
    write_chats(folder / "chats.jsonl", world, conversations=4000)
    return folder


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_chats(tmp_path / name, make_world(1), conversations=50)
        write_texts(tmp_path / f"{name}t", make_world(1), documents=2)
    write_chats(tmp_path / "c", make_world(2), conversations=50)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "at").read_bytes() == (tmp_path / "bt").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_no_probe_is_in_the_training_conversations(written: Path) -> None:
    def asked(messages: list[dict]) -> tuple[str, ...]:
        return tuple(m["content"] for m in messages if m["role"] != "assistant")

    trained = set()
    for row in _rows(written / "chats.jsonl"):
        for i, message in enumerate(row["messages"]):
            if message["role"] == "user":
                trained.add(asked(row["messages"][: i + 1]))
    found = probes(make_world(3), each=60)
    assert len({asked(list(p.messages)) for p in found}) == 60 * len(PROBE_KINDS)
    assert not trained & {asked(list(p.messages)) for p in found}
    assert len(trained) > 1000


def test_held_out_sums_are_in_no_training_text_in_any_form(written: Path) -> None:
    everything = (written / "texts.jsonl").read_text() + (written / "chats.jsonl").read_text()
    shown = set(re.findall(r"Work out ([0-9+-]+)\.", everything))
    shown |= set(re.findall(r"([0-9][0-9+-]+): ", everything))
    sums = [p for p in probes(make_world(3), each=80) if p.kind.startswith("sum")]
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
    ("reply", "right", "as_asked"),
    [
        ("Oslo.", True, True),
        (" Oslo.", True, True),
        ("Ugo lives in Oslo.", True, False),
        ("OSLO. And more.", True, False),
        ("Rome. Oslo.", False, False),
        ("Oslow.", False, False),
        ("", False, False),
    ],
)
def test_judging_a_fact(reply: str, right: bool, as_asked: bool) -> None:
    probe = Probe("fact", ({"role": "user", "content": "Where?"},), "Oslo", "Oslo.")
    assert is_right(reply, probe) is right
    assert is_as_asked(reply, probe) is as_asked


def test_judging_a_sum_reads_the_sign_and_the_whole_number() -> None:
    probe = Probe("sum", (), "2", "2.")
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
