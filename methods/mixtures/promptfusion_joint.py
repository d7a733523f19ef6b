"""PromptFusion as its authors train it: both branches and the weight between them, by one loss.

Shapes: B batch, C classes seen.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.mixtures.promptfusion_clip import Stabiliser, StabiliserLearner
from graftwork.methods.mixtures.promptfusion_parts import (
    PAPER,
    Common,
    Mask,
    blend,
    recipe,
    rules,
)
from graftwork.methods.mixtures.promptfusion_vit import Booster, BoosterLearner
from graftwork.methods.networks.network import Pair


@dataclass(frozen=True, kw_only=True)
class Joint(Common):
    """Prompts on a CLIP and a ViT, a classifier, and the weight of their blend, all by one loss.

    Chen et al., https://arxiv.org/abs/2303.07223; see `promptfusion.py`.

    Args:
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches in CLIP.
        vit_prompt_length: learned tokens beside an image's patches in the ViT.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
    """

    card: ClassVar[Card] = Card(
        title="PromptFusion, joint training",
        paper=PAPER,
        summary="A prompted CLIP and a prompted ViT, trained by the loss of their blended scores.",
        memory="C * M * W + L * V + L * D + C * (D + 2) + 1 floats; images",
        exemplars=5000,
        uses_seed=True,
        growth="classes",
        network="pair",
        contract="trained",
    )

    context_length: int = 30
    image_prompt_length: int = 30
    vit_prompt_length: int = 30
    legacy_double_x: bool = False

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, network: Pair, task: Task) -> "JointLearner":
        return JointLearner(network, task, self)

    def branch(self, kind: type[Any]) -> Any:
        """A branch with those of these hyper-parameters that it has."""
        values = asdict(self)
        return kind(**{field.name: values[field.name] for field in fields(kind)})


class JointLearner(Learner[Pair]):
    """Both branches, one weight of their blend, and one set of weights of the loss.

    Args:
        network: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, network: Pair, task: Task, method: Joint) -> None:
        super().__init__(network, task)
        self.stabiliser = StabiliserLearner(network.clip, task, method.branch(Stabiliser))
        self.booster = BoosterLearner(network.vit, task, method.branch(Booster))
        # The loss of the blended scores has the only ones.
        del self.stabiliser.mask, self.booster.mask
        self.mask = Mask(task, method.batch_size if method.legacy_mask else 1)
        # Before its sigmoid; goes on from task to task.
        self.weight = nn.Parameter(torch.ones(1))

    def begin(self) -> None:
        self.mask.reset()

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": self.mask.loss(self.logits(images, query), targets)}

    def after_step(self) -> None:
        self.stabiliser.after_step()

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        clip, vit = (part.logits(images, query) for part in (self.stabiliser, self.booster))
        return blend(clip, vit, self.weight)
