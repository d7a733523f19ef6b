"""SLDA: linear discriminant analysis with one covariance for all classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.hyperparameters import HyperparameterError, require
from graftwork.methods.parts.sums import by_row, class_sums, columns, sum_states


@dataclass(frozen=True, kw_only=True)
class SLDA:
    """Linear discriminant analysis from sums: class means, one pooled covariance.

    Hayes and Kanan, https://arxiv.org/abs/1909.01520, section 3.
    Shapes: N rows, D feature width, C classes seen, K all classes.

    Args:
        shrinkage: e in the precision matrix ((1 - e) covariance + e I)^-1, from 0 to 1; 1 gives
            the nearest class mean by Euclidean distance.
        prior: add the logarithm of each class's share of the rows to its score.
    """

    card: ClassVar[Card] = Card(
        title="SLDA",
        paper="https://arxiv.org/abs/1909.01520",
        summary="Linear discriminant analysis: class means and one pooled covariance.",
        memory="C * D + D * D floats",
    )

    shrinkage: float = 1e-4
    prior: bool = False

    def __post_init__(self) -> None:
        require(self, {"shrinkage": (0 <= self.shrinkage <= 1, "between 0 and 1")})

    def statistics(self, rows: Rows, seed: int) -> State:
        """`count` [K], `sum` [K, D] and `moment` [D, D], the sum of outer products, float64."""
        count, total = class_sums(rows)
        features = rows.features.double()
        return {"count": count, "sum": total, "moment": features.T @ features}

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        return sum_states(a, b)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`weight` [C, D] and `bias` [C], float32.

        Raises:
            HyperparameterError: the covariance is singular and is not shrunk.
        """
        # Differs from tyler-hayes/Deep_SLDA: the exact pooled covariance. The streaming update
        # there depends on the order of the samples and counts the first sample of each class
        # as its distance from the origin.
        index = columns(total["count"], classes)
        count = total["count"][index].double()
        sums = total["sum"][index]
        means = sums / count[:, None]
        covariance = (total["moment"] - sums.T @ means) / count.sum()
        shrunk = (1 - self.shrinkage) * (covariance + covariance.T) / 2
        shrunk.diagonal().add_(self.shrinkage)
        factor, info = torch.linalg.cholesky_ex(shrunk)
        if info:
            reason = f"must be greater than 0 for a singular covariance, got {self.shrinkage}"
            raise HyperparameterError([("shrinkage", reason)])
        # Scores are taken from the mean of the class means: this adds the same number to all
        # scores of a row, and keeps float32 from losing digits to the features' common part.
        centre = means.mean(0)
        centred = means - centre
        weight = torch.cholesky_solve(centred.T, factor).T
        bias = -(0.5 * centred + centre).mul(weight).sum(1)
        if self.prior:
            bias = bias + (count / count.sum()).log()
        return {"weight": weight.float(), "bias": bias.float()}

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Discriminant scores [N, C], up to a number common to all classes of a row."""
        return by_row(lambda x: x.float() @ state["weight"].T + state["bias"], features)

    def report(self, state: State) -> dict[str, Any]:
        """Nothing is chosen by the fit."""
        return {}
