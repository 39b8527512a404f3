"""Published recipes of learning online: what each sets in a config of `posttrain rl`.

A recipe fills the keys that the user's files leave out; every key can be set beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """paper: an arXiv id. keys: sections of the config and what is set in them. overlong: to the
    rewards is added DAPO's soft punishment of answers that fill the last fifth of what they may
    have.

    What a paper's figures depend on and no method is made of (how many prompts, how many updates on
    them, learning rates) is the config's.
    """

    paper: str
    keys: dict[str, dict[str, Any]]
    overlong: bool = False

    def parts(self, max_new_tokens: int) -> dict[str, dict[str, Any]]:
        """Parts of the rewards beside those that are there."""
        if not self.overlong:
            return {}
        cache = max(1, max_new_tokens // 5)
        return {"overlong": {"type": "overlong", "max_length": max_new_tokens, "cache": cache}}


_PLAIN_CLIP = {"type": "clip", "low": 0.2, "high": 0.2}
# Of those that take KL out: a KL of weight 0 asks for no reference model.
_NO_KL = {"coef": 0.0}

RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(
        "2402.03300",
        {
            "advantage": {"type": "grpo", "scale": "group"},
            "loss": _PLAIN_CLIP | {"aggregate": "sequence"},
            # the paper differentiates k3 itself: kl.unbiased=false
            "kl": {"coef": 0.04, "place": "loss", "estimator": "k3"},
        },
    ),
    "dr_grpo": Recipe(
        "2503.20783",
        {
            "advantage": {"type": "grpo", "scale": "none"},
            "loss": _PLAIN_CLIP | {"aggregate": "constant"},
            "kl": _NO_KL,
        },
    ),
    "dapo": Recipe(
        "2503.14476",
        {
            "advantage": {"type": "grpo", "scale": "group"},
            "loss": {"type": "clip", "low": 0.2, "high": 0.28, "aggregate": "token"},
            "kl": _NO_KL,
            # the paper has no limit; what is left after so many tries is kept
            "round": {"resample": 10, "resample_by": "right"},
        },
        overlong=True,
    ),
    "gspo": Recipe(
        "2507.18071",
        {
            "advantage": {"type": "grpo", "scale": "group"},
            "loss": {
                **{"type": "clip", "ratio": "sequence", "aggregate": "sequence"},
                **{"low": 3e-4, "high": 4e-4},
            },
            "kl": _NO_KL,
            "round": {"steps": 4},  # with one alone no ratio is ever clipped
        },
    ),
    "rloo": Recipe(
        "2402.14740",
        {
            "advantage": {"type": "rloo"},
            # the gradient of whole answers: sums over their tokens
            "loss": {"type": "reinforce", "aggregate": "constant", "length": 1},
            "kl": {"coef": 0.05, "place": "reward", "estimator": "k1"},
        },
    ),
    "reinforce_pp": Recipe(
        "2501.03262",
        {
            "advantage": {"type": "reinforce_pp", "baseline": False, "gamma": 1.0},
            "loss": _PLAIN_CLIP | {"aggregate": "token"},
            "kl": {"coef": 0.01, "place": "reward", "estimator": "k1"},
        },
    ),
    "reinforce_pp_baseline": Recipe(
        "2501.03262",
        {
            "advantage": {"type": "reinforce_pp", "baseline": True, "gamma": 1.0},
            "loss": _PLAIN_CLIP | {"aggregate": "token"},
            "kl": {"coef": 0.01, "place": "loss", "estimator": "k2"},
        },
    ),
    "cispo": Recipe(
        "2506.13585",
        {
            "advantage": {"type": "grpo", "scale": "group"},
            "loss": {"type": "cispo", "low": 0.0, "high": 5.0, "aggregate": "token"},
            "kl": _NO_KL,
        },
    ),
    "ppo": Recipe(
        "1707.06347",
        {
            "advantage": {"type": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True},
            "loss": _PLAIN_CLIP | {"aggregate": "token"},
            "kl": {"coef": 0.05, "place": "reward", "estimator": "k1"},
            "critic": {},
            "round": {"passes": 4},
        },
    ),
}
