"""CoFiMA: CoMA, where every weight is averaged by how much each task's loss depends on it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Recipe, Task, TaskImages
from graftwork.methods.mixtures.slow_merging import Merging, MergingLearner, rules
from graftwork.methods.parts import averaging
from graftwork.methods.parts.slow_learner import recipe


@dataclass(frozen=True, kw_only=True)
class CoFiMA(Merging):
    """Merges the backbone before and after each task, weighted by their Fisher information.

    Marouf et al., https://arxiv.org/abs/2312.08977, section 3. All else is as in `coma`. Defaults
    are the authors' for CIFAR-100. Only the last Fisher information is kept: that of the task
    before alone, as published, or a running average.

    Args:
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
    """

    fisher: Literal["batch", "per_sample"] = "batch"
    fisher_cap: float = 1e-4
    fisher_floor: float = 1e-12
    fisher_augmented: bool = True
    accumulate: bool = False

    card: ClassVar[Card] = Card(
        title="CoFiMA",
        paper="https://arxiv.org/abs/2312.08977",
        summary="Averages the backbone before and after each task by Fisher information; heads "
        "aligned on sampled features.",
        memory="backbone twice (weights, Fisher information); C * D * D + 3 * C * D + 4 * C "
        "numbers of Gaussians and heads",
        uses_seed=True,
        version=2,
        growth="classes",
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "fisher_cap": (self.fisher_cap >= 0, "at least 0"),
                "fisher_floor": (self.fisher_floor >= 0, "at least 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "CoFiMALearner":
        return CoFiMALearner(vit, task, self)


class CoFiMALearner(MergingLearner[CoFiMA]):
    """As in CoMA, and the Fisher information of each weight of the ViT.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: CoFiMA) -> None:
        super().__init__(vit, task, method)
        self.fisher = nn.Module()
        for name, weight in self._weights().items():
            self.fisher.register_buffer(_flat(name), torch.zeros_like(weight))

    def merge(self, data: TaskImages, share: float) -> None:
        method = self._method
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

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

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
