"""A conversation on a terminal: all of it is there, and none of it is a command to the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from posttrain.chat.transcript import transcript
from tests.chat.samples import CALL, say


def shown(prompt: list, answer: list, width: int = 60) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(transcript(prompt, answer))
    return out.getvalue()


def test_a_transcript():
    answer = [
        say("assistant", "Let me look.", reasoning_content="First\nsecond.", tool_calls=[CALL]),
        say("tool", "21", name="get_weather", tool_call_id="abcdefghi"),
        say("assistant", "It is 21."),
    ]
    assert shown([say("user", "Weather?")], answer) == (
        "  user\n"
        "  Weather?\n"
        "\n"
        "\u2502 assistant\n"
        "\u2502 First\n"
        "\u2502 second.\n"
        "\u2502 Let me look.\n"
        '\u2502 get_weather(city="Paris <x>", days=3)\n'
        "\n"
        "\u2502 tool get_weather\n"
        "\u2502 21\n"
        "\n"
        "\u2502 assistant\n"
        "\u2502 It is 21.\n"
        "\n"
    )


def test_nothing_steers_the_terminal():
    text = shown([say("user", "a\x1b[2Jb [red]c[/red] \x9b")], [])
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "a\ufffd[2Jb [red]c[/red] \ufffd" in text


def test_odd_messages_are_shown_all_the_same():
    broken = {**CALL, "function": {"name": "f", "arguments": "not an object"}}
    assert "f(not an object)" in shown([], [say("assistant", "", tool_calls=[broken])])
    assert shown([], []) == ""
