"""Joint linear probe: the upper bound for linear classifiers on frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts.sums import by_row, columns
from graftwork.methods.representations import ridge

L2_GRID = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
"""Penalties of the logistic regression, strongest first."""


@dataclass(frozen=True, kw_only=True)
class JointLinear:
    """One linear classifier, fitted anew on all rows of all tasks seen; no continual learner.

    After the joint linear probe of https://arxiv.org/abs/2307.02251.
    Shapes: N rows, D feature width, C classes seen, K all classes.

    Args:
        solver: ridge regression to one-hot targets, or multinomial logistic regression on
            standardised features. Both choose their penalty on held-out rows of all tasks seen.
        max_iterations: most L-BFGS iterations for each penalty of the logistic regression.
    """

    card: ClassVar[Card] = Card(
        title="Joint linear probe",
        paper="https://arxiv.org/abs/2307.02251",
        summary="A linear classifier fitted on the frozen features of all tasks at once.",
        version=2,
        memory="N * D floats: all features seen",
        growth="rows",
        upper_bound=True,
    )

    solver: Literal["ridge", "logistic"] = "ridge"
    max_iterations: int = 200

    def __post_init__(self) -> None:
        kept = 1 <= self.max_iterations <= 100_000
        require(self, {"max_iterations": (kept, "between 1 and 100000")})

    def statistics(self, rows: Rows, seed: int) -> State:
        """The rows: `features` [N, D], `labels` [N], `samples` [N], and `count` [K]."""
        return {
            "count": torch.bincount(rows.labels, minlength=rows.num_classes),
            "features": rows.features,
            "labels": rows.labels,
            "samples": rows.samples,
        }

    def add(self, a: State, b: State) -> State:
        """The rows of both."""
        names = ("features", "labels", "samples")
        return {"count": a["count"] + b["count"]} | {n: torch.cat([a[n], b[n]]) for n in names}

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`weight` [C, D] and `bias` [C], float32, and `penalty`, the one chosen, float64."""
        # Differs from RanPAC/RanPAC: the optimum on stored features, not SGD on augmented images.
        index = columns(total["count"], classes)
        # In the order of the samples' ids, so that no split or order of tasks changes a bit.
        order = total["samples"].argsort(stable=True)
        features = total["features"][order].double()
        right = ridge.targets(total["labels"][order], index)
        held = ridge.held_out(total["samples"][order], seed=0)
        solve = _ridge if self.solver == "ridge" else self._logistic
        weight, bias, penalty = solve(features, right, held)
        return {
            "weight": weight.T.float().contiguous(),
            "bias": bias.float(),
            "penalty": torch.tensor(penalty, dtype=torch.float64),
        }

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Outputs of the linear classifier [N, C]."""
        return by_row(lambda x: x.float() @ state["weight"].T + state["bias"], features)

    def report(self, state: State) -> dict[str, Any]:
        """`penalty`: strength of the ridge, or L2 penalty of the mean cross-entropy."""
        return {"penalty": state["penalty"].item()}

    def _logistic(
        self, features: Tensor, right: Tensor, held: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Weights [D, C], bias [C] and penalty, with the smallest held-out cross-entropy."""
        mean, deviation = features.mean(0), features.std(0, correction=0)
        # Rounding leaves a constant feature some spread of its own.
        constant = deviation <= 1e-12 * mean.abs()
        standard = (features - mean) / torch.where(constant, 1.0, deviation)
        parameters = features.new_zeros(features.shape[1] + 1, right.shape[1])
        penalty, best = L2_GRID[0], float("inf")
        judges = ridge.judges(held, right)
        if judges.any():
            fit, start = (standard[~held], right[~held]), parameters
            for candidate in L2_GRID:
                start = _descend(*fit, start, candidate, self.max_iterations)
                outputs = standard[judges] @ start[1:] + start[0]
                error = F.cross_entropy(outputs, right[judges]).item()
                if error >= best:
                    break
                penalty, best, parameters = candidate, error, start
        parameters = _descend(standard, right, parameters, penalty, self.max_iterations)
        weight = parameters[1:] / torch.where(constant, 1.0, deviation)[:, None]
        return weight, parameters[0] - mean @ weight, penalty


def _ridge(features: Tensor, right: Tensor, held: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weights [D, C], no bias, and the strength with the smallest held-out squared error."""
    strength = 1.0
    judges = ridge.judges(held, right)
    if judges.any():
        fit = features[~held], right[~held]
        strength = ridge.choose_rows(*fit, features[judges], right[judges])
    weights, used = ridge.solve_rows(features, right, strength)
    return weights, weights.new_zeros(weights.shape[1]), used


def _descend(rows: Tensor, right: Tensor, start: Tensor, penalty: float, limit: int) -> Tensor:
    """Parameters [1 + D, C], bias first, of least mean cross-entropy + penalty / 2 |weights|^2.

    Args:
        rows: standardised features [N, D].
        right: one-hot targets [N, C].
        start: where L-BFGS starts, [1 + D, C].
        penalty: leaves the bias alone.
        limit: most iterations.
    """
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters],
        max_iter=limit,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            outputs = torch.addmm(parameters[0], rows, parameters[1:])
            normaliser = outputs.logsumexp(1, keepdim=True)
            loss = (normaliser[:, 0] - (outputs * right).sum(1)).mean()
            loss = loss + penalty / 2 * parameters[1:].square().sum()
            residual = (outputs.sub_(normaliser).exp_() - right) / len(rows)
            slope = rows.T @ residual + penalty * parameters[1:]
            parameters.grad = torch.cat([residual.sum(0, keepdim=True), slope])
        return loss

    optimiser.step(closure)
    return parameters.detach()
