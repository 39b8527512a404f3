"""`posttrain chat`: what the model is shown each turn, what is printed, what is kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from posttrain.cli import main
from posttrain.jobs import chat

END = 2


class Letters:
    """A tokenizer of one letter per token (its code point), END apart."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join("<end>" if i == END else chr(i) for i in ids)


class Brackets:
    """A template: [role:content] for each message, then [assistant:"""

    stop_ids = (END,)

    def generation_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if any("forbidden" in m["content"] for m in messages):
            raise ValueError("the template refuses this conversation")
        text = "".join(f"[{m['role']}:{m['content']}]" for m in messages) + "[assistant:"
        return [ord(c) for c in text]


class Scripted:
    """Answers each turn with the next of its texts, ended by END unless it ran out of room."""

    def __init__(self, *texts: str):
        self.texts = list(texts)
        self.prompts: list[str] = []
        self.turns: list[int] = []

    def __call__(
        self, prompt: list[int], room: int, turn: int, on_token: Callable[[int], None]
    ) -> list[int]:
        self.prompts.append("".join(chr(i) for i in prompt))
        self.turns.append(turn)
        tokens = [*map(ord, self.texts.pop(0)), END][:room]
        for token in tokens:
            on_token(token)
        return tokens


def _session(model: Scripted, **settings: object) -> chat.Session:
    return chat.Session(Brackets(), Letters(), model, **{"context": 200, **settings})


def _converse(session: chat.Session, *lines: str, **settings: object) -> str:
    out = io.StringIO()
    chat.converse(session, iter(line + "\n" for line in lines), out, **settings)
    return out.getvalue()


def test_each_turn_sees_the_whole_conversation() -> None:
    model = Scripted("Hi.", "Fine.")
    session = _session(model, system="Be brief.")
    assert _converse(session, "Hello", "How are you?") == "Hi.\nFine.\n"
    assert model.prompts[0] == "[system:Be brief.][user:Hello][assistant:"
    assert model.prompts[1] == (
        "[system:Be brief.][user:Hello][assistant:Hi.][user:How are you?][assistant:"
    )
    assert model.turns == [0, 1]


def test_thinking_is_kept_apart_in_the_history() -> None:
    session = _session(Scripted("<think>Hm</think>Yes."))
    assert _converse(session, "Well?") == "<think>Hm</think>Yes.\n"
    answer = session.messages[-1]
    assert (answer["content"], answer["reasoning_content"]) == ("Yes.", "Hm")


def test_commands(tmp_path: Path) -> None:
    model = Scripted("A.", "B.", "C.")
    session = _session(model)
    saved = tmp_path / "talk.jsonl"
    _converse(
        session, "one", f"/save {saved}", "/reset", "two", "/system New.", "three", "/quit", "x"
    )
    assert model.prompts[1] == "[user:two][assistant:"
    assert model.prompts[2] == "[system:New.][user:three][assistant:"
    assert json.loads(saved.read_text())["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "A."},
    ]
    assert model.texts == []  # nothing was asked after /quit


def test_two_slashes_are_text_and_an_unknown_command_is_an_error() -> None:
    model = Scripted("A.")
    assert _converse(_session(model), "", "   ", "//etc/hosts is what?") == "A.\n"
    assert model.prompts == ["[user:/etc/hosts is what?][assistant:"]
    with pytest.raises(ValueError, match=r"'/rest'.*/reset"):
        _converse(_session(Scripted()), "/rest")


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    model = Scripted()
    with pytest.raises(ValueError, match=r"conversation is 61 tokens.*context 61.*no room"):
        _converse(_session(model, context=61), "x" * 43)
    assert model.prompts == []


def test_a_reply_ends_where_the_context_or_the_limit_does_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _converse(_session(Scripted("y" * 99), context=71), "x" * 43) == "y" * 10 + "\n"
    assert _converse(_session(Scripted("y" * 99), max_new_tokens=4), "x") == "yyyy\n"
    said = capsys.readouterr().err
    assert said == "[cut off after 10 tokens]\n[cut off after 4 tokens]\n"


def test_a_refused_turn_is_forgotten_and_on_a_terminal_the_chat_goes_on() -> None:
    model, errors = Scripted("A.", "B."), []
    session = _session(model)
    out = _converse(session, "one", "forbidden", "two", on_error=errors.append)
    assert out == "A.\nB.\n"
    assert [str(e) for e in errors] == ["the template refuses this conversation"]
    assert model.prompts[1] == "[user:one][assistant:A.][user:two][assistant:"
    with pytest.raises(ValueError, match="refuses"):  # piped: the rest would answer another chat
        _converse(_session(Scripted("A.")), "forbidden", "two")


def test_an_interrupted_reply_is_forgotten() -> None:
    model = Scripted("B.")

    def interrupted(*args: object) -> list[int]:
        session.generate = model
        raise KeyboardInterrupt

    session, errors = _session(model), []
    session.generate = interrupted
    assert _converse(session, "one", "two", on_error=errors.append) == "\nB.\n"
    assert model.prompts == ["[user:two][assistant:"]
    assert len(errors) == 1


def test_show_tokens_prints_what_went_in_and_what_came_out() -> None:
    out = _converse(_session(Scripted("A.")), "x", show_tokens=True)
    assert json.loads(out.splitlines()[1]) == {
        "prompt": [ord(c) for c in "[user:x][assistant:"],
        "reply": [ord("A"), ord("."), END],
    }


def test_a_reply_cannot_steer_the_terminal() -> None:
    assert chat.visible("a\x1b[2Jb\tc\nd\x07é") == "a\ufffd[2Jb\tc\nd\ufffdé"


@pytest.fixture
def talk(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """Pipes lines into `posttrain chat` of the golden model: (exit code, output lines, errors)."""

    def run(typed: str, *settings: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        model = f"model.path={data_dir / 'golden/model'}"
        code = main(["chat", model, "model.dtype=float32", "show_tokens=true", *settings])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def _tokens(lines: list[str]) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in lines if line.startswith('{"prompt": ')]


def test_a_scripted_conversation_on_a_real_folder(talk: Callable, data_dir: Path) -> None:
    code, lines, _ = talk("Who is <|im_end|>?\nAnd why?\n", "max_new_tokens=6", "system=Be kind.")
    assert code == 0
    first, second = _tokens(lines)
    bare = Tokenizer.from_file(str(data_dir / "golden/model/tokenizer.json"))
    start, end = bare.token_to_id("<|im_start|>"), bare.token_to_id("<|im_end|>")

    def ids(text: str) -> list[int]:
        return bare.encode(text, add_special_tokens=False).ids

    system = [start, *ids("system\nBe kind."), end, *ids("\n")]
    assert first["prompt"][: len(system)] == system
    assert first["prompt"].count(end) == 2  # of system and user: the typed one is plain text
    assert bare.decode(first["prompt"], skip_special_tokens=False).endswith(
        "<|im_start|>user\nWho is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert 1 <= len(first["reply"]) <= 6
    assert second["prompt"][: len(first["prompt"])] == first["prompt"]
    history = bare.decode(second["prompt"], skip_special_tokens=False)
    assert history.endswith("<|im_start|>user\nAnd why?<|im_end|>\n<|im_start|>assistant\n")


def test_sampling_repeats_with_its_seed_and_differs_with_another(talk: Callable) -> None:
    sample = ("max_new_tokens=8", "temperature=1", "prompt=Hello")
    first, again, other = (talk("", *sample, f"seed={seed}")[1] for seed in (1, 1, 2))
    assert len(_tokens(first)) == 1
    assert first == again
    assert _tokens(first) != _tokens(other)
    assert _tokens(first)[0]["prompt"] == _tokens(other)[0]["prompt"]


def test_the_commands_exit_code_tells_a_conversation_that_is_too_long(talk: Callable) -> None:
    code, lines, err = talk("word " * 2100 + "\nnever asked\n", "max_new_tokens=2")
    assert code == 1
    assert lines == []
    assert "no room for a reply" in err
    assert "2048" in err
