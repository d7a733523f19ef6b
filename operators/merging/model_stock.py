"""Model Stock: how far to go from the start to the mean follows from the angles."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.methods.parts.averaging import lerp
from graftwork.operators.merging.contract import Group, Groups, MergeCard


def ratio(cosine: float, count: int) -> float:
    """Share t of the mean: n c / (1 + (n - 1) c), the cosine c clamped to 0..1."""
    cosine = min(1.0, max(0.0, cosine))
    # Rounding must not carry it past 1.
    return min(1.0, count * cosine / (1 + (count - 1) * cosine))


def mean_cosine(vectors: Sequence[Tensor]) -> float:
    """Mean cosine over all pairs of at least two vectors; 0 with one that is zero."""
    count, square, units = len(vectors), 0.0, None
    for vector in vectors:
        norm = torch.linalg.vector_norm(vector, dtype=torch.float64)
        if norm != 0:  # NaN is not passed over
            unit = vector / norm.to(vector.dtype)
            square += 1.0
            units = unit if units is None else units.add_(unit)
    if units is None:
        return 0.0
    # |sum of units|^2 is the number of units, and twice the cosine of every pair.
    whole = float(torch.linalg.vector_norm(units, dtype=torch.float64)) ** 2
    return (whole - square) / (count * (count - 1))


def model_stock(models: Sequence[Tensor], base: Tensor) -> Tensor:
    """t * mean + (1 - t) * base, t by the mean cosine of the (model - base)."""
    total, vectors = torch.zeros_like(base), []
    for model in models:
        vectors.append(model - base)
        total += model
    total /= len(vectors)
    cosine = mean_cosine(vectors)
    if not math.isfinite(cosine):
        return total  # NaN or infinite as a model is: no share of it is right
    return lerp(base, total, ratio(cosine, len(vectors)))


@dataclass(frozen=True, kw_only=True)
class ModelStock:
    """Goes from the state before training towards the mean, each tensor for itself.

    Jang et al., https://arxiv.org/abs/2403.19522. The more the task vectors point the same way, the
    further.
    """

    # Differs from mergekit, which clamps the cosine to -1..1: the denominator could reach 0.
    card: ClassVar[MergeCard] = MergeCard(
        title="Model Stock",
        paper="https://arxiv.org/abs/2403.19522",
        summary="Between the state before training and the mean, by the angles of task vectors.",
        base=True,
        averages=False,
    )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: model_stock(group.models, group.base)
