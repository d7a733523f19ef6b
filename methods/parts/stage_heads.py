"""Linear classifiers of tasks that know nothing of each other, side by side.

Shapes: B batch, D width, S tasks so far, C classes seen, R rows of all classifiers, N rows of one.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.entries import earlier, usual

NONE = float("-inf")
"""Score of a class under a task that did not have it."""


class StageHeads(nn.Module):
    """The classifiers of all tasks so far, one below the other; nothing of them is trained.

    Every task has a row for each of its classes: R = C where none recurs, R = S * C where all do.

    Args:
        width: D.
        task: the newest one.
    """

    learned_buffers = ("weight", "bias")
    weight: Tensor
    """[R, D]."""
    bias: Tensor
    """[R]."""
    stage: Tensor
    """Task of a row [R] int64, -1 for a row of none."""
    column: Tensor
    """Column of a row's class [R] int64."""

    def __init__(self, width: int, task: Task) -> None:
        super().__init__()
        self._width, self._task = width, task
        self._hold(usual(task))

    def _hold(self, before: int) -> None:
        """Makes place for the rows of earlier tasks and this one's."""
        self._before, rows = before, before + len(self._task.current)
        self.register_buffer("weight", torch.zeros(rows, self._width))
        self.register_buffer("bias", torch.zeros(rows))
        self.register_buffer("stage", torch.full((rows,), -1))
        self.register_buffer("column", torch.zeros(rows, dtype=torch.int64))

    def adopt(self, stored: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
        """As `Learner.adopt`, for the learner that these classifiers are a part of.

        Args:
            stored: of the whole learner.
            name: of this part in it.
        """
        stage, device = stored[f"{name}.stage"], self.weight.device
        if (before := earlier(stage, self._task)) != self._before:
            self._hold(before)
            self.to(device)
        if f"{name}.column" in stored:
            return stored
        # What was stored before there were columns has a row per class, or one per class and task.
        column = torch.arange(len(stage), device=stage.device) % self._task.seen
        return {**stored, f"{name}.column": column}

    def take(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the newest task's classifier.

        Args:
            weight: [N, D], in the order of the task's `current`.
            bias: [N].
        """
        own = slice(self._before, None)
        self.weight[own] = weight.to(self.weight)
        self.bias[own] = bias.to(self.bias)
        self.stage[own] = self._task.index
        self.column[own] = torch.tensor(self._task.current, device=self.column.device)

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
                scores[:, number, self.column[rows]] = own
        return scores
