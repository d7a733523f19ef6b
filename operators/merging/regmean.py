"""RegMean: linear layers whose outputs are nearest to those of all models on their own inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.operators.merging.contract import Group, Groups, MergeCard
from graftwork.operators.merging.means import mean


def regmean(
    weights: Sequence[Tensor], grams: Sequence[Tensor], off_diagonal: float, ridge: float
) -> Tensor:
    """The weight W [out, in] that solves (sum of G) W^T = sum of G W_i^T.

    Args:
        weights: W_i [out, in].
        grams: G_i [in, in], means of x x^T over the inputs x of the layer.
        off_diagonal: factor of everything beside the diagonal of G.
        ridge: added to the diagonal of the sum, as a share of its mean.
    """
    left, right = None, None
    for weight, gram in zip(weights, grams, strict=True):
        gram = gram.double()
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
        part = gram @ weight.double().T
        left = gram if left is None else left + gram
        right = part if right is None else right + part
    assert left is not None and right is not None, "no model"
    level = left.diagonal().mean()
    if level == 0:  # nothing ever reached the layer
        return mean(weights)
    # The same on both sides, so that equal weights stay what they are.
    left += ridge * level * torch.eye(len(left), dtype=left.dtype)
    right += ridge * level * mean([weight.double() for weight in weights]).T
    return torch.linalg.solve(left, right).T.to(weights[0].dtype).contiguous()


@dataclass(frozen=True, kw_only=True)
class RegMean:
    """Linear layers by least squares on the inputs that each model saw, all else the mean.

    Jin et al., https://arxiv.org/abs/2212.09849.

    Args:
        off_diagonal: factor of everything beside the diagonal of the Gram matrices.
        images: so many training images of each model's newest task, fewer where there are fewer;
            every token of an image is a row.
        ridge: added to the diagonal of the summed Gram matrices, as a share of its mean; pulls
            towards the mean of the weights.
    """

    off_diagonal: float = 0.9
    images: int = 256
    ridge: float = 1e-6

    card: ClassVar[MergeCard] = MergeCard(
        title="RegMean",
        paper="https://arxiv.org/abs/2212.09849",
        summary="Merges linear layers by least squares on their inputs.",
        statistics="gram",
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "off_diagonal": (0 <= self.off_diagonal <= 1, "in 0..1"),
                "images": (self.images >= 1, "at least 1"),
                "ridge": (self.ridge > 0, "above 0"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        def merge(group: Group) -> Tensor:
            if group.statistics is None:
                return mean(group.models)
            return regmean(group.models, group.statistics, self.off_diagonal, self.ridge)

        return merge
