"""Linear classifiers of tasks that know nothing of each other, side by side.

Shapes: B batch, D width, S tasks so far, C classes seen, R rows of all classifiers, N rows of one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts.trained import Task

NONE = float("-inf")
"""Score of a class under a task that did not have it."""


class StageHeads(nn.Module):
    """The classifiers of all tasks so far, one below the other; nothing of them is trained.

    Where tasks bring new classes a class has one row, R = C. Where classes recur every task has a
    row for each of them, R = S * C.

    Args:
        width: D.
        task: the newest one.

    Raises:
        ValueError: the task has new classes and old ones.
    """

    weight: Tensor
    """[R, D]."""
    bias: Tensor
    """[R]."""
    stage: Tensor
    """Task of a row [R] int64, -1 for a class that its task did not have."""

    def __init__(self, width: int, task: Task) -> None:
        super().__init__()
        first = task.before if task.before < task.seen else 0
        if min(task.current) < first:
            raise ValueError(
                f"classes: a task must have new classes only or the same as those before, got "
                f"columns {list(task.current)} after {task.before}"
            )
        rows = task.seen if first or not task.index else (task.index + 1) * task.seen
        self._task, self._own = task, rows - (task.seen - first)
        self._first = first
        self.register_buffer("weight", torch.zeros(rows, width))
        self.register_buffer("bias", torch.zeros(rows))
        self.register_buffer("stage", torch.full((rows,), -1))

    def take(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the newest task's classifier.

        Args:
            weight: [N, D], in the order of the task's `current`.
            bias: [N].
        """
        rows = [self._own + column - self._first for column in self._task.current]
        self.weight[rows] = weight.to(self.weight)
        self.bias[rows] = bias.to(self.bias)
        self.stage[rows] = self._task.index

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Scores [B, S, C] in float32, `NONE` where a task did not have a class.

        Args:
            features: of each task [B, D], the same for all or not.
        """
        seen = self._task.seen
        scores = features[0].new_full(
            (len(features[0]), len(features), seen), NONE, dtype=torch.float32
        )
        # Temperatures divide logits by a thousandth, which leaves nothing of a bfloat16.
        with torch.autocast(scores.device.type, enabled=False):
            for number, feature in enumerate(features):
                rows = (self.stage == number).nonzero().flatten()
                own = F.linear(feature.float(), self.weight[rows], self.bias[rows])
                scores[:, number, rows % seen] = own
        return scores
