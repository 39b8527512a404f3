"""Optimisers and learning-rate schedules: a config -> an optax transformation.

Gradients arrive already clipped (train/step.py clips by the global norm that it reports). Optimiser
state is float32 whatever the parameters' dtype, but for the first moment (moment_dtype).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import model_validator

from posttrain import sharding
from posttrain.config import Config, semantic

Schedule = Callable[[Any], Any]


class OptimConfig(Config):
    """AdamW unless said otherwise; the defaults are those of most published SFT recipes."""

    type: Literal["adamw", "adafactor", "muon"] = semantic("adamw", help="optimiser")
    lr: float = semantic(2e-5, gt=0, help="peak learning rate")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = semantic(
        "cosine", help="after warm-up; wsd = constant, then linear decay over the last `decay`"
    )
    warmup: float = semantic(
        0.03, ge=0, help="steps of linear warm-up; below 1 a fraction of the schedule's steps"
    )
    decay: float = semantic(
        0.2, ge=0, help="wsd: steps of the final decay; below 1 a fraction of the schedule's steps"
    )
    min_lr_ratio: float = semantic(0.0, ge=0, le=1, help="final learning rate / peak")
    schedule_steps: int | None = semantic(
        None, gt=0, help="steps that the schedule spans; none = the run's (an extended run's too)"
    )
    clip_norm: float | None = semantic(1.0, gt=0, help="global gradient norm; none = no clipping")
    b1: float = semantic(0.9, ge=0, lt=1, help="adamw, muon's adam: decay of the first moment")
    b2: float = semantic(0.999, ge=0, lt=1, help="adamw, muon's adam: decay of the second moment")
    eps: float = semantic(1e-8, gt=0, help="adamw, muon's adam: added to the denominator")
    momentum: float = semantic(0.95, ge=0, lt=1, help="muon: decay of the momentum")
    weight_decay: float = semantic(0.0, ge=0, help="decoupled, times the learning rate")
    decay_all: bool = semantic(False, help="decay norms and biases too")
    moment_dtype: Literal["float32", "bfloat16"] = semantic(
        "float32", help="storage of the first moment (adamw, muon)"
    )

    @model_validator(mode="after")
    def _warmup_and_decay_fit(self) -> OptimConfig:
        span = self.schedule_steps
        if span is not None and _steps(self.warmup, span) > span:
            raise ValueError(f"warmup {self.warmup} is longer than schedule_steps {span}")
        return self


def _steps(value: float, total: int) -> int:
    return math.ceil(value * total) if value < 1 else round(value)


def schedule(cfg: OptimConfig, total_steps: int) -> Schedule:
    """Update k (from 0) -> its learning rate, float32.

    Warm-up over w updates gives update k the rate lr * (k + 1) / w: the first is not lost to a rate
    of 0. Decays reach lr * min_lr_ratio at update total_steps, one past the last.
    """
    total = cfg.schedule_steps or total_steps
    warmup = _steps(cfg.warmup, total)
    start = max(warmup, total - _steps(cfg.decay, total)) if cfg.schedule == "wsd" else warmup

    def rate(k: Any) -> Any:
        k = jnp.asarray(k, jnp.float32)
        done = jnp.clip((k - start) / max(total - start, 1), 0, 1)
        if cfg.schedule == "constant":
            left = jnp.ones_like(done)
        elif cfg.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            left = 1 - done
        factor = cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left
        return cfg.lr * factor * jnp.minimum(1.0, (k + 1) / max(warmup, 1))

    return rate


def warnings(cfg: OptimConfig, total_steps: int) -> list[str]:
    """What the schedule does in a run of total_steps that its settings hardly meant."""
    total = cfg.schedule_steps or total_steps
    warmup, decay = _steps(cfg.warmup, total), _steps(cfg.decay, total)
    if warmup > total_steps:
        return [
            f"the warm-up of {warmup} steps is longer than the run's {total_steps}: "
            f"it ends at {total_steps / warmup:.1%} of optim.lr"
        ]
    if cfg.schedule == "wsd" and warmup + decay > total:
        return [
            f"warm-up ({warmup}) and decay ({decay}) do not fit {total} steps: "
            f"the decay gets {total - warmup}"
        ]
    return []


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def decays(path: tuple[Any, ...], cfg: OptimConfig) -> bool:
    """Whether weight decay touches the parameter at `path`: not norms and biases, by name."""
    return cfg.decay_all or not any("norm" in n or "bias" in n for n in _names(path))


def _decay_mask(cfg: OptimConfig) -> Callable[[Any], Any]:
    return lambda params: jax.tree_util.tree_map_with_path(lambda p, _: decays(p, cfg), params)


def _adamw(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        mu_dtype=cfg.moment_dtype,
        weight_decay=cfg.weight_decay,
        mask=_decay_mask(cfg),
    )


def _adafactor(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    """Shazeer & Stern 2018. optax adds weight decay after the learning rate: scaled here."""
    steps: list[optax.GradientTransformation] = [
        optax.adafactor(learning_rate=None, min_dim_size_to_factor=128)
    ]
    # optax.adafactor ends with a sign flip: decay is subtracted with it, then both are scaled
    steps.append(optax.add_decayed_weights(-cfg.weight_decay, _decay_mask(cfg)))
    steps.append(optax.scale_by_schedule(rate))
    return optax.chain(*steps)


def _muon(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    """Jordan et al. 2024: matrices of the layers orthogonalised, the rest by Adam.

    Each layer's matrix, and each expert's, is orthogonalised by itself (stacked dims are batch
    dims), and updates are scaled to Adam's RMS (0.2 * sqrt(max dim), Liu et al. 2025), so that one
    lr serves both.
    """
    numbers = optax.contrib.MuonDimensionNumbers
    dims: dict[str, Any] = {
        **dict.fromkeys(("q", "k", "v"), numbers(1, (2, 3))),  # [L, D, heads, head_dim]
        "o": numbers((1, 2), 3),  # [L, heads, head_dim, D]
        **dict.fromkeys(("gate", "up", "down"), numbers(1, 2)),  # [L, in, out]
    }
    experts: dict[str, Any] = dict.fromkeys(
        ("gate", "up", "down"), numbers(2, 3)
    )  # [L, experts, in, out]

    def matrix(path: tuple[Any, ...], _: Any) -> Any:
        names = _names(path)
        return (experts if "moe" in names else dims).get(names[-1])

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(matrix, params)

    def labels(params: Any) -> Any:
        def kind(path: tuple[Any, ...], leaf: Any) -> str:
            return "adam" if matrix(path, leaf) is None else "muon"

        return jax.tree_util.tree_map_with_path(kind, params)

    # optax.contrib.muon's own Adam has Nesterov momentum and decays norms: ours takes the rest
    muon = optax.contrib.muon(
        rate,
        beta=cfg.momentum,
        mu_dtype=cfg.moment_dtype,
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )
    return optax.partition({"muon": muon, "adam": _adamw(cfg, rate)}, labels)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
}


def make_optimizer(cfg: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The transformation whose updates are added to the parameters, for a run of total_steps."""
    return OPTIMIZERS[cfg.type](cfg, schedule(cfg, total_steps))


def init_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """The optimiser's state, float32 also for bfloat16 parameters, laid out like the parameters.

    Call it on concrete sharded arrays: each leaf that has a parameter's shape gets its sharding.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(tx, params))
    return jax.jit(lambda: tx.init(_as_float32(params)), out_shardings=shardings)()


def abstract_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Its shapes, dtypes and shardings, of parameters that may be as abstract."""
    shapes = jax.eval_shape(lambda p: tx.init(_as_float32(p)), params)
    shardings = state_shardings(shapes, params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), tree)


def state_shardings(opt_state: Any, params: Any) -> Any:
    """A sharding per leaf of the (abstract) optimiser state; `params` carry their own.

    A leaf is a parameter's if its path ends with the parameter's path (optax keeps the tree of
    parameters inside its own) and it has its shape; every other leaf is replicated.
    """
    known = {tuple(_names(path)): p for path, p in jax.tree_util.tree_leaves_with_path(params)}
    whole = sharding.replicated(next(iter(known.values())).sharding.mesh)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(_names(path))
        for start in range(len(names)):
            p = known.get(names[start:])
            if p is not None and p.shape == leaf.shape:
                return p.sharding
        return whole

    return jax.tree_util.tree_map_with_path(one, opt_state)
