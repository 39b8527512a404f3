"""launch/topology.py against the tables of Cloud TPU and GKE, copied here by hand."""

from __future__ import annotations

import math

import pytest

from launch.topology import GENERATIONS, parse

# cloud.google.com/tpu/docs/{v5e,v5p,v6e} and GKE's "Plan TPUs": topology, cloud name, chips on a
# host, hosts, the node label cloud.google.com/gke-tpu-accelerator
TABLE = [
    ("v5e:1x1", "v5litepod-1", 1, 1, "tpu-v5-lite-podslice"),
    ("v5e:2x2", "v5litepod-4", 4, 1, "tpu-v5-lite-podslice"),
    ("v5e:2x4", "v5litepod-8", 8, 1, "tpu-v5-lite-podslice"),
    ("v5e:4x4", "v5litepod-16", 4, 4, "tpu-v5-lite-podslice"),
    ("v5e:8x16", "v5litepod-128", 4, 32, "tpu-v5-lite-podslice"),
    ("v5e:16x16", "v5litepod-256", 4, 64, "tpu-v5-lite-podslice"),
    ("v5p:2x2x1", "v5p-8", 4, 1, "tpu-v5p-slice"),
    ("v5p:2x2x4", "v5p-32", 4, 4, "tpu-v5p-slice"),
    ("v5p:4x4x4", "v5p-128", 4, 16, "tpu-v5p-slice"),
    ("v5p:8x8x8", "v5p-1024", 4, 128, "tpu-v5p-slice"),
    ("v5p:16x16x24", "v5p-12288", 4, 1536, "tpu-v5p-slice"),
    ("v6e:2x4", "v6e-8", 8, 1, "tpu-v6e-slice"),
    ("v6e:4x8", "v6e-32", 4, 8, "tpu-v6e-slice"),
    ("v6e:16x16", "v6e-256", 4, 64, "tpu-v6e-slice"),
]


@pytest.mark.parametrize(("topology", "cloud", "per_host", "hosts", "label"), TABLE)
def test_a_topology_and_its_cloud_name_are_one_slice(topology, cloud, per_host, hosts, label):
    one = parse(topology)
    assert one == parse(cloud)
    assert (one.cloud_name, one.chips_per_host, one.hosts) == (cloud, per_host, hosts)
    assert one.generation.gke_accelerator == label
    assert one.chips == math.prod(map(int, topology.split(":")[1].split("x")))


def test_every_listed_topology_parses_and_has_one_name():
    names = [parse(f"{g.name}:{t}").cloud_name for g in GENERATIONS.values() for t in g.topologies]
    assert len({*names}) == len(names)
    assert all(parse(name).cloud_name == name for name in names)


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
