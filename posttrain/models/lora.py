"""What low-rank adapters a run trains: which matrices they stand beside, how large, how strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.config import Config, semantic

Pattern = Annotated[str, Field(min_length=1)]


class LoraConfig(Config):
    """Adapters (Hu et al. 2021, equation 3): W x becomes W x + scale * B A x, and W is frozen.

    A begins random, B zero: training starts from the model as it is. scale is alpha / rank.
    """

    targets: tuple[Pattern, ...] = semantic(
        ("*",),
        min_length=1,
        help="patterns of the layers' matrices: q, attention/*, q_proj; * = all that take one",
    )
    rank: int = semantic(16, gt=0, help="columns of A, rows of B")
    alpha: float = semantic(32.0, gt=0, help="what is added is B A x times alpha / rank")
    rslora: bool = semantic(False, help="times alpha / sqrt(rank) (Kalajdzievski 2023)")
    dropout: float = semantic(0.0, ge=0, lt=1, help="of what A reads, in training")
    path: str | None = semantic(None, help="folder of a PEFT adapter that training starts from")
    quantize: Literal["none", "int8", "nf4"] = semantic(
        "none", help="how the frozen matrices are kept (QLoRA); needs posttrain[qlora]"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _as_peft_has_them(cls, value: Any) -> Any:
        """One pattern is a list of one; PEFT's word for all matrices is *."""
        return ["*" if value == "all-linear" else value] if isinstance(value, str) else value

    @property
    def adapter(self) -> Adapter:
        """The static part, as layers keep it."""
        scale = self.alpha / (self.rank**0.5 if self.rslora else self.rank)
        return Adapter(scale, self.dropout)


@dataclass(frozen=True)
class Adapter:
    """How a layer's adapters are computed."""

    scale: float
    dropout: float


def is_adapter(path: str) -> bool:
    """Whether the parameter at a path is not of the base model: adapters, rows of new tokens."""
    name = path.rpartition("/")[2]
    return name.endswith(("_lora_a", "_lora_b")) or name in ("embedding_new", "head_new")
