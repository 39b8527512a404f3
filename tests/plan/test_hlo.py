"""plan/hlo.py, work.py: FLOPs of programs against counts by hand, turns of loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from posttrain.plan import hlo, work
from posttrain.plan.hlo import Bounds


def flops_of(function, *shapes, dtype=jnp.float32, bounds=None) -> float:
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    text = jax.jit(function).lower(*args).compile().as_text()
    return flops_of_text(text, bounds or Bounds())


def flops_of_text(text: str, bounds: Bounds) -> float:
    module = hlo.parse(text)
    counter = work.Counter(module)
    visits = hlo.walk(module, bounds, lambda v: counter.work(v.computation, v.instruction).flops)
    return sum(v.times * counter.work(v.computation, v.instruction).flops for v in visits)


def test_a_matmul_counts_two_for_each_product():
    assert flops_of(lambda a, b: a @ b, (64, 96), (96, 32)) == 2 * 64 * 96 * 32
    batched = flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 16), (3, 16, 4))
    assert batched == 2 * 3 * 8 * 16 * 4


def test_a_loops_body_counts_as_often_as_it_runs():
    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert flops_of(scanned, (7, 32, 32), (8, 32)) == 7 * 2 * 8 * 32 * 32


def test_nested_loops_and_steps_of_two():
    def nested(w, x):
        def outer(i, x):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

        return jax.lax.fori_loop(2, 6, outer, x)

    assert flops_of(nested, (32, 32), (8, 32)) == 4 * 3 * 2 * 8 * 32 * 32


def test_a_loop_whose_end_the_device_knows_counts_to_its_bound():
    def walked(w, x):
        number = jnp.int32(x[0, 0])
        return jax.lax.fori_loop(0, number, lambda _, x: jnp.tanh(x @ w), x)

    once = 2 * 8 * 32 * 32
    assert flops_of(walked, (32, 32), (8, 32), bounds=Bounds(other=5)) == 5 * once
    assert flops_of(walked, (32, 32), (8, 32)) == once


def test_of_two_branches_the_larger_one_counts():
    def chosen(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w, x)

    assert flops_of(chosen, (32, 32), (8, 32)) == 2 * 2 * 8 * 32 * 32


LOOP = """HloModule probe

%body (p: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %p = (u32[], f32[8,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (u32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%condition (p.1: (u32[], f32[8,8])) -> pred[] {
  %p.1 = (u32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %end = u32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %zero = u32[] constant(1)
  %copied = u32[] copy(%zero)
  %start = (u32[], f32[8,8]{1,0}) tuple(%copied, %x.1)
  %loop = (u32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %last = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_turns_follow_from_first_value_step_and_end():
    assert flops_of_text(LOOP, Bounds()) == 4 * 2 * 8**3  # 1, 3, 5, 7
    assert flops_of_text(LOOP.replace("constant(2)", "constant(1)"), Bounds()) == 8 * 2 * 8**3
    assert flops_of_text(LOOP.replace("=LT", "=LE"), Bounds()) == 5 * 2 * 8**3


def test_products_that_are_written_as_convolutions():
    text = """HloModule probe

ENTRY %main (a: f32[4,5], b: f32[5,6]) -> f32[4,6] {
  %a = f32[4,5]{1,0} parameter(0)
  %b = f32[5,6]{1,0} parameter(1)
  ROOT %c = f32[4,6]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
    assert flops_of_text(text, Bounds()) == 2 * 4 * 5 * 6
    # heads 4 of 128 put in place by a reversed, padded window: x [1024, 512], w [512, 4, 128]
    heads = """HloModule probe

ENTRY %main (x: bf16[1024,512,1], w: bf16[4,128,512]) -> bf16[1024,4,128] {
  %x = bf16[1024,512,1]{1,0,2} parameter(0)
  %w = bf16[4,128,512]{2,1,0} parameter(1)
  ROOT %q = bf16[1024,4,128]{2,0,1} convolution(%x, %w), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
}
"""  # noqa: E501
    assert flops_of_text(heads, Bounds()) == 2 * 1024 * 512 * 4 * 128


def test_splash_kernels_count_the_blocks_they_visit():
    assert work._visited(1024, 1024, None) == 3 / 4  # 2 x 2 blocks, one above the diagonal
    assert work._visited(4096, 4096, None) == 36 / 64
    assert work._visited(4096, 4096, 512) == (1 + 7 * 2) / 64  # a block and the one before it


def test_bytes_are_of_hbm_and_of_slices():
    text = """HloModule probe

%fused (s: f32[16,64], n: s32[]) -> f32[1,64] {
  %s = f32[16,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,64]{1,0} dynamic-slice(%s, %n, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (s.1: f32[16,64], n.1: s32[], v: f32[64]) -> f32[64] {
  %s.1 = f32[16,64]{1,0} parameter(0)
  %n.1 = s32[] parameter(1)
  %v = f32[64]{0:S(1)} parameter(2)
  %row = f32[1,64]{1,0} fusion(%s.1, %n.1), kind=kLoop, calls=%fused
  ROOT %out = f32[64]{0:S(1)} negate(%v)
}
"""
    module = hlo.parse(text)
    counter = work.Counter(module)
    moved = {
        v.instruction.name: counter.work(v.computation, v.instruction).hbm_bytes
        for v in hlo.walk(module, Bounds(), lambda v: 0.0)
    }
    assert moved["row"] == 64 * 4 + 4 + 64 * 4  # a row of the table, its number, the result
    assert moved["out"] == 0  # the chip's own memory


def test_shapes_are_read_with_their_memory():
    one, two = hlo.read_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[])")
    assert (one.bytes, one.space, two.bytes, two.dims) == (12, 1, 1, ())
    assert hlo.read_shapes("s4[3]")[0].bytes == 2


@pytest.mark.parametrize("name", ["u32[]", "f8e4m3fn[4]"])
def test_types_have_sizes(name):
    assert hlo.read_shapes(name)[0].bytes == 4
