"""Selection of the entries of a pool for an image, by the cosine of its query to their keys.

Shapes: B batch, D width, M pool size, N entries chosen.
"""

from typing import Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.parts.collectives import all_sum
from graftwork.methods.parts.heads import cosine

Vote = Literal["instance", "batch_vote"]
"""By each image on its own, or by a vote of the batch. A vote of test images that were sorted by
task tells their task: it is there to reproduce published numbers."""

Selection = Literal["instance", "batch_vote", "batch_vote_pilot"]
"""As `Vote`; the batches of LAMDA-PILOT are one walk over all tasks, class by class, so that some
hold images of two tasks and vote some of them into the wrong one."""


def voters(by: Selection, size: int) -> Neighbours | None:
    """Test batches of so many images that vote; None where every image is on its own."""
    if by == "instance":
        return None
    return Neighbours(size=size, walk="stream" if by == "batch_vote_pilot" else "tasks")


def similarity(query: Tensor, key: Tensor) -> Tensor:
    """Cosines [B, M] of queries [B, D] to keys [M, D], in float32 also under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return cosine(query.float(), key.float())


def nearest(scores: Tensor, count: int) -> Tensor:
    """Per row the `count` largest of scores [B, M]: ids [B, N]; equal ones by the lowest id."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def histogram(chosen: Tensor, size: int) -> Tensor:
    """Counts [M] int64 of each of `size` entries in ids [B, N], over all workers."""
    # Not bincount, which has no deterministic kernel on CUDA.
    entries = torch.arange(size, device=chosen.device)
    return all_sum((chosen.flatten()[:, None] == entries).sum(dim=0))


def vote(chosen: Tensor, size: int) -> Tensor:
    """The ids that stand most often in ids [B, N] of all workers: [1, N]; ties by the lowest id."""
    return nearest(histogram(chosen, size)[None], chosen.shape[1])


def select(scores: Tensor, count: int, by: Selection) -> Tensor:
    """Ids [B, N] by scores [B, M] for each image, or [1, N] for all of them by a vote."""
    chosen = nearest(scores, count)
    return chosen if by == "instance" else vote(chosen, scores.shape[1])
