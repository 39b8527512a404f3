"""Rewards against TRL's, on answers of many lengths and forms."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.rewards.base import Cosine
from posttrain.rewards.length import Overlong
from posttrain.rewards.math import Math
from posttrain.rewards.repetition import Repetition
from posttrain.rewards.think import Think
from posttrain.rewards.total import cosine_scaled
from tests.rewards.rollouts import rollout

pytestmark = pytest.mark.parity
pytest.importorskip("trl")

LENGTHS = [0, 1, 25, 50, 79, 80, 81, 90, 99, 100, 101, 110, 1000]


def test_overlong_and_cosine():
    from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

    ids = [[1] * length for length in LENGTHS]
    ours = Overlong(max_length=100, cache=20)
    theirs = get_soft_overlong_punishment(100, 20)(ids)
    assert [ours(rollout(length=n)) for n in LENGTHS] == pytest.approx(theirs)
    cosine = get_cosine_scaled_reward(max_len=100)
    for text, value in (("4", 1.0), ("5", 0.0)):
        said = [[{"role": "assistant", "content": rf"\boxed{{{text}}}"}]] * len(ids)
        want = cosine(said, ["$4$"] * len(ids), ids)
        got = [cosine_scaled(Cosine(max_length=100), value, n) for n in LENGTHS]
        assert got == pytest.approx(want)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repetition(n):
    from trl.rewards import get_repetition_penalty_reward

    rng = np.random.default_rng(n)
    answers = [rng.integers(0, 3, size).tolist() for size in (0, 1, 2, 5, 30)]
    want = get_repetition_penalty_reward(n, -1.0)(answers)
    texts = [" ".join(map(str, ids)) for ids in answers]
    assert [Repetition(n=n)(rollout(text)) for text in texts] == pytest.approx(want)


def test_thinking_and_mathematics():
    """Where TRL's looser form (empty thoughts, tags in the answer) does not matter."""
    from trl.rewards import accuracy_reward, think_format_reward

    texts = ["<think>a</think>4", "<think>a\nb</think>\n4", "a</think>4", "<think>a", "4"]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert [Think()(rollout(text)) for text in texts] == think_format_reward(said)
    pairs = [
        (r"\boxed{\frac{1}{2}}", r"$\frac{2}{4}$"),
        (r"\boxed{0.5}", r"$\frac{1}{2}$"),
        (r"\boxed{\frac{1}{3}}", r"$\frac{1}{2}$"),
        (r"$x = 3$, so \boxed{3}", "$3$"),
        (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$"),
        (r"\boxed{2\pi}", r"$2\pi$"),
        (r"\boxed{(1, 2)}", "$(2, 1)$"),
    ]
    said = [[{"role": "assistant", "content": text}] for text, _ in pairs]
    want = accuracy_reward(said, [right for _, right in pairs])
    assert [Math(workers=1)(rollout(*pair)) for pair in pairs] == want
