"""Talk to a model in the terminal: its own chat template, its own stop tokens, text as it comes.

The conversation is rendered by the same code as the training data, so what is typed cannot contain
control tokens. On a terminal it is a dialogue; otherwise each line of standard input is one user
turn and standard output holds the replies alone, one after the other. A line that starts with a
slash is a command (with two slashes: text that starts with one):

    /reset           forget the conversation
    /system [TEXT]   set (or drop) the system prompt, and start anew
    /save FILE       append the conversation to FILE, one JSON line {"messages": [...]}
    /quit            leave (so does the end of the input)

What does not fit the model's context is refused before anything runs. It leaves out: tools (a reply
that calls one is shown and kept, nothing is run) and serving over the network.

    posttrain chat model.path=runs/sft/export temperature=0.7
    posttrain chat model.path=MODEL prompt="Why is the sky blue?"
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from posttrain import config
from posttrain.chat.template import ChatConfig
from posttrain.chat.transcript import visible
from posttrain.config import runtime, semantic
from posttrain.models.spec import ModelConfig
from posttrain.sampling.turns import stops
from posttrain.sharding import MeshConfig

COMMANDS = ("/reset", "/system", "/save", "/quit")


class Config(config.Config):
    """A chat."""

    job: Literal["chat"] = semantic("chat", help="names the job")
    model: ModelConfig = semantic(help="who answers")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    system: str = semantic("", help="system prompt; empty: none of ours")
    prompt: str | None = semantic(None, help="one question: answer it and leave")
    temperature: float = semantic(0.0, ge=0, help="0 = greedy: always the most probable token")
    top_p: float = semantic(
        1.0, gt=0, le=1, help="sample from the most probable tokens that sum to this"
    )
    top_k: int = semantic(0, ge=0, help="sample from this many most probable tokens; 0 = all")
    seed: int = semantic(0, ge=0, help="of sampling; turn k of a conversation draws from (seed, k)")
    max_new_tokens: int = semantic(
        512, gt=0, help="longest reply; it also ends where the model's context does"
    )
    show_tokens: bool = runtime(
        False, help='after each reply, a line {"prompt": [ids], "reply": [ids]}'
    )
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")


Generate = Callable[[list[int], int, int, Callable[[int], None]], list[int]]
"""(prompt, most new tokens, turn, called with each new token) -> the new tokens, stop included."""


@dataclass(frozen=True)
class Turn:
    """What was asked and answered, in tokens; `reply` ends with the stop token if it `stopped`."""

    prompt: list[int]
    reply: list[int]
    stopped: bool


@dataclass
class Session:
    """A conversation under way. `messages` is its history in the form of the training data."""

    template: Any
    tokenizer: Any
    generate: Generate
    context: int
    max_new_tokens: int = 512
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, write: Callable[[str], None]) -> Turn:
        """One user turn: streams the reply's text to `write`, adds both to the history.

        Nothing is added if it raises: ValueError where the template refuses the conversation or
        where it does not fit the context.
        """
        from posttrain.chat.parse import parse_assistant
        from posttrain.chat.tokenizer import StreamDecoder

        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.template.generation_prompt(asked)
        room = room_for_reply(len(prompt), self.max_new_tokens, self.context)
        # thinking and tool calls stand between special tokens: show those, hide only the stop
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=False)
        stop_ids = self.template.stop_ids

        def on_token(token: int) -> None:
            if token not in stop_ids:
                write(decoder.push(token))

        turn = sum(m["role"] == "user" for m in self.messages)
        reply = self.generate(prompt, room, turn, on_token)
        write(decoder.flush())
        stopped = stops(reply, stop_ids)
        said = reply[:-1] if stopped else reply
        self.messages = [*asked, parse_assistant(self.tokenizer.decode(said))]
        return Turn(prompt, list(reply), stopped)


def room_for_reply(prompt_tokens: int, wanted: int, context: int) -> int:
    """The most tokens that the reply may have; ValueError if the prompt fills the context."""
    if prompt_tokens >= context:
        raise ValueError(
            f"the conversation is {prompt_tokens} tokens with this turn, the model's context "
            f"{context}: no room for a reply. Start anew (/reset) or say less"
        )
    return min(wanted, context - prompt_tokens)


def converse(
    session: Session,
    lines: Iterator[str],
    out: TextIO,
    *,
    show_tokens: bool = False,
    on_error: Callable[[BaseException], None] | None = None,
) -> None:
    """Takes user turns and commands from `lines` until they end or /quit.

    A turn that cannot be answered, or was interrupted, goes to `on_error` and is forgotten; without
    it the error ends the chat.
    """
    for line in lines:
        text = line.rstrip("\n")
        if not text.strip():
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                if command(session, text, out):
                    return
            else:
                text = text[1:] if text.startswith("//") else text
                answer(session, text, out, show_tokens=show_tokens)
        except (ValueError, KeyboardInterrupt) as error:
            if on_error is None:
                raise
            out.write("\n" if isinstance(error, KeyboardInterrupt) else "")
            on_error(error)


def answer(session: Session, text: str, out: TextIO, *, show_tokens: bool) -> None:
    """Writes the reply as it comes, a newline, and its tokens if they are asked for."""

    def write(piece: str) -> None:
        out.write(visible(piece))
        out.flush()

    turn = session.say(text, write)
    out.write("\n")
    if not turn.stopped:
        print(f"[cut off after {len(turn.reply)} tokens]", file=sys.stderr)
    if show_tokens:
        out.write(json.dumps({"prompt": turn.prompt, "reply": turn.reply}) + "\n")
    out.flush()


def command(session: Session, text: str, out: TextIO) -> bool:
    """Carries out a command; True for /quit. ValueError if there is none of that name."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return True
    if name == "/system":
        session.system = rest
    if name in ("/reset", "/system"):
        session.reset()
    elif name == "/save" and rest:
        with Path(rest).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": session.messages}, ensure_ascii=False) + "\n")
    else:
        known = ", ".join(COMMANDS)
        raise ValueError(f"{text!r} is not a command: there are {known} (/save needs a file)")
    return False


def open_session(cfg: Config) -> Session:
    """Loads the model and its template. ValueError as the loaders raise it."""
    import jax
    from flax import nnx

    from posttrain.sampling.engine import Engine
    from posttrain.sampling.request import Request, Sampling
    from posttrain.sharding import make_mesh
    from posttrain.train.setup import open_model, use_compile_cache

    use_compile_cache()
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        model = open_model(cfg, mesh)
        engine = Engine(nnx.merge(model.graphdef, nnx.State(model.params)), slots=1)
    for warning in model.chat.check():
        print(f"posttrain: {warning}", file=sys.stderr)

    def generate(
        prompt: list[int], room: int, turn: int, on_token: Callable[[int], None]
    ) -> list[int]:
        request = Request(
            prompt,
            Sampling(
                max_new_tokens=room,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
            ),
            stop_ids=model.chat.stop_ids,
            seed=zlib.crc32(f"{cfg.seed} {turn}".encode()),
        )
        ((found,),) = engine.generate([request], on_token=lambda _, __, token: on_token(token))
        return found.tokens

    context = model.spec.max_positions
    return Session(model.chat, model.tokenizer, generate, context, cfg.max_new_tokens, cfg.system)


def typed_lines() -> Iterator[str]:
    """Lines typed on a terminal, with editing and history; ends at Ctrl-D."""
    import readline  # noqa: F401  gives input() its line editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def run(cfg: Config) -> int:
    """The exit code: 0; errors are raised (and on a terminal told, and the chat goes on)."""
    session = open_session(cfg)
    if cfg.prompt is not None:
        answer(session, cfg.prompt, sys.stdout, show_tokens=cfg.show_tokens)
        return 0
    if not sys.stdin.isatty():
        converse(session, iter(sys.stdin), sys.stdout, show_tokens=cfg.show_tokens)
        return 0
    print(f"{cfg.model.path}: type your turn; {', '.join(COMMANDS)}", file=sys.stderr)
    converse(
        session,
        typed_lines(),
        sys.stdout,
        show_tokens=cfg.show_tokens,
        on_error=lambda error: print(f"posttrain: {error or 'interrupted'}", file=sys.stderr),
    )
    return 0
