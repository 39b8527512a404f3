"""plan/searching.py: --search and --smallest on a config, with a compiler that is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import load
from posttrain.jobs import sft
from posttrain.plan.chips import GIB
from posttrain.plan.collectives import Collective
from posttrain.plan.compiled import Compiled, Memory, Times
from posttrain.plan.overflow import Overflow
from posttrain.plan.searching import run_search, run_smallest
from posttrain.plan.topology import Slice, parse

SHAPES = Path(__file__).parents[2] / "docs" / "scale" / "llama3_8b"
KEYS = [f"model.path={SHAPES}", "data.sources={a: {path: a.jsonl}}", "data.seq_len=8192"]
KEYS += ["batch.rows=256"]


def config(keys: Any = ()) -> sft.Config:
    return load(sft.Config, [], [*KEYS, *keys])


def compiled(cfg: sft.Config, one: Slice) -> Compiled | Overflow:
    """remat none does not fit; else what it needs is said by remat's name."""
    if cfg.model.remat == "none":
        return Overflow("train step", 40 * GIB, 31.25 * GIB, {"parameters": GIB})
    gather = Collective("all-gather", "q", False, ("fsdp",), ("x",), 256, 2, 10e9, True)
    sums = Collective("all-reduce", "", True, ("data",), ("y",), 2, 1, 1e9, False)
    return Compiled(
        name="train step",
        memory=Memory({"parameters": GIB}, 0.0, 20 * GIB, 25 * GIB, 31.25 * GIB),
        flops=480e12,
        kernels=0.0,
        dynamic=0.0,
        hbm_bytes=5e11,
        cycles=0.0,
        estimated=0.0,
        needed=4e14,
        tokens=256 * 8192,
        collectives=(gather, gather, sums),
        times=Times(0.5, 0.3, 0.25),
        seconds=60.0,
        host_gib=2.0,
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("search")
    said = run_search(
        *(config(), parse("v6e:16x16"), {}),
        with_keys=config,
        compile=compiled,
        command="posttrain plan mine.yaml --topology v6e:16x16 --search",
        overlay_file=folder / "best.yaml",
        json_file=folder / "found.json",
    )
    return said, folder


def test_what_is_said(searched):
    said, folder = "\n".join(searched[0]), searched[1]
    assert "layouts on v6e:16x16" in said
    assert (
        "remat none, 1 micro-batch(es), head_chunk 1024: does not fit: train step does not" in said
    )
    assert "memory 25 GiB (the model is +" in said
    assert "wire 41 GB" in said, "two gathers twice, one sum"
    assert f"written: {folder / 'best.yaml'}, to lay over the config" in said


def test_what_is_written(searched):
    folder = searched[1]
    text = (folder / "best.yaml").read_text()
    assert text.startswith("# Found by: posttrain plan mine.yaml --topology v6e:16x16 --search\n")
    best = load(sft.Config, [folder / "best.yaml"], ["job=sft", *KEYS])
    assert best.model.remat != "none"
    found = json.loads((folder / "found.json").read_text())
    sound = [each for each in found["compiled"] if each["fits"]]
    assert len(sound) == 3
    assert sound[0]["wire"] == {"all-gather": 40e9, "all-reduce": 1e9}
    assert found["winner"] in [each["layout"] for each in sound]


def test_without_a_file_the_overlay_is_said():
    said = run_search(
        *(config(), parse("v6e:16x16"), {}), with_keys=config, compile=compiled, command="x"
    )
    assert said[-1].startswith("# Found by: x\n")
    assert "\nmesh:\n  data: " in said[-1]


def test_the_smallest_slice_and_none():
    ways: dict[str, Any] = {"with_keys": config, "tokens": 512}
    found, said = run_smallest(config(), parse("v6e:16x16"), {}, compile=compiled, **ways)
    assert found is not None
    assert said[-1] == f"the smallest slice: {found.name} ({found.chips} chips)"
    assert said[0].startswith("v6e:1x1: needs ")

    def never(cfg: sft.Config, one: Slice) -> Overflow:
        return Overflow("train step", 40 * GIB, 31.25 * GIB, {"parameters": GIB})

    found, said = run_smallest(config(), parse("v6e:16x16"), {}, compile=never, **ways)
    assert found is None
    assert said[-1] == "no slice of v6e fits"
