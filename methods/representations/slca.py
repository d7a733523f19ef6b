"""SLCA: a slow learner, and classifiers aligned on samples of the classes' Gaussians."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import alignment, optim
from graftwork.methods.parts.heads import OtherRows, current_cross_entropy


@dataclass(frozen=True, kw_only=True)
class SLCA:
    """Fine-tunes the backbone slowly, then trains all heads on sampled features of all classes.

    Zhang et al., https://arxiv.org/abs/2303.05118. Defaults are the authors' for CIFAR-100.
    Training goes on from the heads as they were before the alignment.

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate of the current head, and of all heads in the alignment.
        backbone_lr_scale: learning rate of the backbone as a part of `lr`.
        weight_decay: of all parameters that are trained.
        optimizer: optimiser, new for every task.
        milestone: epoch from which on the learning rates are a tenth.
        alignment_epochs: passes of the alignment after each task but the first; 0 leaves it out.
        samples_per_class: features drawn of each class in each of these epochs.
        temperature: of the normalised logits in the alignment; 0 takes the logits as they are.
        reset_final_norm: replace the backbone's last norm by a fresh one, as the authors do.
        augmentation: of the training images.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.01
    backbone_lr_scale: float = 0.01
    weight_decay: float = 5e-4
    optimizer: optim.OptimizerName = "sgd"
    milestone: int = 18
    alignment_epochs: int = 5
    samples_per_class: int = 256
    temperature: float = 0.1
    reset_final_norm: bool = True
    augmentation: Augmentation = "slca"

    card: ClassVar[Card] = Card(
        title="SLCA",
        paper="https://arxiv.org/abs/2303.05118",
        summary="A slow learning rate for the backbone; heads aligned on sampled features. "
        "The Gaussian of a class that occurs again is pooled over its tasks.",
        memory="backbone; C * D * D + 3 * C * D + 4 * C numbers of Gaussians and heads",
        growth="classes",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "epochs": (self.epochs >= 1, "at least 1"),
                "batch_size": (self.batch_size >= 1, "at least 1"),
                "lr": (self.lr > 0, "above 0"),
                "backbone_lr_scale": (self.backbone_lr_scale > 0, "above 0"),
                "weight_decay": (self.weight_decay >= 0, "at least 0"),
                "milestone": (self.milestone >= 0, "at least 0"),
                "alignment_epochs": (self.alignment_epochs >= 0, "at least 0"),
                "samples_per_class": (self.samples_per_class >= 1, "at least 1"),
                "temperature": (self.temperature >= 0, "at least 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            optimizer=optim.optimizer(self.optimizer, self.lr, self.weight_decay),
            schedule=optim.milestone(self.milestone),
        )

    def learner(self, vit: VisionTransformer, task: Task) -> "SLCALearner":
        return SLCALearner(vit, task, self)


class SLCALearner(Learner):
    """The whole ViT, the heads before and after their alignment, and the classes' Gaussians.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    head: nn.Linear
    aligned_weight: Tensor
    aligned_bias: Tensor
    count: Tensor
    mean: Tensor
    covariance: Tensor
    task_of: Tensor

    def __init__(self, vit: VisionTransformer, task: Task, method: SLCA) -> None:
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
        method = self._method
        return alignment.slow_groups(self.vit, self.head, method.lr * method.backbone_lr_scale)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(self.features(images))
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    def after_step(self) -> None:
        self._others.put_back()

    def finish(self, data: TaskImages) -> None:
        features = data.map(lambda images, query: self.features(images))
        alignment.measure(self, features, data)
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        alignment.update(self, weight, bias, self._method)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return F.linear(self.features(images), self.aligned_weight, self.aligned_bias)

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))
