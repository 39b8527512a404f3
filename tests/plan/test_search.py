"""plan/search.py: which layouts there are, how they are ranked, what is written."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from posttrain.config import load
from posttrain.jobs.sft import Config
from posttrain.plan.chips import GIB
from posttrain.plan.search import (
    Layout,
    Result,
    as_json,
    explore,
    meshes,
    overlay,
    search,
    smallest,
    table,
    wire_of,
)
from posttrain.plan.topology import Slice, parse
from tests.plan.llama import LLAMA_8B, ONE, step

POD = parse("v6e:16x16")


def sound(layout: Layout) -> Result:
    """What a compiler might say that finds a tenth more than the model."""
    f = layout.floors
    wire = {kind: 1.1 * size for kind, size in wire_of(layout).items()}
    times = (1.1 * f.compute, 1.1 * f.hbm, 1.1 * f.network)
    return Result(True, 1.1 * layout.memory.total, 1.1 * f.flops, wire, times)


@pytest.fixture(scope="module")
def found():
    return explore(step(), POD)


def test_every_mesh_of_the_slice_is_looked_at_once():
    every = list(meshes(POD, experts=0))
    assert len(every) == math.comb(8 + 3, 3)  # 2^8 over four axes; the expert axis has nothing
    assert all(math.prod(sizes.values()) == 256 for sizes in every)
    assert len({tuple(sizes.items()) for sizes in every}) == len(every)
    assert len(list(meshes(POD, experts=8))) == math.comb(8 + 4, 4)


def test_8b_on_a_pod_of_v6e_reaches_60_percent_of_peak_at_most_and_arithmetic_binds(found):
    best = found.fits[0]
    assert best.floors.utilisation > 0.6
    assert best.floors.binds == "compute"
    assert best.memory.total < 31.25 * GIB


def test_the_ranking_is_what_one_would_expect(found):
    seconds = [layout.seconds for layout in found.fits]
    assert seconds == sorted(seconds)
    assert found.fits[0].sizes["tensor"] == 1, "no activations travel where rows suffice"
    by_mesh = {layout.mesh: layout for layout in found.fits if layout.step.remat == "full"}
    assert by_mesh["fsdp=256"].memory.parameters < by_mesh["data=2 fsdp=128"].memory.parameters
    assert by_mesh["fsdp=256"].seconds < by_mesh["fsdp=64 tensor=4"].seconds
    of = {layout.step.remat: layout for layout in found.fits if layout.mesh == "fsdp=256"}
    assert of["none"].floors.compute < of["dots"].floors.compute < of["full"].floors.compute
    assert of["none"].memory.total > of["attention"].memory.total > of["full"].memory.total


def test_what_fits_no_device_or_divides_nothing_is_not_ranked_but_told(found):
    assert all(layout.memory.total > 31.25 * GIB for layout in found.too_large)
    assert "tensor=16 does not divide 8 key heads" in found.refused
    assert not any(layout.sizes["tensor"] > 8 for layout in found.fits)
    assert not any(layout.sizes["data"] == 256 for layout in found.fits), "8B whole on each"


def test_no_micro_batch_has_one_side_of_a_pair():
    """8 rows on one device: 4 pairs at the most come one after another."""
    one = parse("v5e:1x1")
    small = dataclasses.replace(
        LLAMA_8B, layers=1, embed=64, mlp=64, vocab_size=128, vocab_rows=128
    )

    def splits(together: int) -> set[int]:
        found = explore(step(small, rows=8, length=128, together=together), one)
        return {layout.step.accumulate for layout in (*found.fits, *found.too_large)}

    assert splits(1) == {1, 2, 4, 8}
    assert splits(2) == {1, 2, 4}


def test_the_best_three_are_compiled_and_the_models_error_is_shown():
    asked: list[Layout] = []

    def compile(layout: Layout) -> Result:
        asked.append(layout)
        if len(asked) == 1:
            return Result(False, None, None, None, None, "needs 33.0 GiB of 31.25")
        return sound(layout)

    outcome = search(step(), POD, compile)
    assert asked == list(outcome.found.fits[:4])
    assert outcome.winner == asked[1]
    said = "\n".join(table(outcome, POD))
    assert f"compiled {asked[0].said}: does not fit: needs 33.0 GiB of 31.25" in said
    assert said.count("the model is -9% off") == 3 * 6
    assert said.endswith(f"winner: {asked[1].said}")
    assert "the least that does not fit: needs 31." in said
    again = json.loads(json.dumps(as_json(outcome, POD)))
    assert (again["topology"], again["winner"]) == ("v6e:16x16", asked[1].said)
    first, second, *_ = again["compiled"]
    assert (first["fits"], first["message"]) == (False, "needs 33.0 GiB of 31.25")
    assert second["peak"] == pytest.approx(1.1 * second["analytic"]["memory"]["total"])
    assert second["overrides"] == asked[1].overrides


def test_the_winner_is_the_best_by_what_was_compiled():
    def compile(layout: Layout) -> Result:
        slow = 3 if layout.sizes["data"] == 1 else 1
        return dataclasses.replace(sound(layout), floors=(slow, 0.1, 0.1))

    winner = search(step(), POD, compile).winner
    assert winner is not None
    assert winner.sizes["data"] > 1


def test_where_none_fits_nine_are_tried():
    asked: list[Layout] = []

    def compile(layout: Layout) -> Result:
        asked.append(layout)
        return Result(False, None, None, None, None, "no")

    outcome = search(step(), POD, compile)
    assert len(asked) == 9
    assert outcome.winner is None
    assert table(outcome, POD)[-1] == "no layout was found that compiles and fits"


def test_the_overlay_is_a_config_file(found, tmp_path):
    layout = next(layout for layout in found.fits if layout.sizes["tensor"] == 4)
    text = overlay(layout, "posttrain plan x.yaml --topology v6e:16x16 --search")
    assert text.startswith("# Found by: posttrain plan x.yaml --topology v6e:16x16 --search\n")
    (tmp_path / "overlay.yaml").write_text(text)
    (tmp_path / "sft.yaml").write_text(
        "job: sft\nmodel: {path: m}\ndata: {sources: {a: {path: a.jsonl, format: messages}}}\n"
        "batch: {rows: 256}\n"
    )
    cfg = load(Config, [tmp_path / "sft.yaml", tmp_path / "overlay.yaml"])
    assert {axis: getattr(cfg.mesh, axis) for axis in ONE} == layout.sizes
    assert cfg.model.remat == layout.step.remat
    assert cfg.batch.accumulate == layout.step.accumulate
    assert cfg.train.head_chunk == layout.step.head_chunk
    assert load(Config, [tmp_path / "sft.yaml"], layout.overrides) == cfg


def test_the_smallest_slice():
    """8B with float32 weights and Adam, 12 bytes a weight, beside at the least a layer of each."""
    tried: list[str] = []

    def compile(one: Slice, layout: Layout) -> Result:
        tried.append(one.name)
        return sound(layout)

    one, said = smallest(step(rows=16, length=2048), parse("v5e:16x16"), compile)
    assert one is not None
    assert one.name == tried[0] == "v5e:4x4"
    state = 12 * 8.03e9 / GIB
    assert state / 16 < 15.75 < state / 4, "of 8 chips it is 11.2 GiB, and leaves too little"
    assert [each.name for each, _ in said] == ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"]
    assert all("GiB of 15.75 a device at the least" in why for _, why in said[:-1])
    assert said[-1][1].startswith("fits: ")


def test_a_slice_whose_programs_do_not_fit_is_passed_over():
    def compile(one: Slice, layout: Layout) -> Result:
        return Result(one.chips >= 64, None, None, None, None, "needs 17 GiB")

    one, said = smallest(step(rows=64, length=2048), parse("v5e:4x4"), compile)
    assert one is not None
    assert one.name == "v5e:8x8"
    assert said[-2] == (parse("v5e:4x8"), "needs 17 GiB")


def test_several_slices_are_joined_by_the_data_axis():
    pair = explore(step(rows=512), parse("2xv6e:16x16"))
    assert all(layout.sizes["data"] % 2 == 0 for layout in pair.fits)
    assert any("slices" in reason for reason in pair.refused)
