"""Where time went: counted by hand, on a clock of this test's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.train import goodput
from posttrain.train.goodput import Goodput


class Clock:
    """time.monotonic begins anew with each machine; time.time does not."""

    def __init__(self) -> None:
        self.now, self.booted = 1000.0, 900.0

    def monotonic(self) -> float:
        return self.now - self.booted

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    fake = SimpleNamespace(monotonic=made.monotonic, time=made.time)
    monkeypatch.setattr(goodput, "time", fake)
    return made


def ledger(folder: Path, clock: Clock, *, setup: float, step: int = 0) -> Goodput:
    """Of a start that took so long to get to its loop."""
    began = clock.monotonic()
    clock.now += setup
    made = Goodput(folder, began=began, step=step, primary=True)
    made.turn("steps")
    return made


def seconds(of: Goodput) -> dict[str, float]:
    found = of.metrics()
    wall = found.pop("goodput/wall_seconds")
    return {k.removeprefix("goodput/"): round(v * wall, 6) for k, v in found.items() if v}


def test_a_run_over_three_starts_adds_up_to_the_time_since_the_first(
    tmp_path: Path, clock: Clock
) -> None:
    first = ledger(tmp_path, clock, setup=20)
    with first.spent("compile"):
        clock.now += 30
    clock.now += 100
    first.move(10, "data")
    first.mark(50)  # 90 s of steps until here
    with first.spent("save"):
        clock.now += 5
    clock.now += 40  # steps 51 ..
    first.beat()  # 45 s are over: written
    clock.now += 7  # and killed: of this nobody knows
    killed = clock.now
    clock.now, clock.booted = killed + 60, killed + 50  # another machine
    second = ledger(tmp_path, clock, setup=10, step=50)
    clock.now += 25
    with second.spent("evaluation"):
        clock.now += 4
    second.mark(60)
    clock.now += 6
    second.lose(60)  # a rollback
    second.write()
    clock.now += 100
    third = ledger(tmp_path, clock, setup=1, step=60)
    clock.now += 9
    want = {
        "steps": 90 + 25 + 9, "compile": 30, "data": 10, "save": 5, "evaluation": 4,
        "setup": 20 + 10 + 1, "lost": 40 + 6, "down": 67 + 100,
    }  # fmt: skip
    assert seconds(third) == want
    assert sum(want.values()) == pytest.approx(clock.now - 1000)
    assert third.metrics()["goodput/wall_seconds"] == pytest.approx(clock.now - 1000)
    table = third.table().splitlines()
    assert table[0].startswith("goodput: 29.7% of 417.0 s since the run first began, 3 starts")
    assert table[7].split() == ["lost", "46.0", "s", "11.0%"]
    shares = [float(line.split()[-1].rstrip("%")) for line in table[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_run_that_goes_on_before_its_last_checkpoint_loses_more(
    tmp_path: Path, clock: Clock
) -> None:
    """One that was damaged, and deleted; and a run that begins anew."""
    first = ledger(tmp_path, clock, setup=0)
    for step in (10, 20):
        clock.now += 10
        first.mark(step)
    first.write()
    assert seconds(ledger(tmp_path, clock, setup=0, step=10)) == {"steps": 10, "lost": 10}
    assert seconds(ledger(tmp_path, clock, setup=0, step=0)) == {"lost": 20}


def test_a_ledger_that_begins_in_the_middle_of_a_run_takes_nothing_for_lost(
    tmp_path: Path, clock: Clock
) -> None:
    first = ledger(tmp_path, clock, setup=0, step=500)
    clock.now += 10
    first.write()
    assert seconds(ledger(tmp_path, clock, setup=0, step=500)) == {"steps": 10}


def test_only_the_first_process_writes(tmp_path: Path, clock: Clock) -> None:
    other = Goodput(tmp_path, began=clock.monotonic(), step=0, primary=False)
    other.write()
    assert not list(tmp_path.iterdir())
    ledger(tmp_path, clock, setup=0).write()
    assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 1
