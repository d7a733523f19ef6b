"""Merges of task vectors: what training added to the state before it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts.averaging import max_magnitude
from graftwork.operators.merging.contract import Group, Groups, MergeCard


def task_arithmetic(
    models: Iterable[Tensor], base: Tensor, scale: float, combine: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """base + scale * sum of (model - base), or of their mean."""
    total, count = torch.zeros_like(base), 0
    for model in models:
        total += model
        total -= base
        count += 1
    return total.mul_(scale / count if combine == "mean" else scale).add_(base)


def magmax(models: Iterable[Tensor], base: Tensor, scale: float) -> Tensor:
    """base + scale * per entry the (model - base) of largest magnitude; ties go to the later."""
    largest = torch.zeros_like(base)
    for model in models:
        largest = max_magnitude(largest, model - base)
    return largest.mul_(scale).add_(base)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """Adds what every model learned to the state before training.

    Ilharco et al., https://arxiv.org/abs/2212.04089.

    Args:
        scale: factor of the sum; below 0 unlearns.
        combine: the sum of all task vectors, or their mean.
    """

    scale: float = 0.3
    combine: Literal["sum", "mean"] = "sum"

    card: ClassVar[MergeCard] = MergeCard(
        title="Task arithmetic",
        paper="https://arxiv.org/abs/2212.04089",
        summary="Adds the scaled sum of all task vectors to the state before training.",
        least=1,
        base=True,
        averages=False,
    )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: task_arithmetic(group.models, group.base, self.scale, self.combine)


@dataclass(frozen=True, kw_only=True)
class MagMax:
    """Takes per entry the task vector of largest magnitude.

    Marczak et al., https://arxiv.org/abs/2407.06322. Models that were trained one after the other
    hold earlier updates in later task vectors.

    Args:
        scale: factor of the merged task vector.
    """

    scale: float = 0.5

    card: ClassVar[MergeCard] = MergeCard(
        title="MagMax",
        paper="https://arxiv.org/abs/2407.06322",
        summary="Per entry the task vector of largest magnitude; ties go to the later one.",
        least=1,
        base=True,
        averages=False,
        ordered=True,
    )

    def __post_init__(self) -> None:
        require(self, {"scale": (self.scale > 0, "above 0")})

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: magmax(group.models, group.base, self.scale)
