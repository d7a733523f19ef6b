"""K-means, with draws from torch's global generator.

Shapes: N rows, D width, K centres.
"""

import torch
from torch import Tensor


@torch.no_grad()
def k_means(rows: Tensor, count: int, restarts: int = 10, iterations: int = 300) -> Tensor:
    """Centres [K, D] float32 of the best of several runs of Lloyd's algorithm from k-means++.

    The result is a function of the rows and the state of the generator. Fewer different rows than
    centres leave some centres equal.

    Args:
        rows: [N, D], at least one.
        count: K.
        restarts: runs; the one with the smallest sum of squared distances wins.
        iterations: most steps of a run.
    """
    data = rows.detach().double().cpu()
    best, smallest = data[:0], float("inf")
    for _ in range(restarts):
        centres = _spread(data, count)
        nearest = torch.empty(0, dtype=torch.int64)
        for _ in range(iterations):
            before, nearest = nearest, _squares(data, centres).argmin(dim=1)
            if torch.equal(before, nearest):
                break
            sums = torch.zeros_like(centres).index_add_(0, nearest, data)
            sizes = torch.bincount(nearest, minlength=count)[:, None]
            # A centre that lost all its rows stays where it was.
            centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        cost = float(_squares(data, centres).amin(dim=1).sum())
        if cost < smallest:
            best, smallest = centres, cost
    return best.to(rows.device, torch.float32)


def _spread(data: Tensor, count: int) -> Tensor:
    """k-means++: rows drawn with a chance that grows with the square of their distance."""
    chosen = [int(torch.randint(len(data), ()))]
    for _ in range(count - 1):
        squares = _squares(data, data[chosen]).amin(dim=1)
        weights = squares if bool(squares.sum() > 0) else torch.ones_like(squares)
        # Not multinomial, which takes 2 ** 24 rows at most.
        ends = weights.cumsum(0)
        draw = torch.rand((), dtype=torch.float64) * ends[-1]
        chosen.append(min(int(torch.searchsorted(ends, draw, right=True)), len(data) - 1))
    return data[chosen]


def _squares(data: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [N, K]; never below 0, and exactly 0 between equal rows."""
    return torch.stack([(data - centre).square().sum(dim=1) for centre in centres], dim=1)
