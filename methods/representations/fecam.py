"""FeCAM: Mahalanobis distance to each class under its own correlation matrix, or one for all."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.hyperparameters import LATER, HyperparameterError, require
from graftwork.methods.parts.sums import by_row, class_sums, columns, sum_states


@dataclass(frozen=True, kw_only=True)
class FeCAM:
    """Smallest Mahalanobis distance under per-class, shrunk, normalised covariances.

    Goswami et al., https://arxiv.org/abs/2309.14062, section 3: equations 3, 6 and 7; the
    settings of its experiments with a pre-trained ViT. A class of one image has no covariance of
    its own: its distance is Euclidean, unless all classes have one in common.
    Shapes: N rows, D feature width, C classes seen, K all classes.

    Args:
        alpha1: multiple of the mean variance that is added to the diagonal of each covariance.
        alpha2: multiple of the mean covariance that is added off the diagonal, at most alpha1:
            more can make a covariance indefinite.
        tukey: power that features are raised to before they are normalised, for features that
            are not negative; 1 leaves them alone.
        covariance: each class's own, or the pooled one within all classes that were seen, shrunk
            and normalised alike, for classes of few images.
    """

    card: ClassVar[Card] = Card(
        title="FeCAM",
        paper="https://arxiv.org/abs/2309.14062",
        summary="Mahalanobis distance to class means under per-class correlation matrices.",
        memory="C * (D + D * D) floats; C * D + D * D with one covariance for all",
        growth="classes",
        separable=True,
    )

    alpha1: float = 1.0
    alpha2: float = 0.0
    tukey: float = 1.0
    covariance: Literal["class", "common"] = field(default="class", metadata=LATER)

    def __post_init__(self) -> None:
        require(
            self,
            {
                "alpha1": (self.alpha1 >= 0, "at least 0"),
                "alpha2": (0 <= self.alpha2 <= self.alpha1, "between 0 and alpha1"),
                "tukey": (0 < self.tukey <= 1, "greater than 0 and at most 1"),
            },
        )

    @property
    def separable(self) -> bool:
        """Not with a covariance that all classes have in common."""
        return self.covariance == "class"

    def statistics(self, rows: Rows, seed: int) -> State:
        """`count` [K], `sum` [K, D] and `moment` [P, D, D] of the unit features, float64.

        The P `classes` present, ascending, are the only ones with a second moment: the sum over a
        few classes of many stays small. With one covariance for all, `moment` [D, D] is of all.
        """
        unit = self._unit(rows.features.double())
        count, total = class_sums(replace(rows, features=unit))
        if self.covariance == "common":
            return {"count": count, "sum": total, "moment": unit.T @ unit}
        classes = count.nonzero()[:, 0]
        moment = unit.new_empty(len(classes), unit.shape[1], unit.shape[1])
        for place, label in enumerate(classes.tolist()):
            members = unit[rows.labels == label]
            moment[place] = members.T @ members
        return {"count": count, "sum": total, "classes": classes, "moment": moment}

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        if self.covariance == "common":
            return sum_states(a, b)
        count = a["count"] + b["count"]
        classes = count.nonzero()[:, 0]
        moment = a["moment"].new_zeros(len(classes), *a["moment"].shape[1:])
        for part in (a, b):
            moment[torch.searchsorted(classes, part["classes"])] += part["moment"]
        return {"count": count, "sum": a["sum"] + b["sum"], "classes": classes, "moment": moment}

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`mean` [C, D] and `whiten` [C, D, D], the inverse Cholesky factors, float32.

        With one covariance for all classes, `whiten` [D, D] is that one's.

        Raises:
            HyperparameterError: a covariance is singular and is not shrunk enough.
        """
        index = columns(total["count"], classes)
        means = total["sum"][index] / total["count"][index, None]
        if self.covariance == "common":
            return {"mean": means.float(), "whiten": self._common(total).float().contiguous()}
        width = means.shape[1]
        whiten = means.new_empty(len(index), width, width, dtype=torch.float32)
        places = torch.searchsorted(total["classes"], index)
        for row, label in enumerate(index.tolist()):
            count = int(total["count"][label])
            scatter = total["moment"][places[row]] - count * torch.outer(means[row], means[row])
            whose = f"the covariance of class {label} with {count} rows"
            whiten[row] = self._whitening(scatter, count, count - 1, whose)
        return {"mean": means.float(), "whiten": whiten}

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Negative squared Mahalanobis distances [N, C]."""

        def score(rows: Tensor) -> Tensor:
            # Differs from dipamgoswami/FeCAM, which reads the distances off the diagonal of an
            # N x N matrix and normalises in float32.
            unit = self._unit(rows.double()).float()
            if self.covariance == "common":
                # From the mean of the class means: what is common to all loses no digits.
                centre = state["mean"].mean(dim=0)
                unit, means = (
                    (part - centre) @ state["whiten"].T for part in (unit, state["mean"])
                )
                return -torch.stack([(unit - mean).square_().sum(1) for mean in means], dim=1)
            distances = [
                ((unit - mean) @ factor.T).square_().sum(1)
                for mean, factor in zip(state["mean"], state["whiten"], strict=True)
            ]
            return -torch.stack(distances, dim=1)

        return by_row(score, features)

    def report(self, state: State) -> dict[str, Any]:
        """Nothing is chosen by the fit."""
        return {}

    def _unit(self, features: Tensor) -> Tensor:
        if self.tukey != 1:
            if (features < 0).any():
                reason = f"must be 1 for features that can be negative, got {self.tukey}"
                raise HyperparameterError([("tukey", reason)])
            features = features.pow(self.tukey)
        return F.normalize(features, dim=1)

    def _common(self, total: State) -> Tensor:
        """Inverse Cholesky factor [D, D] of the correlation within classes, of all rows pooled."""
        # Differs from dipamgoswami/FeCAM, which averages the covariances of tasks, weighted by
        # their numbers of classes: pooled sums depend on no order and on no split into tasks.
        seen = total["count"].nonzero()[:, 0]
        sums, number = total["sum"][seen], int(total["count"].sum())
        scatter = total["moment"] - sums.T @ (sums / total["count"][seen, None])
        whose = f"the covariance of {len(seen)} classes with {number} rows"
        return self._whitening((scatter + scatter.T) / 2, number, number - len(seen), whose)

    def _whitening(self, scatter: Tensor, count: int, freedom: int, whose: str) -> Tensor:
        """Inverse Cholesky factor [D, D] of the shrunk and normalised covariance.

        Args:
            scatter: sum of outer products around the means [D, D].
            count: rows that it is of.
            freedom: number that it is divided by.
            whose: for people.

        Raises:
            HyperparameterError: it is singular.
        """
        eye = torch.eye(len(scatter), dtype=torch.float64, device=scatter.device)
        # Differs from dipamgoswami/FeCAM, where one row gives NaN: without any spread the distance
        # is Euclidean, the limit of a shrunk isotropic covariance. Unit rows make 1e-12 far below
        # any real spread and far above rounding.
        if not freedom or scatter.trace() <= 1e-12 * count:
            return eye
        factor, info = torch.linalg.cholesky_ex(self._correlation(scatter / freedom))
        if info:
            reason = f"must be larger: {whose} is singular, got {self.alpha1}"
            raise HyperparameterError([("alpha1", reason)])
        return torch.linalg.solve_triangular(factor, eye, upper=False)

    def _correlation(self, covariance: Tensor) -> Tensor:
        """Shrink [D, D], then scale to a unit diagonal."""
        diagonal = covariance.diagonal()
        off = covariance - torch.diag(diagonal)
        # Constant features do not count towards the mean off the diagonal.
        nonzero = torch.count_nonzero(off).clamp(min=1)
        shrunk = covariance + self.alpha2 * off.sum() / nonzero
        shrunk.diagonal().copy_(diagonal + self.alpha1 * diagonal.mean())
        deviation = shrunk.diagonal().clamp(min=0).sqrt()
        return shrunk / torch.outer(deviation, deviation)
