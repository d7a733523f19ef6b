"""MagMax: of every weight the largest change that any task has made to it.

Shapes: B batch, D width, P weights of the backbone, C classes seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import epochs, optim
from graftwork.methods.parts.averaging import max_magnitude
from graftwork.methods.parts.epochs import Clipped, Decayed, Epochs
from graftwork.methods.parts.heads import current_cross_entropy, linear_head


@dataclass(frozen=True, kw_only=True)
class Changes(Clipped, Decayed, Epochs):
    """The hyper-parameters of both variants.

    Args:
        lr: learning rate of the backbone.
        head_lr: learning rate of the classifier, which starts from nothing.
        weight_decay: of the backbone.
        scale: of the merged changes.
    """

    epochs: int = 10
    lr: float = 1e-5
    head_lr: float = 1e-3
    weight_decay: float = 0.1
    optimizer: optim.OptimizerName = "adamw"
    clip: float = 1.0
    scale: float = 0.5
    augmentation: Augmentation = "imagenet"


@dataclass(frozen=True, kw_only=True)
class MagMax(Changes):
    """Fine-tunes on task after task, and predicts with the largest changes since the beginning.

    Marczak et al., https://arxiv.org/abs/2407.06322. Weights are th_0 + scale * tau, where tau
    holds, entry by entry, the change th_t - th_0 of largest magnitude of all tasks so far.
    `magmax_independent` starts every task from th_0. Defaults are those of the authors' code, which
    trains CLIP's image tower under frozen text features, and has no `head_lr`.

    Args:
        weight_decay: of the backbone; the classifier has none, so that old rows stay.
    """

    card: ClassVar[Card] = Card(
        title="MagMax, sequential fine-tuning",
        paper="https://arxiv.org/abs/2407.06322",
        summary="Fine-tunes in sequence; predicts with the changes of largest magnitude.",
        memory="backbone, twice, however many tasks; C * D + C floats of classifier",
        uses_seed=True,
        linear_layers=False,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "MagMaxLearner":
        return MagMaxLearner(vit, task, self)


class MagMaxLearner(Learner):
    """The fine-tuned ViT with a head that grows, and the largest changes so far.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    learned_buffers = ("tau",)
    tau: Tensor
    """Change of largest magnitude of every weight [P]."""
    start: Tensor
    """The pre-trained weights [P]."""

    def __init__(self, vit: VisionTransformer, task: Task, method: MagMax) -> None:
        super().__init__(vit, task)
        self._method = method
        start = flat(vit)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("tau", torch.zeros_like(start))
        unfreeze(vit)
        self.head = linear_head(vit.num_features, task.seen)

    def groups(self) -> list[dict[str, Any]]:
        return groups(self.network, self.head, self._method)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(read_out(self.network, forward_tokens(self.network, images)))
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    def finish(self, data: TaskImages) -> None:
        self.tau.copy_(max_magnitude(self.tau, flat(self.network) - self.start))

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return features(self.network, self.start + self._method.scale * self.tau, images)


def rules(method: Changes) -> Mapping[str, tuple[bool, str]]:
    """Rules of both variants for `require`."""
    return epochs.rules(method) | {
        "head_lr": (method.head_lr > 0, "above 0"),
        "scale": (method.scale >= 0, "at least 0"),
    }


def recipe(method: Changes) -> Recipe:
    """Recipe of a task of either variant."""
    # Differs from danielm1405/magmax, whose learning rate rises for 500 steps and then follows a
    # cosine by steps: ours are functions of the epoch, so that a resumed task needs no state.
    return epochs.usual_recipe(method)


def groups(vit: VisionTransformer, head: nn.Linear, method: Changes) -> list[dict[str, Any]]:
    """Backbone and head, which has its own learning rate and no decay."""
    return [
        {"params": [p for p in vit.parameters() if p.requires_grad]},
        {"params": list(head.parameters()), "lr": method.head_lr, "weight_decay": 0.0},
    ]


def flat(vit: VisionTransformer) -> Tensor:
    """All weights of the ViT, one after the other [P]; a copy."""
    return torch.cat([parameter.detach().flatten() for parameter in vit.parameters()])


def features(vit: VisionTransformer, weights: Tensor, images: Tensor) -> Tensor:
    """Features [B, D] of the ViT with other weights [P], in the order of `flat`."""
    named = dict(vit.named_parameters())
    parts = weights.split([parameter.numel() for parameter in named.values()])
    changed = {
        f"vit.{name}": part.view_as(parameter)
        for (name, parameter), part in zip(named.items(), parts, strict=True)
    }
    return functional_call(_Reader(vit), changed, (images,))


class _Reader(nn.Module):
    """Reads a ViT's feature, as a module: weights can be replaced in one only."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))
