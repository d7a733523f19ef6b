"""Ensembles of scores: rules that combine what several models predict for an image.

Each row is decided on its own. A class that a model cannot give has the score minus infinity in
its logits and 0 among its probabilities, and is averaged over the models that can give it. A row in
which any model has NaN or infinity is NaN: without that model it would be another ensemble.

Shapes: E models, N rows, K classes of all models together, K_e those of one model.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["none", "standardise", "l2"]
NEVER = float("-inf")


def align(scores: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Scores side by side, a column per class.

    Args:
        scores: [N, K_e] of each model.
        classes: id of each column of each model.

    Returns:
        Scores [E, N, K] float64, minus infinity where a model has no such class, and the ids of
        the columns, ascending.

    Raises:
        ValueError: models with another number of rows, or columns that do not match.
    """
    if len({len(part) for part in scores}) != 1:
        raise ValueError(f"models differ in rows: {[len(part) for part in scores]}")
    known = sorted({label for part in classes for label in part})
    place = {label: column for column, label in enumerate(known)}
    stack = torch.full((len(scores), len(scores[0]), len(known)), NEVER, dtype=torch.float64)
    for part, ids, target in zip(scores, classes, stack, strict=True):
        if part.shape[1] != len(ids) or len(set(ids)) != len(ids):
            raise ValueError(f"{part.shape[1]} columns for classes {list(ids)}")
        target[:, [place[label] for label in ids]] = part.double()
    return stack, known


def scaled(stack: Tensor, scale: Scale, temperature: float = 1.0) -> Tensor:
    """Scores [E, N, K] on a common scale, each row of each model by itself.

    Args:
        scale: "standardise" to mean 0 and standard deviation 1 over the model's classes, "l2" to
            norm 1.
        temperature: divides the scores afterwards.
    """
    able = stack != NEVER
    count = able.sum(dim=2, keepdim=True)
    filled = stack.masked_fill(~able, 0.0)
    if scale == "standardise":
        filled = filled - filled.sum(dim=2, keepdim=True) / count
        filled = filled.masked_fill(~able, 0.0)
        spread = (filled.square().sum(dim=2, keepdim=True) / count).sqrt()
        filled = filled / spread.masked_fill(spread == 0, 1.0)
    elif scale == "l2":
        norm = filled.norm(dim=2, keepdim=True)
        filled = filled / norm.masked_fill(norm == 0, 1.0)
    return (filled / temperature).masked_fill(~able, NEVER)


def wrong(stack: Tensor) -> Tensor:
    """Rows [E, N] in which a model's scores [E, N, K] are of no use.

    They hold NaN or infinity, or minus infinity for every class.
    """
    able = stack != NEVER
    return (able & ~stack.isfinite()).any(dim=2) | ~able.any(dim=2)


def mean_logit(stack: Tensor) -> Tensor:
    """Means [N, K] of logits [E, N, K]; up to normalisation the geometric mean of probabilities."""
    return _checked(_mean(stack, stack != NEVER), stack)


def mean_prob(stack: Tensor) -> Tensor:
    """Means [N, K] of the models' probabilities, each over all of its classes."""
    return _checked(_mean(stack.softmax(dim=2), stack != NEVER), stack)


def max_logit(stack: Tensor) -> Tensor:
    """Largest logits [N, K] over the models."""
    return _checked(stack.amax(dim=0), stack)


def max_prob(stack: Tensor) -> Tensor:
    """Largest probabilities [N, K] over the models."""
    return _checked(_never_where_none(stack.softmax(dim=2).amax(dim=0), stack), stack)


def vote(stack: Tensor) -> Tensor:
    """Votes [N, K] of the models' favourites, plus less than one by the rank of the mean score."""
    votes = torch.nn.functional.one_hot(stack.argmax(dim=2), stack.shape[2]).sum(dim=0)
    rank = mean_logit(stack).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return _checked(_never_where_none(votes + rank / stack.shape[2], stack), stack)


def energy_route(stack: Tensor, temperature: float = 1.0, by_size: bool = False) -> Tensor:
    """Logits [N, K], each row those of the model with the largest T * logsumexp(z / T).

    Args:
        temperature: T; near 0 the largest logit decides.
        by_size: subtract T * log K_e, so that more classes are no advantage.
    """
    energy = temperature * (stack / temperature).logsumexp(dim=2)
    if by_size:
        energy = energy - temperature * (stack != NEVER).sum(dim=2).log()
    chosen = energy.argmax(dim=0)
    return _checked(stack[chosen, torch.arange(stack.shape[1])], stack)


def _mean(values: Tensor, able: Tensor) -> Tensor:
    total = values.masked_fill(~able, 0.0).sum(dim=0)
    count = able.sum(dim=0)
    return (total / count.clamp(min=1)).masked_fill(count == 0, NEVER)


def _never_where_none(values: Tensor, stack: Tensor) -> Tensor:
    return values.masked_fill((stack == NEVER).all(dim=0), NEVER)


def _checked(values: Tensor, stack: Tensor) -> Tensor:
    """The scores [N, K], NaN in rows that any model left without a result."""
    return values.masked_fill(wrong(stack).any(dim=0)[:, None], torch.nan)
