"""Every type that crosses a folder. numpy only: the data tools run without JAX.

What flows: Conversation | Text -> Example -> Batch -> TokenOutputs -> Terms -> dict[str, Mean].
Online: Prompt -> Rollout -> Batch, and on as above.

Shape suffixes: A micro-batches of a step, B rows, T positions of a row, S segments of a row.

Alignment, everywhere: a per-token value at position t is about token t AS A TARGET (its weight in
the loss, its log-probability given the tokens before it in its segment). The first token of a
segment has nothing before it: its weight is 0, its log-probability 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Message = Mapping[str, Any]
"""role: system | user | assistant | tool; content: str (may be "" beside tool_calls).
Optional: reasoning_content: str; tool_calls: list of {"id", "type": "function", "function":
{"name": str, "arguments": dict}}; tool_call_id, name: str; weight: float (assistant only)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation in the normal form above, whatever format it came in."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for this conversation alone (enable_thinking, ...)."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text without a template: `prompt` is context, `completion` is trained and ends with EOS."""

    completion: str
    prompt: str = ""


Sample = Conversation | Text


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt: both sides conversations that open with the same messages (whose
    assistant messages have weight 0: only the answers are trained), or texts with one prompt."""

    chosen: Sample
    rejected: Sample
    margin: float = 0.0  # by how much the chosen answer is the better one, where somebody said so


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer that somebody judged by itself: desirable or not. What is judged is what the sample
    trains."""

    sample: Sample
    label: bool


DataKind = Literal["samples", "pairs", "labelled", "twinned"]
"""What the rows of a data set are: samples to imitate; pairs to prefer by; answers labelled
desirable or not; or these, each beside a mismatched twin, its prompt with another row's answer."""
TWIN = -2
"""The label of a mismatched twin."""
EXAMPLES_OF: dict[DataKind, int] = {"samples": 1, "pairs": 2, "labelled": 1, "twinned": 2}


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised sequence. loss_weights[t] is the weight of token t as a target."""

    tokens: np.ndarray  # int32 [n]
    loss_weights: np.ndarray  # float32 [n]; loss_weights[0] is 0
    margin: float = 0.0  # of the pair that it is a side of
    label: int = -1  # 1 desirable, 0 not, -1 not labelled, TWIN


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked, and what only those who judge the answer know."""

    id: str  # unique, and the same in every run: "gsm8k/train/17"
    messages: tuple[Message, ...]  # the last of them asks
    answer: Any = None  # JSON: the right answer, tests, constraints: what rewards compare with
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # the task that it belongs to


Finish = Literal["stop", "length", "turns", "template"]
"""Why an answer ended: by itself, at the limit of tokens, at the limit of turns, or with calls that
its chat template has no way to write."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to a prompt. The ids are those that were sampled: nothing is tokenised again.

    Where nobody trains on it (an answer from a server or from a file) the arrays may be empty.
    """

    prompt: Prompt
    messages: tuple[Message, ...]  # what followed the prompt; the last is the assistant's
    text: str  # of the last turn as it was sampled, without its stop token
    finish: Finish
    tokens: np.ndarray  # int32 [n]: the prompt, what was sampled, what tools returned
    loss_weights: np.ndarray  # float32 [n]; 1 where the token was sampled, else 0
    logps: np.ndarray  # float32 [n]; of sampled tokens, by the distribution drawn from; else 0
    plain_logps: np.ndarray  # float32 [n]; likewise, by the model itself
    group: int = 0  # answers to one prompt of one round share it
    version: int = 0  # updates that the policy had seen when the answer was begun
    calls: int = 0  # of tools, asked for and answered
    failed_calls: int = 0  # those that were answered with an error
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by part, as it was given
    reward: float = 0.0  # the shaped, weighted sum

    @property
    def length(self) -> int:
        """How many tokens were sampled."""
        return int(np.count_nonzero(self.loss_weights))


@dataclass(frozen=True)
class Batch:
    """One optimiser step's input: A micro-batches of B rows. A pytree (see sharding.py).

    segment_ids are 1..S within a row, 0 is padding; positions restart at 0 in each segment.
    Segment s of a row (1-based in segment_ids) is entry s-1 of the per-segment arrays.
    """

    tokens: Any  # int32 [A, B, T]
    positions: Any  # int32 [A, B, T]
    segment_ids: Any  # int32 [A, B, T]
    loss_weights: Any  # float32 [A, B, T]
    example_ids: Any  # int32 [A, B, S]; index into the cache, -1 where there is no segment
    source_ids: Any  # int32 [A, B, S]; index into the plan's source names, -1 likewise
    # Of preference pairs, None elsewhere. Both sides of a pair lie in one micro-batch, in any rows.
    pair_ids: Any = None  # int32 [A, B, S]; number of the pair in its micro-batch, -1 likewise
    chosen: Any = None  # bool [A, B, S]; the segment is the chosen side of its pair
    reference_logps: Any = None  # float32 [A, B, T]; of trained tokens by the reference, else 0
    labels: Any = None  # int8 [A, B, S]; of each segment's example, -1 likewise
    margins: Any = None  # float32 [A, B, S]; of the segment's pair, 0 where none was given
    # Of rollouts, None elsewhere; 0 where a token was not sampled.
    advantages: Any = None  # float32 [A, B, T]
    old_logps: Any = None  # float32 [A, B, T]; by the policy before the first update on the batch
    sampled_logps: Any = None  # float32 [A, B, T]; of the distribution the sampler drew from
    returns: Any = None  # float32 [A, B, T]; what a critic learns to foretell
    old_values: Any = None  # float32 [A, B, T]; what it foretold before the first update


@dataclass(frozen=True)
class TokenOutputs:
    """What the model says about each target token of one micro-batch. None: not asked for."""

    logps: Any = None  # float32 [B, T]; log p(token t | its segment before t), 0 where not computed
    entropy: Any = None  # float32 [B, T]; entropy in nats of the distribution token t came from
    correct: Any = None  # float32 [B, T]; 1 where token t was the most probable one
    log_sum_sq: Any = None  # float32 [B, T]; log sum_v p(v)^2 of the same distribution
    scores: Any = None  # float32 [B, S]; a reward model's value of each segment, 0 where none is
    values: Any = None  # float32 [B, T]; a critic's, of what comes from token t on, 0 where none is
    routing: Any = None  # Routing, of each layer that is a mixture of experts


@dataclass(frozen=True)
class Routing:
    """What a mixture's router did, summed over the real tokens of one micro-batch on all devices.

    Of one layer, or of several with a leading dim. E experts.
    """

    chosen: Any  # float32 [.., E]; how many tokens each expert was chosen by
    probs: Any  # float32 [.., E]; the router's probabilities
    z: Any  # float32 [..]; squares of logsumexp of the router's logits
    entropy: Any  # float32 [..]; entropies of its distributions, in nats
    tokens: Any  # float32 [..]; how many tokens that is


@dataclass(frozen=True)
class Mean:
    """An average that travels as (total, count): parts add up and are divided once, at the end."""

    total: Any
    count: Any

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Any:
        """total / count; NaN where the count is 0 (there is no average of nothing)."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True)
class Extremes:
    """The least and the greatest of some values; of parts, those of them all. Of nothing: inf and
    -inf. As the metric `x` it is told as min_x and max_x, as `a/x` as a/x/min and a/x/max."""

    low: Any
    high: Any

    def __add__(self, other: Extremes) -> Extremes:
        return Extremes(self.low.clip(max=other.low), self.high.clip(min=other.high))


Statistic = Mapping[str, Mean]
"""What a loss that couples the examples of a step has to know of all of them."""


@dataclass(frozen=True)
class Terms:
    """What a loss makes of one micro-batch: sum(weights * values) / sum(count), over the step.

    The arrays have one shape: [B, T] where the terms are tokens, [P] where they are pairs, [B, S]
    where they are segments.
    """

    values: Any  # float32
    weights: Any  # float32; 0 where there is no term
    source_ids: Any  # int32; the source a term belongs to, -1 for none
    metrics: dict[str, Any]  # Mean or Extremes
    count: Any = None  # float32; what each term adds to the count; None: its weight
