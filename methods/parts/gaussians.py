"""Classes as Gaussians in feature space: measured, pooled, factored, sampled.

Shapes: N rows, C classes, D width, S samples per class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

JITTER = 1e-4
"""Added to every covariance's diagonal: classes have fewer images than the features dimensions."""


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """Mean and covariance of some classes.

    Args:
        count: rows they were measured on [C] int64; 0 for a class that was not measured.
        mean: [C, D].
        covariance: [C, D, D], divided by the count less one, without jitter.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor


def measure(features: Tensor, targets: Tensor, classes: int) -> Gaussians:
    """The Gaussians of columns 0 .. C-1, computed in float64 and given in float32.

    A class with a single row gets the pooled covariance of the others of these rows, where the
    authors' code of SLCA has NaN; zeros if none of them has several rows, which leaves the jitter.
    A class without rows gets zeros.

    Args:
        features: [N, D].
        targets: columns [N] int64.
        classes: C.
    """
    width = features.shape[1]
    count = torch.bincount(targets, minlength=classes)
    mean = features.new_zeros(classes, width, dtype=torch.float32)
    covariance = features.new_zeros(classes, width, width, dtype=torch.float32)
    pooled = features.new_zeros(width, width, dtype=torch.float64)
    for column in count.nonzero().flatten().tolist():
        rows = features[targets == column].double()
        centre = rows.mean(dim=0)
        scatter = (rows - centre).T @ (rows - centre)
        mean[column] = centre.float()
        if len(rows) > 1:
            covariance[column] = (scatter / (len(rows) - 1)).float()
            pooled += scatter
    freedom = int((count - 1).clamp(min=0).sum())
    if freedom:
        covariance[count == 1] = (pooled / freedom).float()
    return Gaussians(count=count, mean=mean, covariance=covariance)


def pool(a: Gaussians, b: Gaussians) -> Gaussians:
    """The Gaussians of both sets of rows, exactly; classes that only one has are its own.

    A covariance that a single row was lent counts for nothing.
    """
    count = a.count + b.count
    mean, covariance = a.mean.clone(), a.covariance.clone()
    for column in b.count.nonzero().flatten().tolist():
        n, m = int(a.count[column]), int(b.count[column])
        if n == 0:
            mean[column], covariance[column] = b.mean[column], b.covariance[column]
            continue
        between = (b.mean[column] - a.mean[column]).double()
        scatter = (
            (n - 1) * a.covariance[column].double()
            + (m - 1) * b.covariance[column].double()
            + n * m / (n + m) * torch.outer(between, between)
        )
        mean[column] = (a.mean[column].double() + m / (n + m) * between).float()
        covariance[column] = (scatter / (n + m - 1)).float()
    return Gaussians(count=count, mean=mean, covariance=covariance)


def factor(covariance: Tensor, jitter: float = JITTER) -> Tensor:
    """Lower Cholesky factors [C, D, D] float32 of covariances with jitter, computed in float64.

    Raises:
        ValueError: a covariance is not positive even with a hundred times the jitter.
    """
    # One class at a time: all of them in float64 are twice the memory of what is stored.
    return torch.stack([_factor(one.double(), jitter).float() for one in covariance])


def sample(mean: Tensor, factors: Tensor, number: int) -> Tensor:
    """Draws [C, S, D] from torch's global generator."""
    noise = torch.randn(len(mean), number, mean.shape[1], dtype=mean.dtype, device=mean.device)
    return torch.baddbmm(mean[:, None], noise, factors.mT)


def _factor(covariance: Tensor, jitter: float) -> Tensor:
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for raised in (jitter, 10 * jitter, 100 * jitter):
        lower, failed = torch.linalg.cholesky_ex(covariance + raised * eye)
        if not failed:
            return lower
    raise ValueError(
        f"a class's covariance is not positive with {100 * jitter:g} on its diagonal; "
        f"its mean diagonal is {float(covariance.diagonal().mean()):g}"
    )
