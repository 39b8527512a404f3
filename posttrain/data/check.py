"""Every bad line of the data, with what to do about it; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.chat.template import ChatTemplate
from posttrain.data.config import DataConfig
from posttrain.data.prepare import files_of, refuse_split, run
from posttrain.data.report import Report, SourceReport
from posttrain.data.rows import Defect
from posttrain.types import DataKind


@dataclass(frozen=True)
class Checked:
    """All defects, in the order of the data, and the number of rows that were read."""

    defects: list[Defect]
    rows: int


def check(
    cfg: DataConfig,
    chat: ChatTemplate | None,
    *,
    kind: DataKind = "samples",
    quiet: bool = True,
) -> Checked:
    """Reads every row of every source, all of one kind.

    With `chat`, rows are also rendered and tokenised: what the template refuses is a defect too.
    Raises ValueError for sources that cannot be read at all.
    """
    refuse_split(cfg, kind)
    files = files_of(cfg)
    empty = {name: SourceReport() for name in cfg.sources}
    report = Report("", cfg.seq_len, cfg.too_long, empty, kind=kind)
    defects: list[Defect] = []
    for result in run(cfg, chat, files, report, title="check", shown=not quiet):
        defects += sorted(result.defects + result.too_long, key=lambda defect: defect.line)
    return Checked(defects, report.total.given)
