"""Test batches of a method by which an image's prediction depends on its neighbours; no torch.

Methods decide by each image alone. One that offers to decide by the batch, as the code does that
its published numbers come from, says so by a function of its own, `neighbours(self) -> Neighbours |
None`: predictions then follow from these batches and not from how many images are forwarded at
once, it stands on the card that they see the batch, and no model is served.
"""

from dataclasses import dataclass
from typing import Literal

Walk = Literal["tasks", "stream"]
"""The batches of every task on their own, images in the data set's order; or one walk over all
tasks, class by class as they were learned, whose batches may hold images of two tasks."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Test images that are scored together.

    Args:
        size: images of a batch; the last one of a walk may be smaller.
        walk: how the images are cut into batches.
    """

    size: int
    walk: Walk = "tasks"


def neighbours(method: object) -> Neighbours | None:
    """Batches that a method's predictions depend on; None where every image is decided alone."""
    own = getattr(method, "neighbours", None)
    return None if own is None else own()
