"""A slow learner whose backbone is merged with that of the task before: CoMA's and CoFiMA's.

Shapes: C classes seen, D width.
"""

from dataclasses import dataclass
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from typing_extensions import TypeVar

from graftwork.methods.contracts.trained import TaskImages
from graftwork.methods.parts import averaging, slow_learner
from graftwork.methods.parts.alignment import Aligned
from graftwork.methods.parts.slow_learner import Slow, SlowLearner

Average = Literal["fixed", "uniform"]
OldHeads = Literal["keep", "merge"]


@dataclass(frozen=True, kw_only=True)
class Merging(Slow):
    """The hyper-parameters of the merge, behind those of the slow learner.

    Args:
        weight: share of the new weights in a merge, from 0 to 1.
        average: `fixed` takes `weight`, `uniform` 1 / (tasks so far), the mean over all tasks.
        old_heads: where the alignment of earlier heads starts, as they were trained (`keep`), or at
            their average with the aligned ones (`merge`, as the authors' code).
    """

    weight: float = 0.4
    average: Average = "fixed"
    old_heads: OldHeads = "keep"


def rules(method: Merging) -> dict[str, tuple[bool, str]]:
    """Rules for `require` of the fields of `Merging`."""
    return slow_learner.rules(method) | {"weight": (0 <= method.weight <= 1, "between 0 and 1")}


M = TypeVar("M", bound=Merging)


class MergingLearner(SlowLearner[M]):
    """A slow learner that is merged after each task; its Gaussians are of the merged backbone.

    Abstract: how two backbones are merged, `merge`, is the method's own.
    """

    def begin(self) -> None:
        super().begin()
        self._before = _copies(self.network) if self.task.index else {}

    def finish(self, data: TaskImages) -> None:
        method = self._method
        # The mean over all tasks, or a fixed share of the newest.
        share = 1 / (self.task.index + 1) if method.average == "uniform" else method.weight
        self.merge(data, share)
        self.measure(data)
        self.align(*_heads_to_align(self, share, method.old_heads))

    def merge(self, data: TaskImages, share: float) -> None:
        """Merges the weights that are trained with those before the task, `_before`, in place.

        Args:
            data: the task's images.
            share: of the newly trained weights, from 0 to 1.
        """
        raise NotImplementedError


def _copies(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights that are trained, by name, as they are now."""
    return {n: p.detach().clone() for n, p in vit.named_parameters() if p.requires_grad}


def _heads_to_align(learner: Aligned, share: float, old: OldHeads) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] where the alignment starts; rows of the current task as trained.

    Args:
        share: of the newly trained weights, if the others are merged.
        old: `merge` averages earlier heads, aligned and not aligned.
    """
    # Differs from IemProg/CoFiMA: it averages classifiers after the alignment (those stored) with
    # classifiers before it. CoFiMA weighs them by what is left of a gradient of the alignment, and
    # multiplies the new head by its Fisher information.
    weight, bias = learner.head.weight.detach().clone(), learner.head.bias.detach().clone()
    rest = sorted(set(range(learner.task.before)) - set(learner.task.current))
    if old == "merge" and rest:
        weight[rest] = averaging.lerp(learner.aligned_weight[rest], weight[rest], share)
        bias[rest] = averaging.lerp(learner.aligned_bias[rest], bias[rest], share)
    return weight, bias
