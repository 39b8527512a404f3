"""The reference of preference losses: the log-probs of the parameters that training started from.

cached  one pass before training over the examples that the run's plans use and that nobody has
        computed yet; the results lie beside the prepared data (train/reference_store.py)
live    a second set of the trained parameters on the mesh (of what is frozen there is one copy),
        computed with in every step

Neither is in a checkpoint: <run_dir>/reference.json names the weights, and a resumed run has the
same reference, or says that it has not.

Shape suffixes: B rows, T positions, S segments of a row; n examples of a pass.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from posttrain import sharding
from posttrain.checkpoint import is_primary
from posttrain.data.cache import Cache
from posttrain.data.plan import BatchConfig, Plan
from posttrain.metrics import Progress
from posttrain.mirror import local_of
from posttrain.models.adapters import without_fresh
from posttrain.models.head import trained_targets
from posttrain.models.nested import join
from posttrain.train.loop import PREEMPTED, Preemption
from posttrain.train.offline import OfflineSource
from posttrain.train.parts import Parts
from posttrain.train.reference_store import Store, fingerprint
from posttrain.types import Batch, Example

ReferenceMode = Literal["cached", "live"]
VERSION = 2  # of the numbers: a change of the model's arithmetic that moves them raises it
_FIRST_PART, _LAST_PART = 0.5, 30.0  # seconds between parts: twice as long each time, up to this
_POLL = 0.5  # seconds between looks for parts that another host wrote


@dataclass(frozen=True)
class References:
    """The reference of a run: live parameters, or a store for each of its caches, or nothing."""

    live: Any = None
    stores: tuple[Store | None, ...] = ()


def make_references(
    parts: Parts,
    sets: Sequence[tuple[Cache, Plan]],
    mode: ReferenceMode | None,
    starting: Callable[[], Any],
    resuming: bool,
) -> References:
    """The reference for these data. Where the loss needs none: nothing.

    starting: loads the parameters that training started from. A resumed run whose log-probs are
    all there does not ask for them. ValueError where they are no longer those that it started from.
    """
    nothing = References(stores=(None,) * len(sets))
    if mode is None or "reference_logps" not in parts.cfg.loss.needs:
        return nothing
    if mode == "live":
        return References(live_reference(parts, starting, resuming), nothing.stores)
    recorded = _recorded(parts, resuming)
    params, weights = (None, recorded) if recorded else _same(parts, starting, recorded)
    stores = [_store(parts, cache, weights) for cache, _ in sets]
    for (cache, plan), store in zip(sets, stores, strict=True):
        store.refresh()  # a set may be the one before it under another name
        missing = _missing(plan, store)
        if missing.any():
            params = _same(parts, starting, recorded)[0] if params is None else params
            _compute(parts, cache, plan, store, missing, params)
    _record(parts, weights)
    return References(None, tuple(stores))


def live_reference(parts: Any, starting: Callable[[], Any], resuming: bool) -> Any:
    """The parameters of a live reference: those of `starting`, of what is trained a copy.

    parts: anything with a cfg and a split of the parameters. ValueError where a resumed run began
    with others.
    """
    params, weights = _same(parts, starting, _recorded(parts, resuming))
    trained, frozen = parts.split(params)
    live = join(live_copy(trained, parts.cfg.model.dtype), frozen)
    _record(parts, weights)
    return live


def _recorded(parts: Any, resuming: bool) -> str | None:
    """The fingerprint of the reference that a resumed run began with."""
    file = parts.cfg.run_dir / "reference.json"
    return json.loads(file.read_text())["weights"] if resuming and file.exists() else None


def _same(parts: Any, starting: Callable[[], Any], recorded: str | None) -> tuple[Any, str]:
    """(parameters, fingerprint) of what the run started from."""
    params = starting()
    found = fingerprint(without_fresh(params))
    if recorded not in (None, found):
        raise ValueError(
            f"{parts.cfg.run_dir}: the run's reference is what it started from, and "
            f"{parts.cfg.checkpoint.init_from or parts.cfg.model.path} holds other weights "
            "now: put those back, or start a new run in another run_dir"
        )
    return params, found


def _record(parts: Any, weights: str) -> None:
    if is_primary():
        file = parts.cfg.run_dir / "reference.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"weights": weights}) + "\n")
        temporary.replace(file)


def live_copy(params: Any, dtype: str) -> Any:
    """A copy that survives the donation of the first, in the compute dtype where that is smaller.

    Every matmul casts its weights to it first, so the log-probs are the same to the bit; norms
    multiply in float32 and keep their scales as they are.
    """
    layout = jax.tree.map(lambda p: p.sharding, params)
    return jax.jit(functools.partial(_copied, dtype=dtype), out_shardings=layout)(params)


def abstract_live_copy(params: Any, dtype: str) -> Any:
    """Its shapes, dtypes and shardings, of abstract parameters."""
    shapes = jax.eval_shape(functools.partial(_copied, dtype=dtype), params)
    return jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), shapes, params
    )


def _copied(params: Any, dtype: str) -> Any:
    def copy(path: Any, p: jax.Array) -> jax.Array:
        norm = "norm" in jax.tree_util.keystr(path)
        smaller = jnp.dtype(dtype).itemsize < p.dtype.itemsize
        return jnp.copy(p.astype(dtype) if smaller and not norm else p)

    return jax.tree_util.tree_map_with_path(copy, params)


def _store(parts: Parts, cache: Cache, weights: str) -> Store:
    model = parts.cfg.model
    platform = parts.mesh.devices.flat[0].platform  # TPUs multiply float32 in other ways
    precision = jax.config.values.get("jax_default_matmul_precision")  # unless asked not to
    what = [VERSION, cache.content, weights, repr(parts.model.spec), model.dtype, platform]
    what.append(precision)
    key = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
    return Store(local_of(parts.cfg.data.cache_dir) / "reference" / key, cache.trained)


def _missing(plan: Plan, store: Store) -> np.ndarray:
    """bool [N]: examples that the plan uses and the store lacks, as process 0 sees it."""
    used = np.zeros(len(store.present), bool)
    for step in range(plan.steps):
        used[plan.examples(step)] = True
    return _as_primary(used & ~store.present)


def _as_primary(mask: np.ndarray) -> np.ndarray:
    """Process 0's array, on every process: hosts may see a shared folder at different times."""
    if jax.process_count() == 1:
        return mask
    return np.asarray(multihost_utils.broadcast_one_to_all(mask))


class _View:
    """Some examples of a cache, each for itself: what a Plan and a Pipeline read."""

    def __init__(self, cache: Cache, ids: Int[np.ndarray, " n"]):
        self.sides, self.source_names = 1, ["reference"]
        self.ids, self._cache = ids, cache
        self.lengths, self.trained = cache.lengths[ids], cache.trained[ids]
        self.source_ids = np.zeros(len(ids), np.int32)

    def read(self, ids: Sequence[int], /) -> list[Example]:
        return self._cache.read(self.ids[np.asarray(ids, np.int64)].tolist())


def _compute(
    parts: Parts, cache: Cache, plan: Plan, store: Store, missing: np.ndarray, params: Any
) -> None:
    """The pass: full rows of the missing examples, forward alone; process 0 writes parts.

    Raises SystemExit(PREEMPTED) when it is told to stop, with what it has written down.
    """
    laid_out = _as_primary(store.begin(missing) if is_primary() else missing)
    view = _View(cache, np.flatnonzero(laid_out))
    rows = min(plan.micro_rows, len(view.ids))
    batch = BatchConfig(rows=rows, order="sequential", threads=plan.batch.threads)
    shards = sharding.batch_shards(parts.mesh)
    ahead = Plan(view, batch, seq_len=plan.seq_len, seed=0, epochs=1, batch_shards=shards)
    wanted = [missing[view.ids[ahead.examples(k)]] for k in range(ahead.steps)]
    first = next(k for k, mask in enumerate(wanted) if mask.any())
    forward = parts.forward(ahead, 1)

    def said(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        micro = jax.tree.map(lambda x: x[0], batch)
        trained_BT = trained_targets(micro.segment_ids, micro.loss_weights)
        return forward.outputs(params, micro).logps, trained_BT

    step = jax.jit(said, out_shardings=sharding.replicated(parts.mesh))
    if is_primary():
        names = ", ".join(cache.source_names)
        print(f"reference: log-probs of {missing.sum():,} examples ({names})", flush=True)
    source = OfflineSource(view, ahead, parts.mesh, first)
    progress = Progress(
        "reference", ahead.steps, first, every=parts.cfg.log.every, primary=is_primary()
    )
    writer, preemption, stopped = _PartWriter(store), Preemption(), False
    pending: tuple[int, Any] | None = None
    began, tokens = time.monotonic(), 0

    def collect(k: int, out: Any) -> None:
        nonlocal tokens
        jax.block_until_ready(out)
        layout = ahead.layout(k)[0]
        tokens += int(view.lengths[layout[layout >= 0]].sum())
        if is_primary():
            for i, logps in _cut(view, layout, *jax.device_get(out)):
                if missing[i]:
                    writer.add(i, logps, cache)
            writer.write_if_due()
        rate = tokens / (time.monotonic() - began)
        progress.update(k + 1, f"{rate:,.0f} tok/s")

    try:
        for k in range(first, ahead.steps):
            batch_k = source.next()
            out = (k, step(params, batch_k)) if wanted[k].any() else None
            if pending is not None:  # the host runs one step ahead of the devices
                collect(*pending)
            pending = out
            if stopped := preemption.reached():
                break
        if pending is not None:
            collect(*pending)
    finally:
        preemption.close()
        progress.close()
        source.close()
        writer.write()
    if stopped:
        raise SystemExit(PREEMPTED)
    _await(plan, store, parts.cfg.data.wait_minutes)


def _cut(
    view: _View, layout_BS: np.ndarray, logps_BT: np.ndarray, trained_BT: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    """(id in the cache, float32 [trained tokens]) of each segment."""
    found = []
    for row, members in enumerate(layout_BS):
        start = 0
        for i in members[members >= 0].tolist():
            end = start + int(view.lengths[i])
            mask = trained_BT[row, start:end]
            found.append((int(view.ids[i]), logps_BT[row, start:end][mask]))
            start = end
    return found


class _PartWriter:
    """Gathers log-probs and writes a part now and then; used by process 0 alone."""

    def __init__(self, store: Store):
        self._store = store
        self._ids: list[int] = []
        self._logps: list[np.ndarray] = []
        self._pause, self._last = _FIRST_PART, time.monotonic()

    def add(self, i: int, logps: np.ndarray, cache: Cache) -> None:
        if not np.isfinite(logps).all():
            raise FloatingPointError(f"{cache.place(i)}: the reference's log-probs are not finite")
        self._ids.append(i)
        self._logps.append(logps)

    def write_if_due(self) -> None:
        if time.monotonic() - self._last > self._pause:
            self.write()
            self._pause, self._last = min(2 * self._pause, _LAST_PART), time.monotonic()

    def write(self) -> None:
        if self._ids:
            self._store.add(self._ids, self._logps)
            self._ids, self._logps = [], []


def _await(plan: Plan, store: Store, minutes: float) -> None:
    """Until this process sees what process 0 wrote. ValueError: it does not in time."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the reference is written")
    used = np.unique(np.concatenate([plan.examples(step) for step in range(plan.steps)]))
    end = time.monotonic() + 60 * minutes
    store.refresh()
    while not store.present[used].all():
        if time.monotonic() > end:
            raise ValueError(
                f"waited {minutes:g} minutes for the reference log-probs that the first host wrote "
                f"to {store.folder}: is data.cache_dir shared by all hosts?"
            )
        time.sleep(_POLL)
        store.refresh()
    if is_primary():
        store.finish()
