"""A backbone trained slowly, and heads aligned after each task: shared by SLCA and its kin.

Shapes: B batch, C classes seen, D width.
"""

from dataclasses import dataclass
from typing import Any, Generic

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import TypeVar

from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import alignment, epochs, optim
from graftwork.methods.parts.epochs import Decayed, Steps
from graftwork.methods.parts.heads import OtherRows, current_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Slow(Decayed, Steps):
    """The hyper-parameters of the training and of the alignment; SLCA's for CIFAR-100.

    Args:
        lr: learning rate of the current head, and of all heads in the alignment.
        backbone_lr_scale: learning rate of the backbone as a part of `lr`.
        weight_decay: of all parameters that are trained.
        milestone: epoch from which on the learning rates are a tenth.
        alignment_epochs: passes of the alignment after each task but the first; 0 leaves it out.
        samples_per_class: features drawn of each class in each of these epochs.
        temperature: of the normalised logits in the alignment; 0 takes the logits as they are.
        reset_final_norm: replace the backbone's last norm by a fresh one, as the authors do.
        augmentation: of the training images.
    """

    backbone_lr_scale: float = 0.01
    milestone: int = 18
    alignment_epochs: int = 5
    samples_per_class: int = 256
    temperature: float = 0.1
    reset_final_norm: bool = True
    augmentation: Augmentation = "slca"


def rules(method: Slow) -> dict[str, tuple[bool, str]]:
    """Rules for `require` of the fields of `Slow`."""
    return epochs.rules(method) | {
        "backbone_lr_scale": (method.backbone_lr_scale > 0, "above 0"),
        "milestone": (method.milestone >= 0, "at least 0"),
        "alignment_epochs": (method.alignment_epochs >= 0, "at least 0"),
        "samples_per_class": (method.samples_per_class >= 1, "at least 1"),
        "temperature": (method.temperature >= 0, "at least 0"),
    }


def recipe(method: Slow) -> Recipe:
    """Recipe of a task, before its alignment."""
    return Recipe(
        epochs=method.epochs,
        batch_size=method.batch_size,
        augmentation=method.augmentation,
        optimizer=optim.optimizer(method.optimizer, method.lr, method.weight_decay),
        schedule=optim.milestone(method.milestone),
    )


M = TypeVar("M", bound=Slow)


class SlowLearner(Learner, Generic[M]):
    """The whole ViT, the heads before and after their alignment, and the classes' Gaussians.

    Abstract: what happens after a task, `finish`, is the method's own.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    learned_buffers = ("aligned_weight", "aligned_bias")
    head: nn.Linear
    aligned_weight: Tensor
    aligned_bias: Tensor
    count: Tensor
    mean: Tensor
    covariance: Tensor
    task_of: Tensor

    def __init__(self, vit: VisionTransformer, task: Task, method: M) -> None:
        super().__init__(vit, task)
        self._method = method
        unfreeze(vit)
        if method.reset_final_norm:
            alignment.reset_final_norm(vit)
        alignment.prepare(self)

    def begin(self) -> None:
        self.task_of[list(self.task.current)] = self.task.index
        self._others = OtherRows(self.head, self.task)

    def groups(self) -> list[dict[str, Any]]:
        """The backbone with a learning rate of its own, and the head."""
        lr = self._method.lr * self._method.backbone_lr_scale
        return [
            {"params": [p for p in self.network.parameters() if p.requires_grad], "lr": lr},
            {"params": list(self.head.parameters())},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(self.features(images))
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    def after_step(self) -> None:
        self._others.put_back()

    def finish(self, data: TaskImages) -> None:
        raise NotImplementedError

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return F.linear(self.features(images), self.aligned_weight, self.aligned_bias)

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.network, forward_tokens(self.network, images))

    def measure(self, data: TaskImages) -> None:
        """Adds the task's features to the Gaussians of its classes."""
        features = data.map(lambda images, query: self.features(images))
        alignment.measure(self, features, data)

    def align(self, weight: Tensor, bias: Tensor) -> None:
        """Makes the heads in use of trained ones [C, D], [C]."""
        alignment.update(self, weight, bias, self._method)
