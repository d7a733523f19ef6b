"""CoMA: what was learned on each task is averaged into the weights before it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Recipe, Task, TaskImages
from graftwork.methods.mixtures.slow_merging import Merging, MergingLearner, rules
from graftwork.methods.parts import averaging
from graftwork.methods.parts.slow_learner import recipe


@dataclass(frozen=True, kw_only=True)
class CoMA(Merging):
    """Fine-tunes slowly from the merged backbone of the task before, then merges with it again.

    Marouf et al., https://arxiv.org/abs/2312.08977, section 3. Training, Gaussians and alignment
    are SLCA's; the Gaussians are measured on the merged backbone, and training goes on from it and
    from the heads as they were before the alignment. Defaults are the authors' for CIFAR-100.
    """

    card: ClassVar[Card] = Card(
        title="CoMA",
        paper="https://arxiv.org/abs/2312.08977",
        summary="Averages the backbone before and after each task; heads aligned on sampled "
        "features.",
        memory="backbone; C * D * D + 3 * C * D + 4 * C numbers of Gaussians and heads",
        uses_seed=True,
        version=2,
        growth="classes",
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "CoMALearner":
        return CoMALearner(vit, task, self)


class CoMALearner(MergingLearner[CoMA]):
    """A slow learner whose backbone is averaged, weight by weight."""

    def merge(self, data: TaskImages, share: float) -> None:
        with torch.no_grad():
            for name, before in self._before.items():
                new = self.network.get_parameter(name)
                new.copy_(averaging.lerp(before, new, share))
