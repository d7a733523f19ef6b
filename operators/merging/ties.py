"""TIES: trim task vectors, elect signs, and average what agrees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.operators.merging.contract import Group, Groups, MergeCard
from graftwork.operators.merging.trim import Cut, cut, equal_count, kept_count, trimmed

Combine = Literal["mean", "sum", "max"]


def agreeing(
    vectors: Sequence[Tensor], combine: Combine, majority: Callable[[], float] | None = None
) -> Tensor:
    """Mean (sum, largest) per entry of the vectors with the elected sign.

    Args:
        vectors: trimmed task vectors of one shape.
        majority: sign for entries whose vectors cancel; + if not given, as in mergekit.
    """
    signs = vectors[0].clone()
    for vector in vectors[1:]:
        signs += vector
    signs.sign_()
    undecided = signs == 0
    undecided &= torch.stack([vector != 0 for vector in vectors]).any(dim=0)
    if bool(undecided.any()):
        signs[undecided] = 1.0 if majority is None else majority()
    # No vector agrees with NaN, which would then be gone.
    total = torch.zeros_like(signs).masked_fill_(signs.isnan(), torch.nan)
    if combine == "max":
        for vector in vectors:
            total = torch.maximum(total, vector * signs)
        return total * signs
    count = torch.zeros_like(signs)
    for vector in vectors:
        agrees = vector * signs > 0
        total += vector * agrees
        count += agrees
    return total if combine == "sum" else total.div_(count.clamp_(min=1))


def sign_of(total: float) -> float:
    """1 or -1; a draw is 1."""
    return -1.0 if total < 0 else 1.0


def ties(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    combine: Combine = "mean",
    cuts: Sequence[Cut] | None = None,
    majority: Callable[[], float] | None = None,
) -> Tensor:
    """base + scale * the agreeing part of the trimmed (model - base).

    Args:
        density: share of each task vector's entries that stays.
        cuts: of each model, where the whole model was trimmed as one vector; else within these
            tensors.
        majority: see `agreeing`.
    """
    vectors = trimmed_to([model - base for model in models], density, cuts)
    return agreeing(vectors, combine, majority).mul_(scale).add_(base)


def trimmed_to(
    vectors: Sequence[Tensor], density: float, cuts: Sequence[Cut] | None = None
) -> Sequence[Tensor]:
    """Each vector with its largest entries alone.

    Args:
        density: share of entries that stays.
        cuts: where, if that was decided for a whole of which these are parts.
    """
    if density >= 1:
        return vectors
    cuts = cuts or [cut(lambda v=v: iter([v]), kept_count(density, v.numel())) for v in vectors]
    return [trimmed(vector, at) for vector, at in zip(vectors, cuts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Trims task vectors to their largest entries, elects a sign per entry, averages what agrees.

    Yadav et al., https://arxiv.org/abs/2306.01708.

    Args:
        density: share of entries of a task vector that stays; exactly so many, the largest.
        scale: factor of the merged task vector.
        trim: over the whole model as one vector, where entries that cancel take the sign of the
            whole's majority (the paper), or each tensor for itself, where they take + (mergekit).
        combine: of the entries with the elected sign the mean, the sum, or the largest.
    """

    density: float = 0.2
    scale: float = 1.0
    trim: Literal["global", "tensor"] = "global"
    combine: Combine = "mean"

    card: ClassVar[MergeCard] = MergeCard(
        title="TIES",
        paper="https://arxiv.org/abs/2306.01708",
        summary="Trims task vectors, elects a sign per entry, and averages what agrees.",
        least=1,
        base=True,
        averages=False,
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "density": (0 < self.density <= 1, "above 0 and at most 1"),
                "scale": (self.scale > 0, "above 0"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        cuts = None
        if self.trim == "global" and self.density < 1:
            cuts = global_cuts(groups, self.density)

        @cache
        def majority() -> float:
            """Majority of the elected signs of all tensors; asked for only where vectors cancel."""
            total = 0.0
            for group in groups():
                vectors = self._trimmed(group, cuts)
                total += float(torch.stack(vectors).sum(dim=0).sign_().sum(dtype=torch.float64))
            return sign_of(total)

        def merge(group: Group) -> Tensor:
            return ties(
                group.models,
                group.base,
                density=self.density,
                scale=self.scale,
                combine=self.combine,
                cuts=None if cuts is None else cuts[group.name],
                majority=majority if self.trim == "global" else None,
            )

        return merge

    def _trimmed(self, group: Group, cuts: dict[str, list[Cut]] | None) -> list[Tensor]:
        base = group.base
        own = None if cuts is None else cuts[group.name]
        return list(trimmed_to([model - base for model in group.models], self.density, own))


def global_cuts(groups: Groups, density: float) -> dict[str, list[Cut]]:
    """Cuts of each tensor of each model, so that a share of the whole model stays."""
    first = list(groups())
    bases = [group.base for group in first]
    sizes = [base.numel() for base in bases]
    kind = max((base.dtype for base in bases), key=lambda d: d.itemsize, default=torch.float32)
    del bases
    count = len(first[0].models) if first else 0
    cuts: dict[str, list[Cut]] = {group.name: [] for group in first}
    for model in range(count):

        def vectors(model: int = model) -> Iterator[Tensor]:
            return ((group.models[model] - group.base).to(kind) for group in groups())

        whole = cut(vectors, kept_count(density, sum(sizes)))
        left = whole.equal
        for group in first:
            equal = left
            if whole.threshold and left:
                # Rare: several entries have exactly this magnitude; the first ones stay.
                vector = group.models[model] - group.base
                equal = min(left, equal_count(vector, whole))
                left -= equal
            cuts[group.name].append(replace(whole, equal=equal))
    return cuts
