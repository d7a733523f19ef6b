"""DARE: drop entries of task vectors at random, rescale the others, then merge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.operators.merging.contract import Group, Groups, MergeCard
from graftwork.operators.merging.ties import agreeing, trimmed_to
from graftwork.operators.seeds import derive


def drop(vector: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The vector with each entry kept with probability 1 - share, and then divided by it."""
    if share == 0:
        return vector.clone()
    kept = torch.rand(vector.shape, generator=generator) >= share
    return vector.mul(kept).div_(1 - share)


def dare(
    models: Sequence[Tensor],
    base: Tensor,
    generators: Sequence[torch.Generator],
    *,
    share: float,
    scale: float,
    combine: Literal["mean", "sum", "ties"],
    density: float = 1.0,
) -> Tensor:
    """base + scale * the mean, sum or agreeing part of (model - base) after dropping.

    Args:
        generators: one of each model, so that no draw depends on another tensor or model.
        share: of entries that are dropped.
        density: share of entries that TIES keeps of each vector after that.
    """
    pairs = zip(models, generators, strict=True)
    vectors = [drop(model - base, share, generator) for model, generator in pairs]
    if combine == "ties":
        return agreeing(trimmed_to(vectors, density), "mean").mul_(scale).add_(base)
    total = vectors[0]
    for vector in vectors[1:]:
        total += vector
    return total.mul_(scale / len(vectors) if combine == "mean" else scale).add_(base)


@dataclass(frozen=True, kw_only=True)
class Dare:
    """Drops most entries of task vectors at random and rescales the rest; the mean is as before.

    Yu et al., https://arxiv.org/abs/2311.03099.

    Args:
        drop: share of entries that are dropped. Models trained one after the other bear 0.5, but
            not the 0.9 that models side by side do.
        scale: factor of the merged task vector.
        combine: the mean or the sum of what is left, or per entry the mean of what has the elected
            sign (TIES).
        density: of "ties", the share of entries of each tensor of what dropping left that stays,
            the largest ones; 1 does not trim, as in mergekit's `dare_ties`, 0.2 as in the code of
            DARE's authors, which trims the whole model as one vector.
        only_matrices: leave tensors with one axis as they are.
        seed: of the draws; each tensor of each model has draws of its own.
    """

    # Differs from mergekit, which rescales to the L1 norm before dropping: the expectation is kept
    # as in the paper.
    drop: float = 0.5
    scale: float = 1.0
    combine: Literal["mean", "sum", "ties"] = "mean"
    density: float = 1.0
    only_matrices: bool = False
    seed: int = 0

    card: ClassVar[MergeCard] = MergeCard(
        title="DARE",
        paper="https://arxiv.org/abs/2311.03099",
        summary="Drops entries of task vectors at random, rescales the rest, and merges.",
        least=1,
        base=True,
        averages=False,
        ordered=True,
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "drop": (0 <= self.drop < 1, "at least 0 and below 1"),
                "scale": (self.scale > 0, "above 0"),
                "density": (0 < self.density <= 1, "above 0 and at most 1"),
                "seed": (self.seed >= 0, "at least 0"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        def merge(group: Group) -> Tensor:
            models, base = group.models, group.base
            generators = [
                torch.Generator().manual_seed(derive(self.seed, "dare", number, group.name))
                for number in range(len(models))
            ]
            share = 0.0 if self.only_matrices and base.ndim < 2 else self.drop
            return dare(
                models,
                base,
                generators,
                share=share,
                scale=self.scale,
                combine=self.combine,
                density=self.density,
            )

        return merge
