"""Fisher merging: means weighted by how much each entry matters to each model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.operators.merging.contract import Group, Groups, MergeCard
from graftwork.operators.merging.means import mean


def fisher(
    models: Sequence[Tensor],
    importance: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
) -> Tensor:
    """sum of w F th over sum of w F; the mean where all F are 0.

    Args:
        importance: F of each model, at least 0, in the models' shape.
        weights: w of each model; 1 if not given.
        floors: smallest F of each model; 0 if not given.
    """
    weights, floors = weights or [1.0] * len(models), floors or [0.0] * len(models)
    total, plain, norm = None, None, None
    for model, given, weight, floor in zip(models, importance, weights, floors, strict=True):
        # In float64: squares of small gradients leave the range of float32.
        share = given[: len(model)] if given.ndim else given
        share = share.to(torch.float64, copy=True).clamp_(min=floor).mul_(weight)
        part = share * model
        total = part if total is None else total.add_(part)
        norm = share if norm is None else norm.add_(share)
        plain = model.to(torch.float64, copy=True) if plain is None else plain.add_(model)
    assert total is not None and norm is not None and plain is not None, "no model"
    merged = torch.where(norm == 0, plain / len(models), total / norm)
    return merged.to(models[0].dtype)


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """The mean weighted by diagonal Fisher information, measured on training images.

    Matena and Raffel, https://arxiv.org/abs/2111.09832. Squared gradients are taken per image: of
    a batch's mean loss they are no Fisher information. A model that knows one class has none: all
    that it says is certain, and the others decide.

    Args:
        labels: whose gradient is squared: of one label drawn from the model's own distribution, of
            all of them weighted by their probabilities (both the true Fisher), or of the true
            label (the empirical one).
        images: so many training images of each model's newest task, fewer where there are fewer.
        floor: smallest value, as a share of the mean over all that is merged of the model. Biases
            of keys have no gradient at all.
        normalise: divide each model's by its norm over all that is merged, as both authors' code
            and fusion_bench do, so that no task outweighs the others.
    """

    # Differs from the authors' code, which floors at 1e-6 whatever the scale, and only the model
    # that it calls the target, and from fusion_bench, which adds 1e-6: a scale follows from the
    # loss, and half of the entries may be below.
    labels: Literal["model_sample", "model_expectation", "ground_truth"] = "model_sample"
    images: int = 256
    floor: float = 1e-6
    normalise: bool = True

    card: ClassVar[MergeCard] = MergeCard(
        title="Fisher merging",
        paper="https://arxiv.org/abs/2111.09832",
        summary="The mean of all models, weighted by diagonal Fisher information.",
        statistics="fisher",
        version=2,
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "images": (self.images >= 1, "at least 1"),
                "floor": (self.floor >= 0, "at least 0"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        sizes = whole_sizes(groups)
        weights = [1 / size.norm if self.normalise and size.norm else 1.0 for size in sizes]
        floors = [self.floor * size.mean for size in sizes]

        def merge(group: Group) -> Tensor:
            if group.statistics is None:  # not trained, such as a frozen scale
                return mean(group.models)
            return fisher(group.models, group.statistics, weights, floors)

        return merge


@dataclass(frozen=True)
class Size:
    """Size of a model's Fisher information over all entries that are merged: mean and L2 norm."""

    mean: float
    norm: float


def whole_sizes(groups: Groups) -> list[Size]:
    """Sizes of the Fisher information of each model over all measured tensors.

    Rows that only some models have, such as those of later classes, are merged with nothing and do
    not count: all models are measured on the same entries.
    """
    totals: list[float] = []
    squares: list[float] = []
    count = 0
    for group in _measured(groups):
        statistics, rows = group.statistics, group.models[-1]
        assert statistics is not None
        totals = totals or [0.0] * len(statistics)
        squares = squares or [0.0] * len(statistics)
        for number, tensor in enumerate(statistics):
            shared = tensor[: len(rows)] if tensor.ndim else tensor
            totals[number] += float(shared.sum(dtype=torch.float64))
            squares[number] += float(shared.double().square().sum())
        count += rows.numel()
    return [
        Size(total / count, math.sqrt(square))
        for total, square in zip(totals, squares, strict=True)
    ]


def _measured(groups: Groups) -> Iterator[Group]:
    return (group for group in groups() if group.statistics is not None)
