"""Closed-form methods, rules of ensembles and metrics, written once more in numpy or plain Python.

Shapes: N rows, D width, C classes, E models, T tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftwork.methods.representations import projection, ridge

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Learned:
    """Training rows after a task.

    Args:
        features: [N, D] float64, of all tasks so far.
        columns: [N].
        samples: ids [N] int64.
        newest: bool [N], which rows are of the newest task.
        classes: C.
    """

    features: Array
    columns: Array
    samples: Array
    newest: Array
    classes: int

    @property
    def means(self) -> Array:
        """[C, D]."""
        every = [self.features[self.columns == c].mean(axis=0) for c in range(self.classes)]
        return np.stack(every)

    @property
    def targets(self) -> Array:
        """One-hot [N, C]."""
        return np.eye(self.classes)[self.columns]


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def simplecil(learned: Learned, rows: Array) -> Array:
    """Cosines to means."""
    return unit(rows) @ unit(learned.means).T


def slda(learned: Learned, rows: Array) -> Array:
    """Linear discriminants with the pooled covariance; that of class 0 is 0."""
    means = learned.means
    apart = learned.features - means[learned.columns]
    covariance = apart.T @ apart / len(apart)
    precision = np.linalg.inv((1 - 1e-4) * covariance + 1e-4 * np.eye(len(covariance)))
    scores = rows @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means)
    return scores - scores[:, :1]


def fecam(learned: Learned, rows: Array) -> Array:
    """Mahalanobis distances under the shrunk correlations of each class; Euclidean of one row."""
    every, found = unit(learned.features), []
    for column in range(learned.classes):
        own = every[learned.columns == column]
        apart = unit(rows) - own.mean(axis=0)
        inverse = np.eye(own.shape[1])
        if len(own) > 1 and np.ptp(own, axis=0).max() > 1e-6:
            covariance = np.cov(own.T)
            covariance += np.eye(len(covariance)) * np.diag(covariance).mean()
            deviation = np.sqrt(np.diag(covariance))
            inverse = np.linalg.inv(covariance / np.outer(deviation, deviation))
        found.append(-np.einsum("nd,de,ne->n", apart, inverse, apart))
    return np.stack(found, axis=1)


def acil(learned: Learned, rows: Array) -> Array:
    """Ridge regression of strength 0.1."""
    return rows @ _ridge(learned.features, learned.targets, 0.1)


def ranpac(learned: Learned, rows: Array, width: int = 24) -> Array:
    """The same on a random layer, with a strength chosen on held-out rows of the newest task."""
    layer = projection.gaussian(0, rows.shape[1], width).double().numpy()
    hidden, shown = np.maximum(learned.features @ layer, 0), np.maximum(rows @ layer, 0)
    held = _held(learned)[learned.newest]
    own, targets = hidden[learned.newest], learned.targets[learned.newest]
    return shown @ _ridge(hidden, learned.targets, _strength(own, targets, held))


def joint_linear(learned: Learned, rows: Array) -> Array:
    """Ridge regression whose strength is chosen on held-out rows of all tasks."""
    strength = _strength(learned.features, learned.targets, _held(learned))
    return rows @ _ridge(learned.features, learned.targets, strength)


def _held(learned: Learned) -> Array:
    return ridge.held_out(torch.from_numpy(learned.samples), 0).numpy()


def _strength(rows: Array, targets: Array, held: Array) -> float:
    """By the held-out rows of classes that others are fitted of; 1 without any."""
    fitted = {int(column) for column in targets[~held].argmax(axis=1)}
    judges = [n for n in np.flatnonzero(held) if int(targets[n].argmax()) in fitted]
    if not judges:
        return 1.0
    grid = [10.0**exponent for exponent in range(-8, 9)]
    errors = [
        np.square(rows[judges] @ _ridge(rows[~held], targets[~held], each) - targets[judges]).sum()
        for each in grid
    ]
    return grid[int(np.argmin(errors))]


def _ridge(rows: Array, targets: Array, strength: float) -> Array:
    """Weights [D, C], from the singular values."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    return right.T @ ((values / (values**2 + strength))[:, None] * (left.T @ targets))


FITTED: dict[str, Callable[[Learned, Array], Array]] = {
    "simplecil": simplecil,
    "slda": slda,
    "fecam": fecam,
    "acil": acil,
    "ranpac": ranpac,
    "joint_linear": joint_linear,
}
"""Scores [N, C] of rows [N, D] after training on others."""


# Rules of ensembles, on scores [E, N, C].


def softmax(scores: Array) -> Array:
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def _vote(scores: Array) -> Array:
    """Votes, and the mean score where there are as many."""
    models, rows, classes = scores.shape
    votes = np.zeros((rows, classes))
    for model in range(models):
        votes[np.arange(rows), scores[model].argmax(axis=1)] += 1
    order = scores.mean(axis=0).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return votes + order / classes


def _route(scores: Array) -> Array:
    """The scores of the model with the largest log of summed exponentials."""
    top = scores.max(axis=2)
    level = top + np.log(np.exp(scores - top[..., None]).sum(axis=2))
    return scores[level.argmax(axis=0), np.arange(scores.shape[1])]


RULES: dict[str, Callable[[Array], Array]] = {
    "mean_logit": lambda scores: scores.mean(axis=0),
    "mean_prob": lambda scores: softmax(scores).mean(axis=0),
    "max_logit": lambda scores: scores.max(axis=0),
    "max_prob": lambda scores: softmax(scores).max(axis=0),
    "vote": _vote,
    "energy_route": _route,
}


# Metrics, from one prediction after the other.


@dataclass(frozen=True)
class Prediction:
    """A row of a table of predictions."""

    trained: int
    task: int
    label: int
    predicted: int


def percent(rows: Sequence[Prediction]) -> float:
    """Share of right answers, in percent."""
    return 100 * sum(row.label == row.predicted for row in rows) / len(rows)


def matrix(rows: Sequence[Prediction], tasks: int) -> list[list[float]]:
    """Accuracy on each task after each task."""
    return [
        [percent([r for r in rows if (r.trained, r.task) == (i, j)]) for j in range(i + 1)]
        for i in range(tasks)
    ]


def classes_after(rows: Sequence[Prediction], task: int, classes: int) -> list[float | None]:
    """Accuracy of each class after a task; None for one that is not tested."""
    found: list[float | None] = []
    for label in range(classes):
        own = [r for r in rows if (r.trained, r.label) == (task, label)]
        found.append(percent(own) if own else None)
    return found
