"""plan/topology.py and plan/chips.py against Google's tables, copied here by hand."""

from __future__ import annotations

import math
import re

import pytest

from posttrain.plan.chips import CHIPS
from posttrain.plan.topology import parse, sizes
from posttrain.train.throughput import PEAK_TFLOPS

# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: topology, cloud name, chips on a host,
# hosts, JAX devices
TABLE = [
    ("v5e:1x1", "v5litepod-1", 1, 1, 1),
    ("v5e:2x2", "v5litepod-4", 4, 1, 4),
    ("v5e:2x4", "v5litepod-8", 8, 1, 8),
    ("v5e:4x4", "v5litepod-16", 4, 4, 16),
    ("v5e:8x16", "v5litepod-128", 4, 32, 128),
    ("v5e:16x16", "v5litepod-256", 4, 64, 256),
    ("v5p:2x2x1", "v5p-8", 4, 1, 4),
    ("v5p:2x2x4", "v5p-32", 4, 4, 16),
    ("v5p:4x4x4", "v5p-128", 4, 16, 64),
    ("v5p:8x8x8", "v5p-1024", 4, 128, 512),
    ("v5p:16x16x24", "v5p-12288", 4, 1536, 6144),
    ("v6e:2x4", "v6e-8", 8, 1, 8),
    ("v6e:4x8", "v6e-32", 4, 8, 32),
    ("v6e:16x16", "v6e-256", 4, 64, 256),
    ("v4:2x2x1", "v4-8", 4, 1, 4),
    ("v4:8x16x16", "v4-4096", 4, 512, 2048),
    ("tpu7x:4x4x4", "tpu7x-128", 4, 16, 128),
]
REFUSED = {
    "v5e-16": "did you mean 'v5litepod-16'",
    "V6-256": "did you mean 'v6e-256'",
    "trillium": "a topology, as v6e:16x16, or a cloud name",
    "ironwood:4x4x4": "unknown TPU 'ironwood'; did you mean 'tpu7x'",
    "v7x:4x4x8": "did you mean 'tpu7x'",
    "trillium:4x4": "did you mean 'v6e'",
    "v6e:16*16": "is no topology: write it as 16x16",
    "v6e:16x32": "v6e has no slice of 16x32; it has 1x1",
    "v4:4x4": "torus of three dimensions",
    "v5p:4x4x6": "each side is a multiple of 4",
    "v5p:8x4x4": "the smallest first",
    "v5p:2x4x2": "below that there are 2x2x1, 2x2x2, 2x2x4, 2x4x4",
    "v5p:24x24x24": "6144 chips at most",
    "v5p-100": "counts TensorCores, two a chip, and there are v5p-8",
    "v5litepod-100": "counts chips",
    "0xv6e:4x4": "unknown TPU",
    "": "no TPU slice is called ''",
}


@pytest.mark.parametrize(("topology", "cloud", "per_host", "hosts", "devices"), TABLE)
def test_a_topology_and_its_cloud_name_are_one_slice(topology, cloud, per_host, hosts, devices):
    one = parse(topology)
    assert one == parse(cloud)
    assert (one.name, one.cloud_name) == (topology, cloud)
    assert (one.chips_per_host, one.hosts, one.devices) == (per_host, hosts, devices)
    assert one.chips == math.prod(map(int, topology.split(":")[1].split("x")))


def test_every_listed_topology_parses_and_has_one_name():
    names = [one.cloud_name for chip in CHIPS.values() for one in sizes(chip)]
    assert len({*names}) == len(names)
    assert all(parse(name).cloud_name == name for name in names)
    for chip in CHIPS.values():
        assert [*map(parse, (f"{chip.name}:{t}" for t in chip.topologies))] == sizes(chip)
        assert max(one.chips for one in sizes(chip)) <= chip.max_chips


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_name_that_is_none_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        parse(name)


def test_several_slices():
    two = parse("2xv6e:16x16")
    assert (two.name, two.slices, two.chips, two.devices) == ("2xv6e:16x16", 2, 256, 512)
    assert parse("2xv6e-256") == two
    assert parse("1xv6e-256") == parse("v6e-256")


def test_eight_flat_chips_are_one_machine_or_on_gke_two():
    assert parse("v6e:2x4").hosts == 1
    assert parse("v6e:2x4", 4).hosts == 2
    with pytest.raises(ValueError, match="only GKE makes a slice of 8 chips on two hosts"):
        _ = parse("v6e:2x4", 4).cloud_name
    with pytest.raises(ValueError, match="holds 4 chips, not 8"):
        parse("v6e:4x4", 8)


def test_a_cube_that_only_gke_makes():
    one = parse("v5p:4x4x16")
    assert one.chips == 256
    with pytest.raises(ValueError, match="only GKE makes v5p slices of 4x4x16"):
        _ = one.cloud_name


def test_sides_that_are_rings():
    """A v5e or v6e pod is a torus of 16x16; cubes of 4 chips a side are joined by switches."""
    assert parse("v6e:8x16").rings == (False, True)
    assert parse("v5e:8x8").rings == (False, False)
    assert parse("v5p:4x4x8").rings == (True, True, True)
    assert parse("v5p:2x4x4").rings == (False, True, True)


def test_the_peak_is_the_one_that_training_measures_itself_by():
    known = {chip.kind: chip.tflops for chip in CHIPS.values() if chip.kind in PEAK_TFLOPS}
    assert len(known) == 4
    assert known == {kind: PEAK_TFLOPS[kind] for kind in known}
