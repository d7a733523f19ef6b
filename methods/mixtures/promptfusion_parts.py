"""Parts shared by PromptFusion's branches: fields, their ranges, recipe, weights of the loss.

Shapes: B batch, C classes seen.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts import exemplars
from graftwork.methods.contracts.exemplars import Budget, Selection
from graftwork.methods.contracts.trained import Recipe, Task
from graftwork.methods.parts import epochs, optim
from graftwork.methods.parts.epochs import Clipped, Decayed, Scheduled, usual_recipe

PAPER = "https://arxiv.org/abs/2303.07223"


@dataclass(frozen=True, kw_only=True)
class Common(Clipped, Decayed, Scheduled):
    """The hyper-parameters that the method and both branches have.

    Args:
        epochs: passes over the images of a task and its exemplars.
        exemplars: images of earlier tasks that are kept.
        exemplar_budget: of all classes together, or of each class.
        exemplar_selection: how the images are chosen.
        legacy_mask: weights of old and new classes for each place in the batch, as in the authors'
            code; otherwise one for each class.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-4
    optimizer: optim.OptimizerName = "adamw"
    clip: float = 1.0
    exemplars: int = 5000
    exemplar_budget: Budget = "total"
    exemplar_selection: Selection = "herding"
    legacy_mask: bool = False


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


def blend(clip: Tensor, vit: Tensor, weight: Tensor) -> Tensor:
    """Scores (1 - s) clip + s vit, s = sigmoid(weight); exactly one of the two at infinity."""
    share = weight.sigmoid()
    return (1 - share) * clip + share * vit


def recipe(method: Common) -> Recipe:
    """Recipe of a task of either branch."""
    return replace(usual_recipe(method), drop_last=True)


def rules(method: Common) -> dict[str, tuple[bool, str]]:
    """Rules for `require` of the fields that a method has."""
    wanted = {
        "context_length": (lambda value: 0 <= value <= 64, "in 0..64"),
        "image_prompt_length": (lambda value: value >= 1, "at least 1"),
        "vit_prompt_length": (lambda value: value >= 1, "at least 1"),
    }
    found = {
        name: (kept(getattr(method, name)), what)
        for name, (kept, what) in wanted.items()
        if hasattr(method, name)
    }
    return epochs.rules(method) | found | exemplars.rules(method)
