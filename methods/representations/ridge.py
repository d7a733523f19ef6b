"""Ridge regression to one-hot targets, all in float64, and the choice of its strength.

N rows, M width of the rows, C columns (classes).
The Gram form knows the rows H by their sums `gram` = H^T H and `cross` = H^T Y, the dual form by
the rows themselves; both give the same weights. Never an inverse, never float32: with fewer rows
than width the Gram matrix is singular, and small strengths then lose every digit of float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

GRID = [10.0**exponent for exponent in range(-8, 9)]
"""Strengths that are tried: 1e-8 .. 1e8."""

TILE = 512
"""Columns of a tile of a Gram matrix."""

HELD_OUT = 0.2
"""Share of the rows that choose the strength."""


def targets(labels: Tensor, classes: Tensor) -> Tensor:
    """One-hot targets [N, C] float64; rows of other classes are zero."""
    return (labels[:, None] == classes).double()


def cross(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """H^T Y [M, K] for one-hot Y, as class sums of the rows [N, M]."""
    sums = rows.new_zeros(num_classes, rows.shape[1])
    return sums.index_add_(0, labels, rows).T.contiguous()


def gram(rows: Tensor) -> Tensor:
    """H^T H [M, M] of rows [N, M], exactly symmetric."""
    width = rows.shape[1]
    if width <= 2 * TILE:
        product = rows.T @ rows
        return product.tril() + product.tril(-1).T
    product = rows.new_empty(width, width)
    for start in range(0, width, TILE):
        # Only tiles on and below the diagonal: little more than half of the work.
        tiles = rows[:, start:].T @ rows[:, start : start + TILE]
        tiles[:TILE] = (tiles[:TILE] + tiles[:TILE].T) / 2
        product[start:, start : start + TILE] = tiles
        product[start : start + TILE, start:] = tiles.T
    return product


def solve(gram: Tensor, right: Tensor, strength: float) -> tuple[Tensor, float]:
    """(gram + strength I)^-1 right by Cholesky, and the strength that was used.

    Args:
        gram: [M, M] symmetric, positive semidefinite up to rounding.
        right: [M, C].
        strength: raised to 1e-14 of the trace and then tenfold until the factorisation succeeds.

    Raises:
        ValueError: the matrix is not finite.
    """
    # A Cholesky factorisation reads one triangle: there is nothing to symmetrise.
    shifted = gram.clone()
    diagonal, used = shifted.diagonal(), strength
    base = diagonal.clone()
    while math.isfinite(used):
        diagonal.copy_(base + used)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not info:
            return torch.cholesky_solve(right, factor), used
        floor = 1e-14 * base.sum().item()
        # Zero rows with strength 0 have no trace either.
        used = floor if used < floor else max(10 * used, torch.finfo(torch.float64).tiny)
    raise ValueError("features: must be finite, got NaN or infinity")


def solve_rows(rows: Tensor, right: Tensor, strength: float) -> tuple[Tensor, float]:
    """Weights [M, C] from rows [N, M] and targets [N, C], through the smaller of N x N and M x M.

    Returns:
        The weights, and the strength that was used.
    """
    if len(rows) < rows.shape[1]:
        dual, used = solve(gram(rows.T), right, strength)
        return rows.T @ dual, used
    return solve(gram(rows), rows.T @ right, strength)


def squared_error(weights: Tensor, gram: Tensor, cross: Tensor, energy: float) -> float:
    """Sum of squared residuals of rows that are known by their sums alone.

    Args:
        weights: [M, C].
        gram: [M, M] of these rows.
        cross: [M, C] of these rows.
        energy: sum of their squared targets: the number of rows if every row has its column.
    """
    quadratic = (weights * (gram @ weights)).sum()
    return (quadratic - 2 * (weights * cross).sum()).item() + energy


def choose(
    gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor, energy: float
) -> float:
    """The strength of `GRID` with the smallest squared error on held-out rows, from sums.

    Args:
        gram: [M, M] of the rows to fit.
        cross: [M, C] of the rows to fit.
        held_gram: [M, M] of the held-out rows.
        held_cross: [M, C] of the held-out rows.
        energy: sum of the squared targets of the held-out rows.
    """
    return _smallest(
        lambda strength: squared_error(
            solve(gram, cross, strength)[0], held_gram, held_cross, energy
        )
    )


def choose_rows(rows: Tensor, right: Tensor, held: Tensor, held_right: Tensor) -> float:
    """The same from rows: [N, M] and targets [N, C] to fit, `held` [V, M] and [V, C] held out."""
    if len(rows) < rows.shape[1]:
        left, inner, target = held @ rows.T, gram(rows.T), right
    else:
        left, inner, target = held, gram(rows), rows.T @ right
    return _smallest(
        lambda strength: (
            (left @ solve(inner, target, strength)[0] - held_right).square().sum().item()
        )
    )


def held_out(samples: Tensor, seed: int) -> Tensor:
    """Mask [N] of the rows that choose the strength: about `HELD_OUT` of them.

    A function of each sample's id and the seed alone, so that any split of the rows agrees.
    """
    mixed = _mix(_mix(samples ^ _signed(seed * 0x9E3779B97F4A7C15)))
    return _shift(mixed, 11) < int(HELD_OUT * 2**53)


def judges(held: Tensor, targets: Tensor) -> Tensor:
    """Mask [N] of the held-out rows whose class has other rows, which are fitted.

    An image of a class that is in no fit would choose the largest strength: the nearer all outputs
    are to 0, the smaller is its error.

    Args:
        held: mask [N] of all held-out rows.
        targets: one-hot [N, C].
    """
    return held & (targets @ (targets[~held].sum(dim=0) > 0).to(targets)).bool()


def _smallest(error: Callable[[float], float]) -> float:
    errors = [error(strength) for strength in GRID]
    return GRID[errors.index(min(errors))]


def _mix(numbers: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap around."""
    numbers = numbers + _signed(0x9E3779B97F4A7C15)
    numbers = (numbers ^ _shift(numbers, 30)) * _signed(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ _shift(numbers, 27)) * _signed(0x94D049BB133111EB)
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
