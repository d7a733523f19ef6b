"""CoFiMA: CoMA, where every weight is averaged by how much each task's loss depends on it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import alignment, averaging, optim
from graftwork.methods.parts.alignment import Average, OldHeads, copies, heads_to_align, weight_of
from graftwork.methods.parts.heads import OtherRows, current_cross_entropy


@dataclass(frozen=True, kw_only=True)
class CoFiMA:
    """Merges the backbone before and after each task, weighted by their Fisher information.

    Marouf et al., https://arxiv.org/abs/2312.08977, section 3. All else is as in `coma`. Defaults
    are the authors' for CIFAR-100. Only the last Fisher information is kept: that of the task
    before alone, as published, or a running average.

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate of the current head, and of all heads in the alignment.
        backbone_lr_scale: learning rate of the backbone as a part of `lr`.
        weight_decay: of all parameters that are trained.
        optimizer: optimiser, new for every task.
        milestone: epoch from which on the learning rates are a tenth.
        weight: share of the new weights in a merge before they are weighted by their Fisher
            information, from 0 to 1.
        average: `fixed` takes `weight`, `uniform` 1 / (tasks so far).
        fisher: squared gradients of batches of `batch_size`, as the authors' code, or of single
            images (`per_sample`), which is the information of the paper and takes a pass for each
            image; it is up to `batch_size` times as large, so choose `fisher_cap` with it.
        fisher_cap: largest information of a weight; 0 for no limit.
        fisher_floor: least information of a weight; two weights below it are averaged as in `coma`.
        fisher_augmented: measure it on augmented images.
        accumulate: keep the average of all tasks' information, with `weight` for the newest,
            instead of the newest alone.
        old_heads: where the alignment of earlier heads starts, as they were trained (`keep`), or at
            their average with the aligned ones (`merge`).
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
    weight: float = 0.4
    average: Average = "fixed"
    fisher: Literal["batch", "per_sample"] = "batch"
    fisher_cap: float = 1e-4
    fisher_floor: float = 1e-12
    fisher_augmented: bool = True
    accumulate: bool = False
    old_heads: OldHeads = "keep"
    alignment_epochs: int = 5
    samples_per_class: int = 256
    temperature: float = 0.1
    reset_final_norm: bool = True
    augmentation: Augmentation = "slca"

    card: ClassVar[Card] = Card(
        title="CoFiMA",
        paper="https://arxiv.org/abs/2312.08977",
        summary="Averages the backbone before and after each task by Fisher information; heads "
        "aligned on sampled features.",
        memory="backbone twice (weights, Fisher information); C * D * D + 3 * C * D + 4 * C "
        "numbers of Gaussians and heads",
        uses_seed=True,
        growth="classes",
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
                "weight": (0 <= self.weight <= 1, "between 0 and 1"),
                "fisher_cap": (self.fisher_cap >= 0, "at least 0"),
                "fisher_floor": (self.fisher_floor >= 0, "at least 0"),
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

    def learner(self, vit: VisionTransformer, task: Task) -> "CoFiMALearner":
        return CoFiMALearner(vit, task, self)


class CoFiMALearner(Learner):
    """As in CoMA, and the Fisher information of each weight of the ViT.

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

    def __init__(self, vit: VisionTransformer, task: Task, method: CoFiMA) -> None:
        super().__init__(vit, task)
        self._method = method
        unfreeze(vit)
        if method.reset_final_norm:
            alignment.reset_final_norm(vit)
        alignment.prepare(self)
        self.fisher = nn.Module()
        for name, weight in self._weights().items():
            self.fisher.register_buffer(_flat(name), torch.zeros_like(weight))

    def begin(self) -> None:
        self.task_of[list(self.task.current)] = self.task.index
        self._others = OtherRows(self.head, self.task)
        self._before = copies(self.vit) if self.task.index else {}

    def groups(self) -> list[dict[str, Any]]:
        method = self._method
        return alignment.slow_groups(self.vit, self.head, method.lr * method.backbone_lr_scale)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.head(self.features(images))
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    def after_step(self) -> None:
        self._others.put_back()

    def finish(self, data: TaskImages) -> None:
        method, share = (
            self._method,
            weight_of(self._method.weight, self._method.average, self.task),
        )
        found = self._measured(data)
        with torch.no_grad():
            for name, new in self._weights().items():
                kept = self.fisher.get_buffer(_flat(name))
                if self.task.index:
                    before = self._before[name]
                    merged = averaging.fisher_mean(
                        before, new, kept, found[name], share, method.fisher_floor
                    )
                    new.copy_(merged)
                accumulated = method.accumulate and self.task.index
                kept.copy_(averaging.lerp(kept, found[name], share if accumulated else 1))
        features = data.map(lambda images, query: self.features(images))
        alignment.measure(self, features, data)
        weight, bias = heads_to_align(self, share, method.old_heads)
        alignment.update(self, weight, bias, method)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return F.linear(self.features(images), self.aligned_weight, self.aligned_bias)

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.vit.named_parameters() if p.requires_grad}

    def _measured(self, data: TaskImages) -> dict[str, Tensor]:
        """The Fisher information of every weight as trained, before the merge."""
        method, weights = self._method, self._weights()
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        batches = 0

        def add(images: Tensor, targets: Tensor, query: Tensor | None) -> None:
            nonlocal batches
            scores = self.head(self.features(images)).float()
            loss = F.cross_entropy(scores, targets)
            # Not `backward`: nothing is left in `.grad`, and no worker waits for another.
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.square()
            batches += 1

        size = method.batch_size if method.fisher == "batch" else 1
        data.each(add, batch_size=size, augmented=method.fisher_augmented)
        cap = method.fisher_cap or float("inf")
        return {name: (sums / batches).clamp(max=cap) for name, sums in total.items()}


def _flat(name: str) -> str:
    """A weight's name as one of a buffer, which has no dots."""
    return name.replace(".", "/")
