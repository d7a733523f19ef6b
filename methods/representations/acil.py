"""ACIL: recursive least squares, here as the ridge regression that it is equal to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts.sums import by_row, columns
from graftwork.methods.representations import moments, projection


@dataclass(frozen=True, kw_only=True)
class ACIL:
    """Analytic class-incremental learning: ridge regression on all rows seen, from sums.

    Zhuang et al., https://arxiv.org/abs/2205.14922, equations 4, 9 and 10; its recursion gives the
    same weights at every step. Blurry and repeated classes are those of
    https://arxiv.org/abs/2403.15706.
    Shapes: N rows, D feature width, M buffer width (D without buffer), C classes seen, K all.

    Args:
        gamma: strength of the ridge regression.
        buffer: width of the frozen random ReLU layer before the regression; 0 leaves it out.
    """

    card: ClassVar[Card] = Card(
        title="ACIL",
        paper="https://arxiv.org/abs/2205.14922",
        summary="Ridge regression of fixed strength on all rows seen, from second moments.",
        memory="M * M + M * C floats, or N * D while fewer than M rows were seen",
    )

    gamma: float = 0.1
    # Differs from ZHUANGHP/Analytic-continual-learning (8192): its ResNet features are narrow,
    # those of a pre-trained ViT are not.
    buffer: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            {
                "gamma": (self.gamma > 0, "greater than 0"),
                "buffer": (0 <= self.buffer <= 100_000, "between 0 and 100000"),
            },
        )

    @property
    def uses_seed(self) -> bool:
        """With the random layer alone."""
        return self.buffer > 0

    def statistics(self, rows: Rows, seed: int) -> State:
        """The rows themselves while N < M, their sums from then on; see `moments.collect`."""
        width = self.buffer or rows.features.shape[1]
        return moments.collect(rows, seed, width, self._sums)

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows.

        Raises:
            ValueError: the two were made with different seeds or widths.
        """
        return moments.add(a, b, self._width(a), self._sums)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`weight` [C, M] float32, `ridge_used` float64, and with a buffer `projection` [32]."""
        # Differs from ZHUANGHP/Analytic-continual-learning: one solve from the sums instead of a
        # recursion over batches, which gives the same weights and loses symmetry as it goes on.
        index = columns(total["count"], classes)
        weights, used = moments.solve(total, self._expand(total), index, self.gamma)
        state = {
            "weight": weights.T.float().contiguous(),
            "ridge_used": torch.tensor(used, dtype=torch.float64),
        }
        if self.buffer:
            matrix = projection.uniform(*total["draw"].tolist(), self.buffer)
            state["projection"] = projection.digest(matrix)
        return state

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Regression outputs [N, C]."""
        matrix = None
        if self.buffer:
            matrix = projection.uniform(seed, features.shape[1], self.buffer)
            projection.check(matrix, state["projection"])

        def score(rows: Tensor) -> Tensor:
            hidden = rows.float()
            if matrix is not None:
                hidden = projection.relu_layer(hidden, matrix)
            return hidden @ state["weight"].T

        return by_row(score, features)

    def report(self, state: State) -> dict[str, Any]:
        """Strength used: gamma, unless the factorisation needed more; SHA-256 of the buffer."""
        facts: dict[str, Any] = {"ridge_used": state["ridge_used"].item()}
        if self.buffer:
            facts["projection_sha256"] = projection.text(state["projection"])
        return facts

    def _expand(self, state: State) -> moments.Expand:
        """The frozen layer before the regression, in float64."""
        if not self.buffer:
            return Tensor.double
        matrix = projection.uniform(*state["draw"].tolist(), self.buffer)
        return lambda features: projection.relu_layer(features.double(), matrix)

    def _sums(self, state: State) -> State:
        return moments.sums(state, self._expand(state), self._width(state), None)

    def _width(self, state: State) -> int:
        return self.buffer or int(state["draw"][1])
