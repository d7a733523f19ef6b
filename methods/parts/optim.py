"""Optimisers and learning-rate schedules by name.

A schedule is a pure function of the epoch, so that a resumed task needs no scheduler state.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

OptimizerName = Literal["sgd", "adam", "adamw", "amsgrad"]
ScheduleName = Literal["constant", "cosine", "half_cosine"]

Groups = list[dict[str, Any]]


def optimizer(
    name: OptimizerName, lr: float, weight_decay: float = 0.0
) -> Callable[[Groups], torch.optim.Optimizer]:
    """Makes an optimiser from parameter groups; a group's own `lr` and `weight_decay` win.

    Args:
        name: `sgd` has momentum 0.9; `adam` and `adamw` betas (0.9, 0.999); `amsgrad` is DAP's
            Adam with amsgrad and betas (0.9, 0.9).
    """

    def make(groups: Groups) -> torch.optim.Optimizer:
        if name == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
        if name == "adamw":
            return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        betas = (0.9, 0.9) if name == "amsgrad" else (0.9, 0.999)
        return torch.optim.Adam(
            groups, lr=lr, betas=betas, amsgrad=name == "amsgrad", weight_decay=weight_decay
        )

    return make


def schedule(name: ScheduleName) -> Callable[[int, int], float]:
    """(epoch, epochs) -> factor on the learning rate.

    `cosine` is torch's CosineAnnealingLR to 0 over the epochs, stepped once per epoch;
    `half_cosine` is CODA-Prompt's, from 1 to cos(99 pi / 200) = 0.0157 in the last epoch.
    """
    return {"constant": _constant, "cosine": _cosine, "half_cosine": _half_cosine}[name]


def milestone(at: int, gamma: float = 0.1) -> Callable[[int, int], float]:
    """The learning rate times `gamma` from epoch `at` on."""
    return lambda epoch, epochs: gamma if epoch >= at else 1.0


def warmup_cosine(warmup: int) -> Callable[[int, int], float]:
    """(step, steps) -> factor: rises over `warmup` steps to 1, then falls as a cosine to 0."""

    def factor(step: int, steps: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return factor


def _constant(epoch: int, epochs: int) -> float:
    return 1.0


def _cosine(epoch: int, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def _half_cosine(epoch: int, epochs: int) -> float:
    # The reference divides by zero for a single epoch.
    return math.cos(99 * math.pi * epoch / (200 * (epochs - 1))) if epochs > 1 else 1.0
