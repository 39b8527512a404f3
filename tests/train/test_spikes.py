"""Which steps are spikes, against numpy; what is written of them; what passing over a step does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain import sharding
from posttrain.optim import OptimConfig, make_optimizer
from posttrain.train.config import FaultsConfig
from posttrain.train.spikes import Diverged, FaultLog, Watch, passed_over
from posttrain.train.state import new_state

CFG = FaultsConfig(on_spike="rollback", spike_window=16, spike_deviations=6.0)


def found_by(watch: Watch, losses: np.ndarray, norms: np.ndarray) -> list[int]:
    """The steps that diverge, from 0; each is left out of the window."""
    bad = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        try:
            watch.look(step, {"loss": float(loss), "grad_norm": float(norm)})
        except Diverged as found:
            bad.append(found.step)
    return bad


def by_hand(losses: np.ndarray, norms: np.ndarray) -> list[int]:
    good: list[int] = []
    for step in range(len(losses)):
        before = good[-16:]
        high = False
        for values in (losses, norms) if len(before) == 16 else ():
            usual = values[before].astype(np.longdouble)
            middle = np.sort(usual)[7:9].mean()
            spread = 1.4826 * np.sort(abs(usual - middle))[7:9].mean()
            high |= bool(values[step] > middle + 6 * max(spread, 0.01 * abs(middle)))
        if not high:
            good.append(step)
    return sorted({*range(len(losses))} - {*good})


def test_spikes_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    losses, norms = 2 + 0.1 * rng.standard_normal((2, 300))
    losses[[5, 40, 41, 120]] += 3  # the first comes before the window is full
    norms[[60, 200]] += 5
    losses[150] -= 3  # low is no spike
    want = by_hand(losses, norms)
    assert {40, 41, 60, 120, 200} <= {*want}
    assert 5 not in want
    assert found_by(Watch(CFG, {}), losses, norms) == want


def test_a_resumed_watch_finds_the_same() -> None:
    rng = np.random.default_rng(1)
    losses, norms = 2 + 0.1 * rng.standard_cauchy((2, 100))
    whole = found_by(Watch(CFG, {}), losses, norms)
    first = Watch(CFG, {})
    before = found_by(first, losses[:50], norms[:50])
    notes = json.loads(json.dumps(first.notes()))
    after = found_by(Watch(CFG, notes), losses[50:], norms[50:])
    assert before + [50 + step for step in after] == whole
    assert any(step >= 50 for step in whole)


def test_a_flat_loss_has_some_room() -> None:
    watch = Watch(CFG, {})
    flat = np.full(17, 2.0)
    flat[16] = 2.11  # 5.5% above; 6 x 1% is a spike
    assert found_by(watch, flat, np.ones(17)) == []
    with pytest.raises(Diverged, match=r"loss is 2\.13, 6\.5 deviations of 0\.02 above 2, the med"):
        watch.look(17, {"loss": 2.13, "grad_norm": 1.0})


@pytest.mark.parametrize("cfg", [CFG, FaultsConfig()])
@pytest.mark.parametrize("metrics", [{"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0},
                                     {"loss": 1.0, "grad_norm": math.inf}])  # fmt: skip
def test_what_is_no_number_is_found_always(cfg: FaultsConfig, metrics: dict[str, float]) -> None:
    with pytest.raises(Diverged) as found:
        Watch(cfg, {}).look(1, metrics)
    assert found.value.kind == "nonfinite"


def test_spikes_are_ignored_unless_asked_for() -> None:
    rng = np.random.default_rng(2)
    losses, norms = rng.standard_cauchy((2, 300)) ** 2
    watch = Watch(FaultsConfig(), {})
    assert found_by(watch, losses, norms) == []
    assert watch.notes() == {}


def test_the_log_says_what_was_left_out_and_is_read_again(tmp_path: Path) -> None:
    log = FaultLog(tmp_path)
    assert log.skipped == set()
    found = Diverged(7, "nonfinite", "loss is nan", {"loss": math.nan, "grad_norm": 2.5})
    found.examples = np.array([3, 9], np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    log.write(found, "rollback", 4)
    log.write(Diverged(9, "spike", "loss is 9", {"loss": 9.0, "grad_norm": 1.0}), "stop", 8)
    again = FaultLog(tmp_path)
    assert again.skipped == log.skipped == {7}
    first, second = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert first["examples"] == [3, 9]
    assert (first["loss"], first["grad_norm"], first["checkpoint"]) == ("nan", 2.5, 4)
    assert (second["action"], second["step"], second["fault"]) == ("stop", 9, "spike")


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_a_step_that_is_passed_over_moves_the_schedule_alone(kind: Any) -> None:
    """The next update, on the same gradient, is what optax gives at the next step's rate."""
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2), jax.devices()[:2])
    cfg = OptimConfig(type=kind, schedule="linear", warmup=0, lr=1.0, weight_decay=0.0)
    tx = make_optimizer(cfg, 10)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp")))  # noqa: E731
    params = {"layers": {"norm": put(np.arange(4.0, dtype=np.float32))}}
    grads = jax.tree.map(jnp.ones_like, params)
    state = new_state(params, tx)
    kept = jax.tree.map(np.array, (state.params, state.opt_state))
    before = [x.sharding for x in jax.tree.leaves((state.params, state.opt_state))]
    moved = passed_over(state)
    assert int(moved.step) == 1
    layouts = [x.sharding for x in jax.tree.leaves((moved.params, moved.opt_state))]
    assert layouts == before
    same = jax.tree.map(np.array_equal, kept[0], jax.tree.map(np.asarray, moved.params))
    assert all(jax.tree.leaves(same))

    def update(opt_state: Any) -> np.ndarray:
        made: Any = tx.update(grads, opt_state, moved.params)[0]
        return np.asarray(made["layers"]["norm"])

    # linear to 0 over 10 steps
    np.testing.assert_allclose(update(moved.opt_state) / update(kept[1]), 0.9, rtol=1e-5)
    counts = [s.count for s in jax.tree.leaves(moved.opt_state, is_leaf=_adam) if _adam(s)]
    assert all(int(count) == 0 for count in counts)


def _adam(part: object) -> bool:
    return isinstance(part, optax.ScaleByAdamState)
