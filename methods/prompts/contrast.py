"""A loss that keeps features apart from each other and from means that are remembered.

Shapes: B batch, P means, N rows, D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.parts.collectives import all_sum


def contrast(means: Tensor, features: Tensor, temperature: float) -> Tensor:
    """Mean over means and features of all workers of `apart`, with the gradient of the batch.

    Args:
        means: [P, D], the same on all workers.
        features: [B, D] of this worker, float32.
        temperature: that similarities are divided by.
    """
    # Differs from thu-ml/HiDe-Prompt, where every worker compares its own images alone: the result
    # would depend on the number of workers. Gradients are averaged with the workers' shares of the
    # rows, but this term is one of all rows, of which a worker has the gradient with respect to its
    # own features: hence the factor.
    others = of_other_workers(features)
    value = apart(torch.cat([means, features, others]), temperature)
    whole = (len(features) + len(others)) / len(features)
    return value.detach() + whole * (value - value.detach())


def apart(rows: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the inner products of rows [N, D] in which each row shall find itself."""
    with torch.autocast(rows.device.type, enabled=False):
        products = rows @ rows.T / temperature
        return F.cross_entropy(products, torch.arange(len(rows), device=rows.device))


def of_other_workers(rows: Tensor) -> Tensor:
    """The rows [N, D] of all other workers, without gradients; their numbers N may differ.

    A step of fewer rows than workers repeats a row, which is then compared with itself.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows[:0].detach()
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    numbers = all_sum(counts).tolist()
    every = rows.new_zeros(size, max(numbers), rows.shape[1])
    every[rank, : len(rows)] = rows.detach()
    every = all_sum(every)
    return torch.cat([every[r, : n if r != rank else 0] for r, n in enumerate(numbers)])
