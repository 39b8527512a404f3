"""A reward model's score of the conversation up to the answer."""

from __future__ import annotations

from typing import Literal

from posttrain.chat.config import ChatConfig
from posttrain.config import runtime, semantic
from posttrain.models.spec import ModelConfig
from posttrain.rewards.base import HandedReward


class RewardModel(HandedReward):
    """The score of a reward model: an export of `posttrain reward_model`, or any folder of
    transformers' ...ForSequenceClassification with one label.

    It reads the messages through its own template and tokenizer, not the policy's ids. Its scores
    have no scale of their own: see zscore and clip. The job loads it and hands its scores in
    (train/answer_scores.py).
    """

    model: ModelConfig = semantic(help="the reward model")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become its tokens")
    seq_len: int | None = semantic(
        None, ge=8, help="most tokens of a conversation; none = the model's context"
    )
    too_long: Literal["error", "truncate_start"] = semantic(
        "error", help="a conversation over seq_len: error, or cut off its start"
    )
    rows: int = runtime(8, gt=0, help="conversations at a time, on each device")
