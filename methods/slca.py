"""SLCA: a slow learner, and classifiers aligned on samples of the classes' Gaussians."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methods import gaussians, optim
from methods.base import Card
from methods.finetune import unfreeze
from methods.gaussians import Gaussians
from methods.heads import current_cross_entropy, linear_head
from methods.hyperparameters import require
from methods.trained import Augmentation, Learner, Recipe, Task, TaskImages
from methods.vit import forward_tokens, read_out


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

    count: Tensor
    mean: Tensor
    covariance: Tensor
    task_of: Tensor
    """The newest task in which a class had images [C]: its head, and how old its Gaussian is."""
    aligned_weight: Tensor
    aligned_bias: Tensor

    def __init__(self, vit: VisionTransformer, task: Task, method: SLCA) -> None:
        super().__init__(vit, task)
        self._method = method
        classes, width = task.seen, vit.num_features
        unfreeze(vit)
        if method.reset_final_norm:
            reset_final_norm(vit)
        self.head = linear_head(width, classes)
        self.register_buffer("aligned_weight", torch.zeros(classes, width))
        self.register_buffer("aligned_bias", torch.zeros(classes))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(classes, width))
        self.register_buffer("covariance", torch.zeros(classes, width, width))
        self.register_buffer("task_of", torch.full((classes,), task.index))
        rest = sorted(set(range(classes)) - set(task.current))
        self._current, self._rest = list(task.current), rest
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        self.task_of[self._current] = self.task.index
        self._kept = [p.detach()[self._rest].clone() for p in self.head.parameters()]

    def groups(self) -> list[dict[str, Any]]:
        slow = self._method.lr * self._method.backbone_lr_scale
        return [
            {"params": [p for p in self.vit.parameters() if p.requires_grad], "lr": slow},
            {"params": list(self.head.parameters())},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(self.features(images))
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    @torch.no_grad()
    def after_step(self) -> None:
        # The rows of other tasks' heads get no gradient, but weight decay would shrink them.
        for parameter, kept in zip(self.head.parameters(), self._kept, strict=True):
            parameter[self._rest] = kept

    def finish(self, data: TaskImages) -> None:
        features = data.map(lambda images, query: self.features(images))
        device = self.mean.device
        new = gaussians.measure(features.to(device), data.targets.to(device), self.task.seen)
        old = Gaussians(count=self.count, mean=self.mean, covariance=self.covariance)
        both = gaussians.pool(old, new)
        self.count, self.mean, self.covariance = both.count, both.mean, both.covariance
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        if self.task.index and self._method.alignment_epochs:
            weight, bias = self._align(weight, bias)
        self.aligned_weight.copy_(weight)
        self.aligned_bias.copy_(bias)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return F.linear(self.features(images), self.aligned_weight, self.aligned_bias)

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))

    @torch.enable_grad()
    def _align(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """All heads, trained on samples of all classes' Gaussians."""
        method = self._method
        weight, bias = (t.clone().requires_grad_() for t in (weight, bias))
        make = optim.optimizer(method.optimizer, method.lr, method.weight_decay)
        optimizer = make([{"params": [weight, bias]}])
        factors = gaussians.factor(self.covariance)
        mean = self.mean * drift(self.task_of, self.task.index)[:, None]
        labels = torch.arange(len(mean), device=mean.device)
        labels = labels.repeat_interleave(method.samples_per_class)
        for epoch in range(method.alignment_epochs):
            rate = 0.5 * method.lr * (1 + math.cos(math.pi * epoch / method.alignment_epochs))
            optimizer.param_groups[0]["lr"] = rate
            rows = gaussians.sample(mean, factors, method.samples_per_class).flatten(0, 1)
            order = torch.randperm(len(rows), device=rows.device)
            for batch in order.split(method.samples_per_class):
                scores = F.linear(rows[batch], weight, bias)
                if method.temperature:
                    scores = normalised(scores, self.task_of) / method.temperature
                loss = F.cross_entropy(scores, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return weight.detach(), bias.detach()


def drift(task_of: Tensor, index: int) -> Tensor:
    """Factors [C] on the classes' means: 0.9 + 0.1 (t_c + 1) / (t + 1), 1 for the newest task.

    Args:
        task_of: t_c [C].
        index: t.
    """
    # Differs from the authors' code, which divides the class by the size of the current task,
    # because tasks may have unequal sizes.
    return 0.9 + 0.1 * (task_of + 1) / (index + 1)


def normalised(scores: Tensor, task_of: Tensor) -> Tensor:
    """Logits [B, C] divided by the mean over tasks of the norm of the task's logits."""
    tasks = task_of.unique()
    norms = [scores[:, task_of == task].norm(dim=1, keepdim=True) + 1e-7 for task in tasks]
    return scores / torch.cat(norms, dim=1).mean(dim=1, keepdim=True)


@torch.no_grad()
def reset_final_norm(vit: VisionTransformer) -> None:
    """Makes the norm before the classifier as new: weight 1, bias 0, epsilon 1e-5.

    Raises:
        TypeError: it is no LayerNorm.
    """
    norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"expected a LayerNorm before the classifier, got {type(norm).__name__}")
    # In place: a tensor of the backbone must not vanish while the learner lives.
    norm.reset_parameters()
    norm.eps = 1e-5
