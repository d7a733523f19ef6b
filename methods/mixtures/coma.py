"""CoMA: what was learned on each task is averaged into the weights before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

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
class CoMA:
    """Fine-tunes slowly from the merged backbone of the task before, then merges with it again.

    Marouf et al., https://arxiv.org/abs/2312.08977, section 3. Training, Gaussians and alignment
    are SLCA's; the Gaussians are measured on the merged backbone, and training goes on from it and
    from the heads as they were before the alignment. Defaults are the authors' for CIFAR-100.

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate of the current head, and of all heads in the alignment.
        backbone_lr_scale: learning rate of the backbone as a part of `lr`.
        weight_decay: of all parameters that are trained.
        optimizer: optimiser, new for every task.
        milestone: epoch from which on the learning rates are a tenth.
        weight: share of the new weights in a merge, from 0 to 1.
        average: `fixed` takes `weight`, `uniform` 1 / (tasks so far), the mean over all tasks.
        old_heads: where the alignment of earlier heads starts, as they were trained (`keep`), or at
            their average with the aligned ones (`merge`, as the authors' code).
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
    old_heads: OldHeads = "keep"
    alignment_epochs: int = 5
    samples_per_class: int = 256
    temperature: float = 0.1
    reset_final_norm: bool = True
    augmentation: Augmentation = "slca"

    card: ClassVar[Card] = Card(
        title="CoMA",
        paper="https://arxiv.org/abs/2312.08977",
        summary="Averages the backbone before and after each task; heads aligned on sampled "
        "features.",
        memory="backbone; C * D * D + 3 * C * D + 4 * C numbers of Gaussians and heads",
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

    def learner(self, vit: VisionTransformer, task: Task) -> "CoMALearner":
        return CoMALearner(vit, task, self)


class CoMALearner(Learner):
    """The whole ViT, merged after each task, heads before and after alignment, and Gaussians.

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

    def __init__(self, vit: VisionTransformer, task: Task, method: CoMA) -> None:
        super().__init__(vit, task)
        self._method = method
        unfreeze(vit)
        if method.reset_final_norm:
            alignment.reset_final_norm(vit)
        alignment.prepare(self)

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
        with torch.no_grad():
            for name, before in self._before.items():
                new = self.vit.get_parameter(name)
                new.copy_(averaging.lerp(before, new, share))
        features = data.map(lambda images, query: self.features(images))
        alignment.measure(self, features, data)
        weight, bias = heads_to_align(self, share, method.old_heads)
        alignment.update(self, weight, bias, method)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return F.linear(self.features(images), self.aligned_weight, self.aligned_bias)

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))
