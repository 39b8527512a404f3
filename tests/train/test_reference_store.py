"""Log-probs on disk: whole parts, many writers, the oldest value read; and whose they are."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain import sharding
from posttrain.train import reference_store
from posttrain.train.reference_store import Store, fingerprint
from tests.models.tiny import MESHES, mesh_of, open_tiny

TRAINED = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)


def said(ids: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    values = [rng.uniform(-9, 0, n).astype(np.float32) for n in TRAINED]
    return [values[i] for i in ids]


def test_reads_what_was_written_by_id_in_any_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", TRAINED)
    assert not store.present.any()
    store.add([4, 0], said([4, 0]))
    store.add([7, 2, 1], said([7, 2, 1]))
    assert not store.present.any(), "parts count when they are looked for"
    store.refresh()
    assert np.flatnonzero(store.present).tolist() == [0, 1, 2, 4, 7]
    for got, want in zip(store.read([7, 0, 2, 0]), said([7, 0, 2, 0]), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == np.float32
    with pytest.raises(ValueError, match="no reference log-probs of example 3"):
        store.read([0, 3])
    again = Store(store.folder, TRAINED)
    np.testing.assert_array_equal(again.read([4])[0], said([4])[0])


def test_a_part_cut_short_is_refused_by_name_and_a_half_written_one_not_seen(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path, TRAINED)
    store.add([0, 5], said([0, 5]))
    part = next(tmp_path.glob("*.part.npy"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"{part.name}: damaged; remove it"):
        Store(tmp_path, TRAINED)
    part.rename(tmp_path / f"{part.name}.0.tmp")
    assert not Store(tmp_path, TRAINED).present.any()
    other_cache = TRAINED + 1
    (tmp_path / part.name).write_bytes(whole)
    with pytest.raises(ValueError, match="damaged"):
        Store(tmp_path, other_cache)


def test_of_two_values_the_older_is_read_by_all_for_ever(tmp_path: Path) -> None:
    """Two runs that compute the same examples differ in the last digits: a resumed run must not
    read other ones than it began with."""
    first, second = Store(tmp_path, TRAINED), Store(tmp_path, TRAINED)
    first.add([2, 3], said([2, 3], seed=1))
    first.refresh()
    second.add([3, 4], said([3, 4], seed=2))
    first.refresh()
    for store in (first, Store(tmp_path, TRAINED)):
        got = store.read([2, 3, 4])
        np.testing.assert_array_equal(got[1], said([3], seed=1)[0])
        np.testing.assert_array_equal(got[2], said([4], seed=2)[0])


def test_several_runs_write_and_threads_read_at_once(tmp_path: Path) -> None:
    def one(i: int) -> None:
        store = Store(tmp_path, TRAINED)
        for k in range(len(TRAINED)):
            store.add([k], said([k], seed=i))
        store.refresh()
        assert store.present.all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    store = Store(tmp_path, TRAINED)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.read(range(len(TRAINED))), range(16)))
    for values in found:
        for got, want in zip(values, found[0], strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_pass_goes_on_with_the_layout_it_began_with(tmp_path: Path) -> None:
    store = Store(tmp_path, TRAINED)
    missing = np.ones(len(TRAINED), bool)
    np.testing.assert_array_equal(store.begin(missing), missing)
    store.add([0, 1], said([0, 1]))
    store.refresh()
    np.testing.assert_array_equal(store.begin(~store.present), missing)
    fewer = ~store.present & (np.arange(len(TRAINED)) < 5)
    np.testing.assert_array_equal(store.begin(fewer), fewer, "another run, another layout")
    store.add(range(2, 8), said(range(2, 8)))
    store.refresh()
    store.finish()
    assert not list(tmp_path.glob("*.pass.npy"))


def test_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for file in (old, young):
        file.write_bytes(b"half")
    then = time.time() - reference_store._STALE - 1
    os.utime(old, (then, then))
    Store(tmp_path, TRAINED).add([0], said([0]))
    assert young.exists()
    assert not old.exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a tiny model, as numpy."""
    with jax.set_mesh(mesh_of(1, 1, 1)) as _:
        model = open_tiny(tmp_path_factory.mktemp("tiny"), "llama", mesh_of(1, 1, 1))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(model.state))


def whole(params: Any) -> str:
    """Its fingerprint on one device."""
    put = sharding.replicated(mesh_of(1, 1, 1))
    return fingerprint(jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), put), params))


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_have_one_fingerprint_on_every_mesh(tmp_path: Path, mesh: tuple) -> None:
    made = open_tiny(tmp_path, "llama", mesh_of(*mesh))
    params = nnx.to_pure_dict(made.state)
    assert fingerprint(params) == whole(jax.tree.map(np.asarray, params))


def test_a_bit_a_swap_a_name_a_shape_and_a_dtype_change_it(weights: dict[str, Any]) -> None:
    seen = {whole(weights)}

    def differs(params: Any) -> None:
        found = whole(params)
        assert found not in seen
        seen.add(found)

    flat, tree = jax.tree.flatten(weights)
    for leaf in range(len(flat)):
        for bit in (0, 31):
            changed = [x.copy() for x in flat]
            changed[leaf].view(np.uint32).reshape(-1)[-1] ^= np.uint32(1) << np.uint32(bit)
            differs(jax.tree.unflatten(tree, changed))
    head = weights["head"]
    assert head.shape == (64, 160)
    for (i, j), (k, m) in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((3, 7), (7, 3))):
        swapped = head.copy()
        swapped[i, j], swapped[k, m] = head[k, m], head[i, j]
        differs(weights | {"head": swapped})
    differs({("renamed" if k == "head" else k): v for k, v in weights.items()})
    differs(weights | {"head": head.reshape(160, 64)})
    differs(weights | {"head": head.astype(jnp.bfloat16)})
    assert whole(weights) in seen


def test_a_fingerprint_holds_no_second_copy_of_the_weights() -> None:
    x = jax.ShapeDtypeStruct((8, 256, 512), jnp.float32)
    compiled = jax.jit(reference_store._lane_sums).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.parametrize("damage", ["empty", "a bit"])
def test_a_part_that_the_disk_lost_is_never_trained_on(tmp_path: Path, damage: str) -> None:
    Store(tmp_path, TRAINED).add([0, 5], said([0, 5]))
    part = next(tmp_path.glob("*.part.npy"))
    whole = bytearray(part.read_bytes())
    whole[-10] ^= 1  # of a log-prob
    part.write_bytes(b"" if damage == "empty" else whole)
    with pytest.raises(ValueError, match=rf"{part.name}: damaged; remove it"):
        Store(tmp_path, TRAINED)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_layout_of_a_pass_is_forgotten(tmp_path: Path, content: bytes | None) -> None:
    store = Store(tmp_path, TRAINED)
    missing = np.ones(len(TRAINED), bool)
    store.begin(missing)
    file = next(tmp_path.glob("*.pass.npy"))
    if content is None:
        np.save(file, np.ones(3, bool))
    else:
        file.write_bytes(content)
    np.testing.assert_array_equal(store.begin(missing), missing)
    assert not file.exists()
    file.write_bytes(b"")
    store.finish()


def test_a_full_disk_is_told_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, array: np.ndarray) -> None:
        file.write(b"some")
        raise OSError("4096 requested and 4 written")

    store = Store(tmp_path, TRAINED)
    monkeypatch.setattr(reference_store.np, "save", full)
    with pytest.raises(OSError, match=rf"{tmp_path}: the .* cannot be written .* data.cache_dir"):
        store.add([0], said([0]))
    assert not list(tmp_path.iterdir()), "nothing half-written takes room"
