"""How conversations become text, and what of them is trained."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config import Config, semantic


class ChatConfig(Config):
    """The chat template and the masks."""

    template: str | None = semantic(
        None, help="chat template: none = the model's own, a file, or a name (chatml, llama3)"
    )
    train_on: Literal["all", "last"] = semantic(
        "all", help="assistant turns trained, each times its message's `weight` (1 if it has none)"
    )
    train_thinking: bool = semantic(True, help="train the thinking at the head of a turn")
    train_tail: bool = semantic(
        False, help="train what the template writes after a turn's stop token (a newline, mostly)"
    )
    dropped_thinking: Literal["split", "refuse"] = semantic(
        "split",
        help="where a template drops the thinking of earlier turns: split into one example per "
        "turn, or refuse the conversation",
    )
    stop: tuple[str, ...] = semantic((), help="more tokens that end a turn")
    template_kwargs: dict[str, Any] = semantic(
        {}, help="variables for the template, such as enable_thinking"
    )
    date: str = semantic("2025-01-01", help="the day that strftime_now says, as YYYY-MM-DD")
    assistant_tokens: tuple[str, ...] = semantic(
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        help="added tokens that stay tokens where an assistant's own text holds them",
    )
    text_control_tokens: bool = semantic(
        False, help="control tokens typed in plain text and prompt/completion rows are tokens"
    )
