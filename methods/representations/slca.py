"""SLCA: a slow learner, and classifiers aligned on samples of the classes' Gaussians."""

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Recipe, Task, TaskImages
from graftwork.methods.parts.slow_learner import Slow, SlowLearner, recipe, rules


@dataclass(frozen=True, kw_only=True)
class SLCA(Slow):
    """Fine-tunes the backbone slowly, then trains all heads on sampled features of all classes.

    Zhang et al., https://arxiv.org/abs/2303.05118. Defaults are the authors' for CIFAR-100.
    Training goes on from the heads as they were before the alignment.
    """

    card: ClassVar[Card] = Card(
        title="SLCA",
        paper="https://arxiv.org/abs/2303.05118",
        summary="A slow learning rate for the backbone; heads aligned on sampled features. "
        "The Gaussian of a class that occurs again is pooled over its tasks.",
        memory="backbone; C * D * D + 3 * C * D + 4 * C numbers of Gaussians and heads",
        version=2,
        growth="classes",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "SLCALearner":
        return SLCALearner(vit, task, self)


class SLCALearner(SlowLearner[SLCA]):
    """A slow learner whose heads are aligned on the backbone as it was trained."""

    def finish(self, data: TaskImages) -> None:
        self.measure(data)
        self.align(self.head.weight.detach(), self.head.bias.detach())
