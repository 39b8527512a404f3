"""What is asked of a sampler and what it gives back: the types between engines and their users.

No JAX here: an engine may be a server at the other end of a wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from posttrain.config import Config, semantic
from posttrain.types import Conversation


class Sampling(Config):
    """How answers are drawn, in this order: penalties, bias, temperature, top_k, top_p, min_p."""

    max_new_tokens: int = semantic(512, ge=1, help="longest answer, in tokens")
    temperature: float = semantic(
        1.0, ge=0, allow_inf_nan=False, help="logits are divided by it; 0: the most probable token"
    )
    top_k: int = semantic(0, ge=0, help="from this many most probable tokens; 0 = all")
    top_p: float = semantic(
        1.0, gt=0, le=1, help="from the fewest tokens whose probabilities sum to this"
    )
    min_p: float = semantic(
        0.0, ge=0, le=1, help="from tokens at least this probable, as a part of the most probable's"
    )
    repetition_penalty: float = semantic(
        1.0,
        gt=0,
        allow_inf_nan=False,
        help="logits of tokens that prompt or answer hold: divided by it if positive, else "
        "multiplied (CTRL, arXiv:1909.05858, section 4.1, as transformers has it)",
    )
    presence_penalty: float = semantic(
        0.0, allow_inf_nan=False, help="taken off the logits of tokens that the answer holds"
    )
    logit_bias: dict[int, Annotated[float, Field(allow_inf_nan=False)]] = semantic(
        {}, help="token id -> what is added to its logit"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = semantic(
        (), help="texts that end an answer, with the token that completes them"
    )


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered. Of n completions the draws of the which-th depend on
    (seed, which, how many tokens came before) alone."""

    tokens: Sequence[int]
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1
    conversation: Conversation | None = None  # what the tokens say, for engines that render it


def alike(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[Request]:
    """One request a prompt, each with draws of its own. seed: under 2**32."""
    stops = tuple(stop_ids)
    return [Request(p, sampling, stops, seed=seed << 32 | i) for i, p in enumerate(prompts)]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after the prompt, one log-prob a token.

    finish: stop = by a stop token, which is the last of the tokens, or a stop string; length = at
    max_new_tokens.
    """

    tokens: list[int]
    logps: list[float]  # of the distribution that was drawn from; greedy: 0
    plain_logps: list[float]  # of the model itself: temperature 1, nothing filtered or biased
    finish: Literal["stop", "length"]


OnDone = Callable[[int, int, Completion], Request | None]
"""Called with (index of the request, which of its n, completion) as each completion ends, while
others are still being sampled. A Request that it gives back (n = 1) is sampled next in its place,
and its completion comes back under the same two numbers."""


class RolloutEngine(Protocol):
    """Anything that answers requests."""

    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """The last completion of each of the n of each request, in the order of the requests.

        Raises ValueError before anything runs if a request cannot be answered.
        """
        ...

    def update(self, params: Any) -> None:
        """From now on answers come from these weights: TrainState.params joined with the frozen."""
        ...
