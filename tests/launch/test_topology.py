"""launch/topology.py against the labels and images of Cloud TPU and GKE, copied here by hand."""

from __future__ import annotations

import pytest

from launch.topology import parse, words_of

# GKE's "Plan TPUs" (node label cloud.google.com/gke-tpu-accelerator), Cloud TPU's "runtimes"
TABLE = {
    "v5e:4x4": ("tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v5p-128": ("tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v6e-1": ("tpu-v6e-slice", "v2-alpha-tpuv6e"),
}


@pytest.mark.parametrize("name", list(TABLE))
def test_a_slice_in_the_words_of_each_api(name):
    words = words_of(parse(name))
    assert (words.gke_accelerator, words.runtime) == TABLE[name]
