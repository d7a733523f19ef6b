"""ACIL: recursive least squares, here as the ridge regression that it is equal to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import projection, ridge
from methods.base import Card, Rows, State, by_row, columns, sum_states
from methods.hyperparameters import require


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
        memory="M * M + M * C floats",
        uses_seed=True,
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

    def statistics(self, rows: Rows, seed: int) -> State:
        """`count` [K], `gram` [M, M] and `cross` [M, K], float64, and `draw`, seed and D."""
        hidden = rows.features.double()
        draw = torch.tensor([seed, hidden.shape[1]])
        if self.buffer:
            hidden = projection.relu_layer(hidden, projection.uniform(*draw.tolist(), self.buffer))
        return {
            "count": torch.bincount(rows.labels, minlength=rows.num_classes),
            "draw": draw,
            "gram": ridge.gram(hidden),
            "cross": ridge.cross(hidden, rows.labels, rows.num_classes),
        }

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows.

        Raises:
            ValueError: the two were made with different seeds or widths.
        """
        projection.same_draw(a["draw"], b["draw"])
        return {**sum_states(a, b), "draw": a["draw"]}

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`weight` [C, M] float32, `ridge_used` float64, and with a buffer `projection` [32]."""
        index = columns(total["count"], classes)
        weights, used = ridge.solve(total["gram"], total["cross"][:, index], self.gamma)
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
