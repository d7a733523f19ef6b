"""MagMax on tasks that train side by side, each from the pre-trained weights.

Shapes: B batch, D width, P weights of the backbone, S tasks so far, C classes seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import NETWORK, Learner, Recipe, Task, TaskImages
from graftwork.methods.mixtures import magmax
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import averaging
from graftwork.methods.parts.heads import cross_entropy, linear_head
from graftwork.methods.parts.stage_heads import NONE, StageHeads


@dataclass(frozen=True, kw_only=True)
class MagMaxIndependent(magmax.Changes):
    """Fine-tunes every task from the pre-trained weights, and merges the largest changes.

    Marczak et al., https://arxiv.org/abs/2407.06322, its variant with independent fine-tuning; see
    `magmax` for the sequential one. Only the changes are kept, not the experts.
    """

    card: ClassVar[Card] = Card(
        title="MagMax, independent fine-tuning",
        paper="https://arxiv.org/abs/2407.06322",
        summary="Fine-tunes every task alone; predicts with the changes of largest magnitude.",
        memory="backbone, once, however many tasks; classifiers of C * (D + 3) floats if "
        "class-incremental, T * C * (D + 3) if domain-incremental",
        uses_seed=True,
        linear_layers=False,
        growth="tasks",
        independent=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, magmax.rules(self))

    def recipe(self, task: Task) -> Recipe:
        return magmax.recipe(self)

    def expert(self, vit: VisionTransformer, task: Task) -> "MagMaxExpert":
        return MagMaxExpert(vit, task, self)

    def learner(self, vit: VisionTransformer, task: Task) -> "MagMaxJoined":
        return MagMaxJoined(vit, task, self)


class MagMaxExpert(Learner):
    """The whole ViT and a classifier of the task's classes.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: MagMaxIndependent) -> None:
        super().__init__(vit, task)
        self._method = method
        unfreeze(vit)
        self.head = linear_head(vit.num_features, len(task.current))
        place = torch.zeros(task.seen, dtype=torch.int64)
        place[list(task.current)] = torch.arange(len(task.current))
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)

    def groups(self) -> list[dict[str, Any]]:
        return magmax.groups(self.network, self.head, self._method)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(read_out(self.network, forward_tokens(self.network, images)))
        return {"loss": cross_entropy(scores.float(), self.place[targets], self.task)}


class MagMaxJoined(Learner):
    """The pre-trained ViT, the largest changes to it, and the classifiers of all tasks.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    learned_buffers = ("tau",)
    tau: Tensor
    """Change of largest magnitude of every weight [P]."""

    def __init__(self, vit: VisionTransformer, task: Task, method: MagMaxIndependent) -> None:
        super().__init__(vit, task)
        self._scale = method.scale
        self.register_buffer("tau", torch.zeros_like(magmax.flat(vit)))
        self.heads = StageHeads(vit.num_features, task)

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.heads.adopt(stored, "heads")

    def join(self, expert: State, data: TaskImages) -> None:
        change = torch.cat(
            [
                (expert[name].to(own) - own if name in expert else own * 0).detach().flatten()
                for name, own in self.network.named_parameters(NETWORK)
            ]
        )
        self.tau.copy_(averaging.max_magnitude(self.tau, change))
        self.heads.take(expert["head.weight"], expert["head.bias"])

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        """A class of several tasks has the mean of their scores; one of none the lowest of all."""
        scores = self.heads([self.features(images)] * (self.task.index + 1))
        known = scores != NONE
        total = scores.masked_fill(~known, 0.0).sum(dim=1)
        mean = total / known.sum(dim=1).clamp(min=1)
        unknown = ~known.any(dim=1)
        lowest = mean.masked_fill(unknown, torch.inf).amin(dim=1, keepdim=True)
        return torch.where(unknown, lowest, mean)

    def features(self, images: Tensor) -> Tensor:
        weights = magmax.flat(self.network) + self._scale * self.tau
        return magmax.features(self.network, weights, images)
