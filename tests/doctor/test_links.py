"""Collectives and copies that give other numbers are caught; their bytes are counted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from posttrain.doctor import links
from posttrain.doctor.base import Level, Subject
from posttrain.sharding import MeshConfig, make_mesh
from tests.doctor.found import bad, found

NAMES = ["all-gather", "reduce-scatter", "all-reduce", "ppermute"]


@pytest.fixture
def cube(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    subject.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    monkeypatch.setattr(links, "_TIMES", 1)
    return subject


def test_each_is_right_over_each_axis(cube: Subject) -> None:
    said = found(links.collectives, cube)
    assert list(said) == [f"{n} over {a} (2)" for a in ("data", "fsdp", "tensor") for n in NAMES]
    assert not bad(found(links.collectives, cube))


def test_what_is_expected_is_a_loop_over_the_devices() -> None:
    """Device (d, f, t) along fsdp, one device after another."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
    values = np.arange(8 * 8, dtype=np.float32).reshape(8, 8)
    for name, collective in links.COLLECTIVES.items():
        got = links._expected(mesh, "fsdp", collective, values)
        for device in range(8):
            group = [device // 4 * 4 + i for i in range(4)]
            me = device % 4
            total = sum(values[i] for i in group)
            want = {
                "all-gather": np.concatenate([values[i] for i in group]),
                "reduce-scatter": total[2 * me : 2 * me + 2],
                "all-reduce": total,
                "ppermute": values[group[me - 1]],
            }[name]
            np.testing.assert_array_equal(got[device], want, err_msg=name)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("all_gather", "all-gather"),
        ("psum_scatter", "reduce-scatter"),
        ("psum", "all-reduce"),
        ("ppermute", "ppermute"),
    ],
)
def test_a_collective_that_is_off_by_one_on_one_device_is_wrong(
    cube: Subject, monkeypatch: pytest.MonkeyPatch, function: str, name: str
) -> None:
    right = getattr(jax.lax, function)

    def broken(x: jax.Array, axis: str, *rest: Any, **options: Any) -> jax.Array:
        place = sum(jax.lax.axis_index(a) * 2**i for i, a in enumerate(("tensor", "fsdp", "data")))
        return right(x, axis, *rest, **options) + (place == 5)

    monkeypatch.setattr(jax.lax, function, broken)
    wrong = {f"{name} over {axis} (2)": Level.WRONG for axis in ("data", "fsdp", "tensor")}
    all_found = found(links.collectives, cube)
    assert bad(all_found) == wrong
    said = all_found[f"{name} over data (2)"].said
    assert said == f"wrong on {make_mesh(cube.mesh).devices.flat[5]}"


def test_the_bus_bytes_are_counted_as_nccls_tests_do(cube: Subject) -> None:
    """Over 2 devices, an array of S = 4 MiB: S/2, S/2, S, S."""
    cube.mesh = MeshConfig(data=2, fsdp=4)
    said = found(links.collectives, cube)
    s = 4 << 20
    sent = [said[f"{name} over data (2)"].figures["sent_bytes"] for name in NAMES]
    assert sent == [s / 2, s / 2, s, s]
    sent = [said[f"{name} over fsdp (4)"].figures["sent_bytes"] for name in NAMES]
    assert sent == [3 * s / 4, 3 * s / 4, 3 * s / 2, s]


def test_one_device_talks_to_nobody(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(links, "make_mesh", lambda cfg: one)
    assert list(found(links.collectives, subject)) == ["collectives"]


def test_speeds_are_told(subject: Subject) -> None:
    all_found = found(links.transfer, subject)
    assert not bad(all_found)
    figures = all_found["host to device"].figures
    assert figures["bytes"] == 16 << 20
    assert figures["seconds"] > 0


def test_a_changed_bit_is_wrong(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    put = jax.device_put

    def flips(x: np.ndarray, device: Any) -> jax.Array:
        x = x.copy()
        x[-1] ^= 1
        return put(x, device)

    monkeypatch.setattr(jax, "device_put", flips)
    assert bad(found(links.transfer, subject)) == {"round trip": Level.WRONG}
