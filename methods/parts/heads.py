"""Classifiers and losses that trained methods share.

Shapes: B batch, D width, C classes seen.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.collectives import all_sum

EPS = 1e-12


class CosineHead(nn.Module):
    """Scaled cosine similarity to one weight per class (LAMDA-style first sessions).

    Args:
        width: D.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(classes, width).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C] float32 of features [B, D]."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * cosine(features.float(), self.weight)


def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Scores [B, C] of features [B, D], in the weights' float32 also under autocast.

    In bfloat16 the scores of two classes are often equal, and a tie goes to the class that came
    first.

    Args:
        features: [B, D], of any floating-point dtype.
        weight: [C, D].
        bias: [C], or None.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.to(weight.dtype), weight, bias)


class LinearHead(nn.Linear):
    """A linear classifier that scores in float32, also under autocast; see `linear_scores`."""

    def forward(self, input: Tensor) -> Tensor:
        """Scores [B, C] of features [B, D]."""
        return linear_scores(input, self.weight, self.bias)


def linear_head(width: int, classes: int, std: float = 0.02) -> LinearHead:
    """A linear classifier: weights truncated normal, bias 0."""
    head = LinearHead(width, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head


class OtherRows:
    """Rows of a head that belong to classes without images in a task, and must stay as they are.

    The loss over the current columns gives them no gradient, but weight decay would shrink them.

    Args:
        head: with rows for all classes seen, before the first step of the task.
        task: the task.
    """

    def __init__(self, head: nn.Linear, task: Task) -> None:
        self._rows = sorted(set(range(task.seen)) - set(task.current))
        self._kept = [(p, p.detach()[self._rows].clone()) for p in head.parameters()]

    @torch.no_grad()
    def put_back(self) -> None:
        """After every step of the optimiser."""
        for parameter, kept in self._kept:
            parameter[self._rows] = kept


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities [A, B] of rows [A, D] and [B, D]."""
    return F.normalize(a, dim=-1, eps=EPS) @ F.normalize(b, dim=-1, eps=EPS).T


def current_cross_entropy(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Cross-entropy over the columns of the current task alone, in float32.

    Equal to setting all other logits to minus infinity: their rows get no gradient at all.

    Args:
        logits: [B, C].
        targets: columns [B], all in `task.current`.
    """
    columns = torch.tensor(task.current, device=logits.device)
    place = torch.full((logits.shape[1],), -1, device=logits.device, dtype=torch.int64)
    place[columns] = torch.arange(len(columns), device=logits.device)
    return cross_entropy(logits.float()[:, columns], place[targets], task)


def cross_entropy(
    logits: Tensor, targets: Tensor, task: Task, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy over all columns, or over those of the batch where the task says so.

    The latter is MISA's logit mask (Kang et al., CVPR 2025): in an online stream a class that is
    absent from the batch is not pushed down by it. The batch is that of all workers together.

    Args:
        logits: [B, C].
        targets: columns [B].
        label_smoothing: as of `torch.nn.functional.cross_entropy`.
    """
    if task.mask == "batch":
        counts = torch.bincount(targets, minlength=logits.shape[1])
        columns = all_sum(counts).nonzero()[:, 0]
        logits, targets = logits[:, columns], torch.searchsorted(columns, targets)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
