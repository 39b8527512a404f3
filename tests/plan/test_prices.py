"""plan/prices.py: what a run costs, and whose prices say so."""

from __future__ import annotations

import pytest

from posttrain.config import ConfigError
from posttrain.plan.prices import LISTED, read_prices

MINE = """\
date: 2026-11
source: our contract
currency: EUR
chip_hour:
  v6e: {on_demand: 1.5, spot: 0.5}
"""


def test_the_list_price_of_an_hour_of_a_pod():
    said = read_prices(None).cost("v6e", 256)
    assert said.startswith("USD 691 on demand: 256.0 chip-hours at 2.7 (cloud.google.com/tpu")
    assert "2025-11; yours: --prices FILE.yaml" in said


def test_a_price_nobody_knows_is_none():
    assert LISTED.cost("v6e", 1, spot=True).startswith("no price of v6e spot")
    assert LISTED.cost("tpu7x", 1).startswith("no price of tpu7x on demand")


def test_a_table_of_ones_own_is_the_whole_table(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    mine = read_prices(tmp_path / "mine.yaml")
    assert mine.cost("v6e", 1000, spot=True).startswith("EUR 500 spot")
    assert "our contract, 2026-11" in mine.cost("v6e", 1000)
    assert mine.cost("v5e", 1).startswith("no price of v5e")


def test_a_wrong_table_is_refused_with_all_that_is_wrong(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "source: us\nchip_hour:\n  v6: {on_demand: 1}\n  v5e: {spot: -1}\n"
    )
    with pytest.raises(ConfigError) as refused:
        read_prices(tmp_path / "mine.yaml")
    said = str(refused.value)
    assert "date" in said
    assert "mine.yaml:4" in said
    (tmp_path / "mine.yaml").write_text("date: x\nsource: us\nchip_hour:\n  v6: {on_demand: 1}\n")
    with pytest.raises(ConfigError, match="unknown TPU 'v6'; did you mean 'v6e'"):
        read_prices(tmp_path / "mine.yaml")
