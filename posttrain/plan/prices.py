"""What a chip costs an hour: list prices to start from, or a table of the user's own.

# prices.yaml, given by --prices prices.yaml
date: 2026-11
source: our contract
chip_hour:
  v6e: {on_demand: 1.89, spot: 1.10}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from posttrain.config import Config, did_you_mean, load, runtime
from posttrain.plan.chips import CHIPS

Amount = Annotated[float, Field(gt=0)]


class Price(Config):
    """Of one chip for one hour."""

    on_demand: Amount | None = runtime(None, help="null: not known")
    spot: Amount | None = runtime(None, help="capacity that may be taken back; null: not known")


def _known(value: dict[str, Price]) -> dict[str, Price]:
    for name in value:
        if name not in CHIPS:
            hint = did_you_mean(name, list(CHIPS))
            raise ValueError(f"unknown TPU {name!r}{hint}; known: {', '.join(CHIPS)}")
    return value


class Prices(Config):
    """A price table. Its date and source are printed beside each cost."""

    date: str = runtime(min_length=1, help="when the prices were looked up")
    source: str = runtime(min_length=1, help="where they come from")
    currency: str = runtime("USD", help="of all of them")
    chip_hour: Annotated[dict[str, Price], AfterValidator(_known)] = runtime(
        help="TPU generation -> its prices for a chip and an hour"
    )

    def cost(self, chip: str, chip_hours: float, *, spot: bool = False) -> str:
        """One line to a reader: the amount, or that there is no price."""
        price = self.chip_hour.get(chip, Price())
        amount = price.spot if spot else price.on_demand
        kind = "spot" if spot else "on demand"
        if amount is None:
            return f"no price of {chip} {kind}: give yours, --prices FILE.yaml"
        return (
            f"{self.currency} {chip_hours * amount:,.0f} {kind}: {chip_hours:,.1f} chip-hours at "
            f"{amount:g} ({self.source}, {self.date}; yours: --prices FILE.yaml)"
        )


# On demand. Spot prices change every month and by region, so that none is claimed.
LISTED = Prices(
    date="2025-11",
    source="cloud.google.com/tpu/pricing, list price of US regions",
    chip_hour={
        "v4": Price(on_demand=3.22),
        "v5e": Price(on_demand=1.20),
        "v5p": Price(on_demand=4.20),
        "v6e": Price(on_demand=2.70),
    },
)


def read_prices(path: str | Path | None) -> Prices:
    """The table of a file; the list prices without one. ConfigError names file and line."""
    return LISTED if path is None else load(Prices, [path])
