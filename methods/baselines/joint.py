"""Joint fine-tuning of the whole network on all tasks at once: the upper bound."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import CosineHead, linear_head


@dataclass(frozen=True, kw_only=True)
class Joint(Decayed, Epochs):
    """Trains all weights once, on the images of all tasks together; no continual learner.

    Defaults are the "joint full fine-tuning" of RanPAC, https://arxiv.org/abs/2307.02251.

    Args:
        epochs: passes over all images.
        lr: learning rate of the classifier.
        backbone_lr: learning rate of the backbone.
        weight_decay: of all parameters.
        optimizer: optimiser.
        schedule: learning rates over the epochs.
        head: cosine with a learned scale as RanPAC has it, or a linear layer.
    """

    epochs: int = 30
    backbone_lr: float = 1e-4
    schedule: optim.ScheduleName = "constant"
    head: Literal["cosine", "linear"] = "cosine"

    card: ClassVar[Card] = Card(
        title="Joint fine-tuning",
        paper="https://arxiv.org/abs/2307.02251",
        summary="Trains the whole network on the images of all tasks at once; the upper bound.",
        memory="all images; backbone; C * D floats of classifier",
        growth="rows",
        uses_seed=True,
        upper_bound=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(self, rules(self) | {"backbone_lr": (self.backbone_lr > 0, "above 0")})

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "JointLearner":
        return JointLearner(vit, task, self)


class JointLearner(Learner):
    """The whole ViT and a classifier of all classes.

    Args:
        vit: all of it is trained.
        task: the one task, of which every class is a current one.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: Joint) -> None:
        super().__init__(vit, task)
        self._backbone_lr = method.backbone_lr
        unfreeze(vit)
        make = CosineHead if method.head == "cosine" else linear_head
        self.head = make(vit.num_features, task.seen)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {
                "params": [p for p in self.network.parameters() if p.requires_grad],
                "lr": self._backbone_lr,
            },
            {"params": list(self.head.parameters())},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(images, query).float(), targets)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.network, forward_tokens(self.network, images))
