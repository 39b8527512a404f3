"""plan/floors.py against counts by hand, and against programs that were compiled for TPUs."""

from __future__ import annotations

import dataclasses

import pytest

from posttrain.models.spec import LayerKind, Spec
from posttrain.plan.floors import floors, flops, model_flops, seen
from posttrain.plan.topology import parse
from tests.plan.llama import LLAMA_8B, LLAMA_70B, ONE, step

FSDP = ONE | {"fsdp": 256}
MATRIX = {"q": 4096 * 4096, "kv": 2 * 4096 * 1024, "o": 4096 * 4096, "mlp": 4096 * 14336}


def attention(pairs: float, matmuls: int, layers: int = 32, width: int = 4096) -> float:
    return 2 * 8192 * pairs * width * matmuls * layers


def test_flops_by_hand():
    """Llama-3 8B, 8192 positions a device. full: all matmuls but `down` are done four times."""
    four = MATRIX["q"] + MATRIX["kv"] + MATRIX["o"] + 2 * MATRIX["mlp"]
    head = 4096 * 128256
    by_hand = 2 * 8192 * (32 * (4 * four + 3 * MATRIX["mlp"]) + 4 * head)
    by_hand += attention(8192 / 2 + 256, 2 + 2 + 7)
    assert flops(step(), FSDP) == pytest.approx(by_hand, rel=1e-9)
    dots = 2 * 8192 * (32 * 3 * (four + MATRIX["mlp"]) + 4 * head)
    dots += attention(8192 / 2 + 256, 2 + 2 + 7)
    assert flops(step(remat="dots"), FSDP) == pytest.approx(dots, rel=1e-9)
    assert flops(step(remat="none"), FSDP) == pytest.approx(
        dots - attention(8192 / 2 + 256, 2), rel=1e-9
    )
    assert flops(step(reference_bytes=4), FSDP) / flops(step(), FSDP) == pytest.approx(
        1.25, abs=0.02
    )


@pytest.mark.parametrize(
    ("spec", "devices", "rows", "compiled"),
    [(LLAMA_8B, 256, 256, 461e12), (LLAMA_70B, 64, 64, 4247e12)],
)
def test_flops_of_matmuls_are_those_of_compiled_programs(spec: Spec, devices, rows, compiled):
    """As libtpu's HLO has them with trip counts, attention's kernels apart: 8B on v6e:16x16, 70B on
    v5p:4x4x4, full remat, one row of 8192 a device."""
    mine = flops(step(spec, rows=rows), ONE | {"fsdp": devices})
    mine -= attention(8192 / 2 + 256, 11, spec.layers, spec.embed)
    assert mine == pytest.approx(compiled, rel=0.01)


def test_axes_divide_the_flops_and_accumulation_does_not_change_them():
    whole = flops(step(), FSDP)
    assert flops(step(), ONE | {"fsdp": 64, "tensor": 4}) == pytest.approx(whole)
    assert flops(step(), ONE | {"data": 64, "fsdp": 4}) == pytest.approx(whole)
    assert flops(step(rows=1024, accumulate=4), FSDP) == pytest.approx(4 * whole)
    # where rows are cut, the device with their ends has more pairs than the mean
    assert flops(step(), ONE | {"fsdp": 64, "context": 4}) > whole


def test_keys_that_a_kernel_computes():
    assert seen(step(), LayerKind(), 1) == 4096 + 256
    assert seen(step(), LayerKind(window=1024), 1) == 1024 + 512
    assert seen(step(), LayerKind(), 2) == 8192 * 0.75 + 256


def test_what_travels_by_hand():
    """bfloat16 weights of the layers twice, their gradients once; the head's and the table's."""
    found = floors(step(), FSDP, parse("v6e:16x16"))
    layers, table, ring = 32 * (41943040 + 3 * MATRIX["mlp"]) * 2, 4096 * 128256, 255 / 256
    wire = {each.what: each.wire for each in found.collectives}
    assert wire == pytest.approx(
        {
            "layers' weights": 2 * layers * ring,
            "layers' gradients": layers * ring,
            "head": 2 * table * 2 * ring,
            "head's gradient": table * 4 * ring,
            "embedding": table * 2 * ring,
            "embedding's gradient": table * 4 * ring,
        }
    )
    copies = floors(step(), ONE | {"data": 256}, parse("v6e:16x16"))
    assert [(each.kind, each.axis) for each in copies.collectives] == [("all-reduce", "data")]
    assert copies.collectives[0].wire == pytest.approx(2 * ring * (layers + 2 * table * 4))
    tensor = floors(step(rows=64), ONE | {"fsdp": 64, "tensor": 4}, parse("v6e:16x16"))
    sums = next(each for each in tensor.collectives if each.axis == "tensor")
    # two a layer forward, two backward, one again; the table's lookup and the head's gradient
    assert sums.wire == pytest.approx((32 * 5 + 2) * 8192 * 4096 * 2 * 2 * 3 / 4)


def test_experts_are_a_part_of_the_arithmetic_and_bring_tokens_together():
    moe = dataclasses.replace(
        *(LLAMA_8B,),
        **{"pattern": (LayerKind(experts=8),), "experts_chosen": 2, "expert_mlp": 14336},
    )
    dense = flops(step(), FSDP) - 2 * 8192 * 32 * 11 * MATRIX["mlp"]
    router = 2 * 8192 * 32 * 4096 * 8 * 4
    assert flops(step(moe), FSDP) == pytest.approx(
        dense + 2 * 8192 * 32 * 2 * 11 * MATRIX["mlp"] + router, rel=1e-9
    )
    cut = ONE | {"fsdp": 32, "expert": 8}
    assert flops(step(moe), cut) == pytest.approx(flops(step(moe), FSDP))
    found = floors(step(moe), cut, parse("v6e:16x16"))
    kinds = {each.what for each in found.collectives if each.axis == "expert"}
    assert kinds == {"tokens to experts", "tokens from experts", "gradients of copies"}


def test_floors_of_the_pod():
    """8B on v6e:16x16, one row of 8192 a device: arithmetic binds, three quarters of it useful."""
    found = floors(step(), FSDP, parse("v6e:16x16"))
    assert found.compute == flops(step(), FSDP) / 918e12
    assert found.binds == "compute"
    assert found.seconds == found.compute < found.serial
    assert found.utilisation == pytest.approx(model_flops(step()) / 256 / found.flops)
    assert 0.7 < found.utilisation < 0.8
    short = floors(step(length=512), FSDP, parse("v6e:16x16"))
    assert short.binds == "interconnect"
    assert floors(step(length=512, trained=0.25), FSDP, parse("v6e:16x16")).hbm < short.hbm


def test_the_convention_of_training_is_the_one_used():
    tokens = 256 * 8192
    matmuls = 32 * (41943040 + 3 * MATRIX["mlp"]) + 4096 * 128256
    pairs = 8192 * 8193 / 2 * 256
    assert model_flops(step()) == pytest.approx(6 * tokens * matmuls + 12 * 4096 * 32 * pairs)
