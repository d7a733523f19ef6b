"""Records of classes whose images are gone: components in feature space, to be sampled.

Shapes: E entries (a class of a task), K components of an entry, D width, N rows, M components in
use, S rows of a batch.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.parts import gaussians, optim
from graftwork.methods.parts.clusters import k_means

Statistics = Literal["centroids", "covariance"]
"""K-means centroids with a variance for each dimension, or a mean with a full covariance."""


class Mixtures(nn.Module):
    """Components of entries; those of the newest entries are zero until they are measured.

    Args:
        entries: E.
        width: D.
        kind: what a component is.
        centroids: K; an entry has a single component with a covariance.
    """

    # Clusters come in the order in which they were found.
    counting_buffers = ("mean", "spread")
    count: Tensor
    """Rows of each component [E, K] int64; 0 for one that is not there."""
    mean: Tensor
    """[E, K, D]."""
    spread: Tensor
    """Variances [E, K, D], or covariances [E, 1, D, D]."""

    def __init__(self, entries: int, width: int, kind: Statistics, centroids: int) -> None:
        super().__init__()
        self._kind = kind
        number = centroids if kind == "centroids" else 1
        spread = (width,) if kind == "centroids" else (width, width)
        self.register_buffer("count", torch.zeros(entries, number, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(entries, number, width))
        self.register_buffer("spread", torch.zeros(entries, number, *spread))

    @torch.no_grad()
    def measure(self, features: Tensor, places: Tensor, number: int) -> None:
        """Measures the newest entries, each on at least one row.

        Args:
            features: [N, D], on the CPU.
            places: which of the newest entries a row is of [N] int64, from 0.
            number: how many entries that are.
        """
        first = len(self.count) - number
        if self._kind == "covariance":
            found = gaussians.measure(features, places, number)
            self.count[first:, 0] = found.count.to(self.count.device)
            self.mean[first:, 0] = found.mean.to(self.mean.device)
            self.spread[first:, 0] = found.covariance.to(self.spread.device)
            return
        for place in range(number):
            rows = features[places == place].double()
            centres = k_means(rows, self.count.shape[1]).double()
            nearest = (rows[:, None] - centres).square().sum(dim=2).argmin(dim=1)
            for component in nearest.unique().tolist():
                own = rows[nearest == component]
                self.count[first + place, component] = len(own)
                self.mean[first + place, component] = own.mean(dim=0).float()
                self.spread[first + place, component] = own.var(dim=0, correction=0).float()

    def means(self) -> Tensor:
        """Of all components that were measured [P, D]."""
        return self.mean[self.count > 0]

    def used(self) -> Tensor:
        """Mask [E, K] of the components to sample: those of several rows, or all if none has."""
        several = self.count > 1
        return several | ((self.count > 0) & ~several.any(dim=1, keepdim=True))

    def factors(self) -> Tensor:
        """Factors of the noise: deviations [M, D], or Cholesky factors [M, D, D]."""
        spread = self.spread[self.used()]
        if self._kind == "centroids":
            return (spread + gaussians.JITTER).sqrt()
        return gaussians.factor(spread)

    def samples(self, factors: Tensor, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Some of M * S samples, equally many of each component, in random order.

        Args:
            factors: `factors()`.
            size: S.
            steps: batches; fewer if there are not as many samples.

        Yields:
            Rows [S, D] and their entries [S].
        """
        entry, component = self.used().nonzero(as_tuple=True)
        mean = self.mean[entry, component]
        order = torch.randperm(len(mean) * size, device=mean.device)[: steps * size]
        drawn = None
        if factors.ndim == 3:
            drawn = gaussians.sample(mean, factors, size).flatten(0, 1)
        for part in order.split(size):
            of = part // size
            if drawn is not None:
                yield drawn[part], entry[of]
            else:
                # Not all at once: components of many classes are far more than what is used.
                yield mean[of] + factors[of] * torch.randn_like(mean[of]), entry[of]


@torch.enable_grad()
def align(
    mixtures: Mixtures,
    labels: Tensor,
    scores: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    *,
    lr: float,
    epochs: int,
    size: int,
    steps: int,
) -> None:
    """Trains a classifier on samples, by SGD with momentum and a cosine schedule.

    Args:
        mixtures: what is sampled.
        labels: columns [E] of the entries.
        scores: from rows [S, D] to logits [S, C].
        parameters: of `scores`.
        lr: learning rate at the start.
        epochs: passes, each on new samples.
        size: S.
        steps: batches of a pass.
    """
    optimizer = optim.optimizer("sgd", lr)([{"params": parameters}])
    schedule, factors = optim.schedule("cosine"), mixtures.factors()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * schedule(epoch, epochs)
        for rows, entries in mixtures.samples(factors, size, steps):
            loss = F.cross_entropy(scores(rows), labels[entries])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
