"""Surroundings of the training of a task: settings, snapshots, the log, the workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from graftwork.methods.contracts.card import State


class Images(Protocol):
    """The training images of a task."""

    targets: Tensor
    """Columns [N] int64."""
    exemplars: Tensor
    """Bool [N], which images are of earlier tasks."""
    query: Tensor | None
    """Features [N, D] of the untouched backbone on the images as they are, where known."""

    def batch(self, rows: Sequence[int], epoch: int, augmentation: str) -> Tensor:
        """Pixels [B, 3, h, w] of some rows; called from several threads."""
        ...

    def normalise(self, pixels: Tensor) -> Tensor:
        """The network's input of pixels, on their device."""
        ...

    def name(self, row: int, /) -> str:
        """Name that people have for an image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the training of a task.

    Args:
        seed: of the run.
        device: "cpu", "cuda".
        precision: "fp32", or "bf16" by autocast.
        compile: compile the network.
        decoders: threads that prepare images ahead of the network, two batches each.
        every: seconds between two snapshots; 0 after every step, infinite for none.
    """

    seed: int
    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    decoders: int = 1
    every: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A task in the middle of its training.

    Args:
        epoch: in which the next step is.
        step: the next step within the epoch.
        tensors: the learner's and, below `optimizer/`, the optimiser's.
        log: `Log.epochs` so far.
        sums: sums of the losses of the epoch so far.
        counts: `Log.steps` and `Log.images_forwarded` so far.
    """

    epoch: int
    step: int
    tensors: State
    log: list[dict[str, float]]
    sums: dict[str, float]
    counts: list[int]


@dataclass(kw_only=True)
class Log:
    """Log of what happened during a task.

    Args:
        epochs: mean of every loss term per epoch.
        steps: steps of the optimiser.
        images_forwarded: images that went through the network, of all workers; a query that is
            computed counts as one more.
        trainable: parameters that were trained.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    images_forwarded: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class World:
    """The workers of a group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """Of torch.distributed if it is initialised, otherwise this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()
