"""What every preference loss says of itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from posttrain.config import Config
from posttrain.types import Batch, DataKind, Terms, TokenOutputs


class PreferenceLoss(Config):
    """A loss of `posttrain preference`.

    data: the kind of data it takes. coupled: what a term depends on beside its own pair or answer:
    "" nothing; "step" a statistic of all examples of the step, which it has a method for (see
    train/step.py); "micro-batch" the others of the micro-batch, so that accumulation changes it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "entropy", "correct"})
    data: ClassVar[DataKind] = "pairs"
    coupled: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """The terms of one micro-batch."""
