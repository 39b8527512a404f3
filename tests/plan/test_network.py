"""plan/network.py: a mesh on a torus, and times of collectives by hand."""

from __future__ import annotations

import pytest

from posttrain.plan.network import AXES, lay, wire_bytes
from posttrain.plan.topology import parse

ONE = dict.fromkeys(AXES, 1)
GB = 1e9


def laid(name: str, **sizes: int):
    return lay(ONE | sizes, parse(name))


def test_an_axis_takes_whole_sides_where_it_can():
    pod = laid("v6e:16x16", fsdp=256)
    assert pod.said("fsdp") == "16 (x ring) x 16 (y ring)"
    assert pod.said("data") == ""
    two = laid("v5p:4x4x4", fsdp=16, tensor=4)
    assert (two.said("tensor"), two.said("fsdp")) == ("4 (x ring)", "4 (y ring) x 4 (z ring)")
    small = laid("v5e:4x4", data=4, fsdp=4)
    assert (small.said("fsdp"), small.said("data")) == ("4 (x line)", "4 (y line)")


def test_a_part_of_a_side_is_a_line_and_what_is_left_shares_its_links():
    net = laid("v6e:16x16", fsdp=64, tensor=4)
    assert net.said("tensor") == "4 (x line)"
    assert [part.gbs for part in net.parts["tensor"]] == [100]
    whole, shared = net.parts["fsdp"]
    assert (whole.devices, whole.gbs) == (16, 200)
    assert (shared.devices, shared.gbs) == (4, 200 / 4)


def test_gathering_in_stages_by_hand():
    """16 GB over a ring of 16, then over another: 15/16 of it, and 15/16 of a sixteenth."""
    pod = laid("v6e:16x16", fsdp=256)
    once = 16 * GB * 15 / 16 / (200 * GB) + GB * 15 / 16 / (200 * GB)
    assert pod.seconds("all-gather", "fsdp", 16 * GB) == pytest.approx(once)
    assert pod.seconds("reduce-scatter", "fsdp", 16 * GB) == pytest.approx(once)
    assert pod.seconds("all-reduce", "fsdp", 16 * GB) == pytest.approx(2 * once)
    assert wire_bytes("all-gather", 256, 16 * GB) == 16 * GB * 255 / 256
    assert wire_bytes("all-reduce", 4, 16 * GB) == 24 * GB
    # without wrapped ends half as fast, and v5e's links half as fast again
    line = laid("v5e:8x8", fsdp=8, data=8)
    assert line.seconds("all-gather", "fsdp", 8 * GB) == pytest.approx(7 * GB / (50 * GB))


def test_slices_are_joined_by_the_data_axis_over_the_slow_network():
    net = laid("2xv6e:16x16", data=2, fsdp=256)
    assert net.said("data") == "2 (slices)"
    assert net.seconds("all-reduce", "data", 25 * GB) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"mesh.data=1 is no multiple of 2"):
        laid("2xv6e:16x16", fsdp=512)
    with pytest.raises(ValueError, match="is not the 256 devices of v6e:16x16"):
        laid("v6e:16x16", fsdp=128)


def test_two_devices_of_a_chip_share_its_links():
    net = laid("tpu7x:4x4x4", fsdp=64, tensor=2)
    assert [part.side for part in net.parts["tensor"]] == ["cores of a chip"]
    assert {part.gbs for part in net.parts["fsdp"]} == {100}
