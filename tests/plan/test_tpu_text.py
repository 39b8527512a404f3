"""Where a TPU's program text says other than it does: plan/work.py, plan/collectives.py."""

from __future__ import annotations

import numpy as np

from posttrain.plan import collectives, hlo
from posttrain.plan.work import Counter

TEXT = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[4096,128]) -> bf16[1024,128] {
  %input = bf16[4096,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[4096,128]{1,0} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice.1 = bf16[1024,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), \
dynamic_slice_sizes={1024,128}
}

ENTRY %main (p: bf16[4096,128]) -> bf16[1024,128] {
  %p = bf16[4096,128]{1,0} parameter(0)
  %slice-start = ((bf16[4096,128]{1,0}), bf16[256,128]{1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:256], [0:128]}
  %slice-done = bf16[256,128]{1,0:S(1)} slice-done(%slice-start)
  ROOT %fusion.1 = bf16[1024,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_part_that_is_copied_to_the_chip_is_read_once():
    module = hlo.parse(TEXT)
    entry, counter = module.computations["main"], Counter(module, [None])
    moved = {name: counter.work(entry, one).hbm_bytes for name, one in entry.by_name.items()}
    assert moved["slice-start"] == 256 * 128 * 2
    assert moved["slice-done"] == 0


def test_an_all_reduce_whose_result_is_cut_is_a_reduce_scatter():
    module = hlo.parse(TEXT)
    visits = list(hlo.walk(module, hlo.Bounds(), lambda visit: 0.0))
    mesh = collectives.Mesh(("fsdp",), np.arange(4)[:, None], None)
    (found,) = collectives.find(module, visits, mesh)
    assert (found.kind, found.axes, found.size) == ("reduce-scatter", ("fsdp",), 4)
    assert found.total == 4096 * 128 * 2 * 3 / 4
