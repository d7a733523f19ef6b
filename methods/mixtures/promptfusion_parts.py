"""What the two branches of PromptFusion share: the weights of the loss, the recipe, the ranges.

Shapes: B batch, C classes seen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts import exemplars
from graftwork.methods.contracts.trained import Recipe, Task
from graftwork.methods.parts import optim

PAPER = "https://arxiv.org/abs/2303.07223"


class Mask(nn.Module):
    """Weights of the loss of every class: of old ones theta / sigmoid(beta), of new sigmoid(alpha).

    Both start at 1 with every task; the loss draws alpha down and beta up, and both weights with
    them.

    Args:
        task: t; theta is t / 2.
        slots: rows of a batch that have weights of their own; 1 for weights that all rows share.
    """

    def __init__(self, task: Task, slots: int) -> None:
        super().__init__()
        self._theta = task.index / 2
        old = torch.ones(task.seen, dtype=torch.bool)
        old[list(task.current)] = False
        self.register_buffer("_old", old, persistent=False)
        # Classes first: what grows with the tasks grows along the first axis.
        self.raw = nn.Parameter(torch.ones(task.seen, slots), requires_grad=task.index > 0)

    def reset(self) -> None:
        """Back to the start."""
        # Differs from PromptFusion: its alpha goes on from task to task, though its places then
        # belong to other classes.
        nn.init.ones_(self.raw)

    def forward(self, rows: int) -> Tensor:
        """Weights [B or 1, C]."""
        raw = self.raw if self.raw.shape[1] == 1 else self.raw[:, :rows]
        shown = raw.sigmoid()
        return torch.where(self.get_buffer("_old")[:, None], self._theta / shown, shown).T

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of scores [B, C], every row times the weight of its class."""
        logs = scores.float().log_softmax(dim=1)
        return F.nll_loss(logs * self(len(logs)) if self._theta else logs, targets)


def recipe(method: Any) -> Recipe:
    """How a task of either branch is trained."""
    return Recipe(
        epochs=method.epochs,
        batch_size=method.batch_size,
        augmentation="none",
        optimizer=optim.optimizer(method.optimizer, method.lr, method.weight_decay),
        schedule=optim.schedule(method.schedule),
        clip=method.clip,
        drop_last=True,
    )


def rules(method: Any) -> dict[str, tuple[bool, str]]:
    """What `require` needs for the fields that a method has."""
    wanted = {
        "epochs": (lambda value: value >= 1, "at least 1"),
        "batch_size": (lambda value: value >= 1, "at least 1"),
        "lr": (lambda value: value > 0, "above 0"),
        "weight_decay": (lambda value: value >= 0, "at least 0"),
        "clip": (lambda value: value >= 0, "at least 0"),
        "context_length": (lambda value: 0 <= value <= 64, "in 0..64"),
        "image_prompt_length": (lambda value: value >= 1, "at least 1"),
        "vit_prompt_length": (lambda value: value >= 1, "at least 1"),
    }
    found = {
        name: (kept(getattr(method, name)), what)
        for name, (kept, what) in wanted.items()
        if hasattr(method, name)
    }
    return found | exemplars.rules(method)
