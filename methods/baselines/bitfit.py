"""BitFit: the biases of the pre-trained network, trained on task after task."""

from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts.epochs import Clipped, Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import current_cross_entropy, linear_head


@dataclass(frozen=True, kw_only=True)
class BitFit(Clipped, Decayed, Epochs):
    """Trains every bias of the backbone and nothing else of it, on all tasks in turn.

    Ben Zaken et al., https://arxiv.org/abs/2106.10199, with nothing against forgetting but the
    loss over the current task's columns. Defaults are those of `vpt_deep` without its decay, so
    that the two differ in what is trained; the authors' code, for text, has AdamW and 1e-3.
    Shapes: C classes seen, D feature width.

    Args:
        weight_decay: of the biases, towards 0; the classifier has none, so that the rows of
            earlier classes stay.
    """

    batch_size: int = 48
    weight_decay: float = 0.0

    card: ClassVar[Card] = Card(
        title="BitFit, sequential",
        paper="https://arxiv.org/abs/2106.10199",
        summary="Trains the biases of the backbone and a classifier, task after task.",
        memory="all biases of the backbone (134 D for 12 blocks); C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "BitFitLearner":
        return BitFitLearner(vit, task)


class BitFitLearner(Learner):
    """A ViT of which the biases are trained, and a linear head that grows.

    Args:
        vit: its biases are trained, its weights stay frozen.
        task: the task.
    """

    def __init__(self, vit: VisionTransformer, task: Task) -> None:
        super().__init__(vit, task)
        unfreeze(vit)
        for name, parameter in vit.named_parameters():
            if not name.endswith("bias"):
                parameter.requires_grad_(False)
        self.head = linear_head(vit.num_features, task.seen)

    def groups(self) -> list[dict[str, Any]]:
        """The head without decay, which would shrink the rows of earlier classes."""
        return [
            {"params": [p for p in self.network.parameters() if p.requires_grad]},
            {"params": list(self.head.parameters()), "weight_decay": 0.0},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": current_cross_entropy(self.logits(images, query), targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.network, forward_tokens(self.network, images))
