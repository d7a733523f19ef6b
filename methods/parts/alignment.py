"""Classifiers aligned on the Gaussians of all classes: shared by SLCA, CoMA and CoFiMA.

Such a learner holds two classifiers: the one that is trained, and the one in use, which is made of
it after each task. `prepare` gives a learner the tensors, `measure` and `update` fill them.

Shapes: B batch, C classes seen, D width.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.trained import Learner, Task, TaskImages
from graftwork.methods.parts import gaussians, optim
from graftwork.methods.parts.gaussians import Gaussians
from graftwork.methods.parts.heads import linear_head


class Alignment(Protocol):
    """The hyper-parameters of an alignment, as methods have them."""

    @property
    def alignment_epochs(self) -> int:
        """Passes over the samples, which are drawn anew in each; 0 leaves the alignment out."""
        ...

    @property
    def samples_per_class(self) -> int:
        """Features drawn of each class in each epoch, and rows of a step."""
        ...

    @property
    def temperature(self) -> float:
        """Of the normalised logits; 0 takes the logits as they are."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate, falling to 0 by a cosine."""
        ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def optimizer(self) -> optim.OptimizerName: ...


class Aligned(Protocol):
    """Attributes that `prepare` adds to a learner."""

    task: Task
    head: nn.Linear
    """The classifier that is trained."""
    aligned_weight: Tensor
    """Of the classifier in use [C, D]."""
    aligned_bias: Tensor
    """Of the classifier in use [C]."""
    count: Tensor
    mean: Tensor
    covariance: Tensor
    """The classes' Gaussians, each measured on the backbone of its own time."""
    task_of: Tensor
    """The newest task in which a class had images [C]: its head, and how old its Gaussian is."""


def prepare(learner: Learner) -> None:
    """Adds a fresh head and empty statistics to a learner that is being made."""
    classes, width = learner.task.seen, learner.network.num_features
    learner.head = linear_head(width, classes)
    learner.register_buffer("aligned_weight", torch.zeros(classes, width))
    learner.register_buffer("aligned_bias", torch.zeros(classes))
    learner.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
    learner.register_buffer("mean", torch.zeros(classes, width))
    learner.register_buffer("covariance", torch.zeros(classes, width, width))
    learner.register_buffer("task_of", torch.full((classes,), learner.task.index))


def measure(learner: Aligned, features: Tensor, data: TaskImages) -> None:
    """Adds a task's features [N, D] to the Gaussians of its classes; the others stay."""
    device = learner.mean.device
    new = gaussians.measure(features.to(device), data.targets.to(device), learner.task.seen)
    old = Gaussians(count=learner.count, mean=learner.mean, covariance=learner.covariance)
    both = gaussians.pool(old, new)
    learner.count, learner.mean, learner.covariance = both.count, both.mean, both.covariance


def update(learner: Aligned, weight: Tensor, bias: Tensor, method: Alignment) -> None:
    """Makes the classifier in use of a trained one [C, D], [C]; the first task is not aligned."""
    if learner.task.index and method.alignment_epochs:
        weight, bias = align(learner, weight, bias, method)
    learner.aligned_weight.copy_(weight)
    learner.aligned_bias.copy_(bias)


@torch.enable_grad()
def align(
    learner: Aligned, weight: Tensor, bias: Tensor, method: Alignment
) -> tuple[Tensor, Tensor]:
    """All heads, trained on samples of the Gaussians of all classes that have had images."""
    weight, bias = (t.clone().requires_grad_() for t in (weight, bias))
    make = optim.optimizer(method.optimizer, method.lr, method.weight_decay)
    optimizer = make([{"params": [weight, bias]}])
    # A domain may lack a class that a later one has: of a class without images nothing is known.
    measured = learner.count.nonzero().flatten()
    factors = gaussians.factor(learner.covariance[measured])
    mean = learner.mean * drift(learner.task_of, learner.task.index)[:, None]
    mean, labels = mean[measured], measured.repeat_interleave(method.samples_per_class)
    for epoch in range(method.alignment_epochs):
        rate = 0.5 * method.lr * (1 + math.cos(math.pi * epoch / method.alignment_epochs))
        optimizer.param_groups[0]["lr"] = rate
        rows = gaussians.sample(mean, factors, method.samples_per_class).flatten(0, 1)
        order = torch.randperm(len(rows), device=rows.device)
        for batch in order.split(method.samples_per_class):
            scores = F.linear(rows[batch], weight, bias)
            if method.temperature:
                scores = normalised(scores, learner.task_of) / method.temperature
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
