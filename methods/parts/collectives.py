"""Sums over all workers of a group, with their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(counts: Tensor) -> Tensor:
    """The sum over all workers, so that a decision by the batch is one of the whole batch."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return counts


class _Sum(torch.autograd.Function):
    """The sum over all workers; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return all_sum(own.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_sum(gradients[0].clone())


def batch_sum(own: Tensor) -> Tensor:
    """As `all_sum`, for sums that gradients go through; `own` stays as it is."""
    return _Sum.apply(own)  # type: ignore[return-value]


def batch_rows(own: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the whole batch [A, D], and where this worker's rows [B, D] stand among them.

    Gradients reach the other workers' rows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return own, torch.arange(len(own), device=own.device)
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=own.device)
    counts[dist.get_rank()] = len(own)
    start = int(all_sum(counts)[: dist.get_rank()].sum())
    place = torch.arange(start, start + len(own), device=own.device)
    return batch_sum(own.new_zeros(int(counts.sum()), own.shape[1]).index_add(0, place, own)), place
