"""Adapters of parameters that lie in one tensor of their file, as Phi-3's q, k and v do.

PEFT has one adapter for the tensor. Of ours, it is their A's one below the other and a B of blocks,
whose rank is the sum of theirs; one that PEFT trained is taken apart into adapters with the same A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.models.keys import Place, file_names, is_stacked, key_of
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import Spec


@dataclass(frozen=True)
class Group:
    """Parameters with adapters that lie in the same tensor of each layer, in their order there."""

    paths: tuple[str, ...]
    spans: tuple[slice, ...]
    """The rows of the tensor that each is."""
    rows: int

    def join(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[Any, Any]:
        """PEFT's A [rank, in] and B [out, rank] of the tensor, of each parameter's."""
        rank = len(a[0])
        whole = np.zeros((self.rows, rank * len(a)), b[0].dtype)
        for i, (span, part) in enumerate(zip(self.spans, b, strict=True)):
            whole[span, i * rank : (i + 1) * rank] = part
        return np.concatenate(a), whole

    def cut(self, a: np.ndarray, b: np.ndarray, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each parameter's A and B. ValueError where they are more than B of blocks can be."""
        found, rest = [], b.copy()
        for i, span in enumerate(self.spans):
            columns = slice(i * rank, (i + 1) * rank) if len(a) > rank else slice(None)
            found.append((a[columns], b[span, columns]))
            rest[span, columns] = 0
        if rest.any():
            raise ValueError(f"not an adapter of {', '.join(self.paths)} alone, each by itself")
        return found


def groups(paths: Iterable[str], placed: Mapping[str, Place], spec: Spec) -> list[Group]:
    """The parameters by the tensors that they lie in."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths, key=lambda path: placed[path].first):
        stack = path.split("/")[1] if is_stacked(path) else ""
        sharing.setdefault((stack, key_of(path, spec).name), []).append(path)
    return [
        Group(
            tuple(found),
            tuple(slice(placed[p].first, placed[p].first + placed[p].rows) for p in found),
            placed[found[0]].tensor[0],
        )
        for found in sharing.values()
    ]


def patterns(found: Iterable[Group], spec: Spec, cfg: LoraConfig) -> dict[str, dict[str, Any]]:
    """adapter_config.json's ranks and alphas of tensors with several adapters; alike in scale."""
    ranks, alphas = {}, {}
    for group in found:
        if (n := len(group.paths)) > 1:
            for _, name in file_names(group.paths[0], spec):
                module = name.removesuffix(".weight")
                ranks[module] = n * cfg.rank
                alphas[module] = cfg.alpha * (math.sqrt(n) if cfg.rslora else n)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
