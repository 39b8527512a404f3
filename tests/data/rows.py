"""What tests read of a source."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.data.config import SourceConfig
from posttrain.data.rows import Row
from posttrain.data.sources import read_blocks


def read_rows(cfg: SourceConfig) -> Iterator[Row]:
    """Its rows, parsed, each with file and number."""
    for block in read_blocks(cfg):
        yield from block.rows()
