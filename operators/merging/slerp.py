"""Spherical interpolation of two models."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts.averaging import lerp
from graftwork.operators.merging.contract import Group, Groups, MergeCard


def slerp(start: Tensor, end: Tensor, alpha: float, straight_above: float = 0.9995) -> Tensor:
    """Point on the arc from `start` to `end`, taken as vectors; exact at both ends.

    Args:
        alpha: 0 is the start, 1 the end.
        straight_above: for |cosine| above this along the straight line.
    """
    if alpha in (0, 1):
        return lerp(start, end, alpha)
    norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (start, end)]
    # A vector without a direction stands at a right angle to all others, as in mergekit.
    length = norms[0] * norms[1]
    cosine = float(start.flatten() @ end.flatten()) / length if length else 0.0
    if abs(cosine) > straight_above:
        return lerp(start, end, alpha)
    angle = math.acos(cosine)
    weights = [math.sin(part * angle) / math.sin(angle) for part in (1 - alpha, alpha)]
    return start.mul(weights[0]).add_(end, alpha=weights[1])


@dataclass(frozen=True, kw_only=True)
class Slerp:
    """Interpolates on the arc between two models, the newest of a series, each tensor for itself.

    Statistics of images, such as class means, are interpolated along the straight line.

    Shoemake, https://doi.org/10.1145/325334.325242; for weights as in mergekit,
    https://arxiv.org/abs/2403.13257.

    Args:
        alpha: share of the newer model.
        straight_above: tensors with a larger |cosine| are interpolated along the straight line.
    """

    alpha: float = 0.5
    straight_above: float = 0.9995

    card: ClassVar[MergeCard] = MergeCard(
        title="SLERP",
        paper="https://doi.org/10.1145/325334.325242",
        summary="Interpolates between two models along an arc.",
        version=2,
        most=2,
        ordered=True,
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "alpha": (0 <= self.alpha <= 1, "in 0..1"),
                "straight_above": (0 <= self.straight_above < 1, "at least 0 and below 1"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        def merge(group: Group) -> Tensor:
            start, end = group.models
            if not group.learned:  # a covariance on an arc would be larger than both
                return lerp(start, end, self.alpha)
            return slerp(start, end, self.alpha, self.straight_above)

        return merge
