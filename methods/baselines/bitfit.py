"""BitFit: the biases of the pre-trained network, trained on task after task."""

from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import optim
from graftwork.methods.parts.heads import current_cross_entropy, linear_head


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Trains every bias of the backbone and nothing else of it, on all tasks in turn.

    Ben Zaken et al., https://arxiv.org/abs/2106.10199, with nothing against forgetting but the
    loss over the current task's columns. Defaults are those of `vpt_deep` without its decay, so
    that the two differ in what is trained; the authors' code, for text, has AdamW and 1e-3.
    Shapes: C classes seen, D feature width.

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        weight_decay: of the biases, towards 0; the classifier has none, so that the rows of
            earlier classes stay.
        optimizer: optimiser, new for every task.
        schedule: learning rate over the epochs of a task.
        clip: largest norm of all gradients together; 0 does not clip.
        augmentation: of the training images.
    """

    epochs: int = 20
    batch_size: int = 48
    lr: float = 0.01
    weight_decay: float = 0.0
    optimizer: optim.OptimizerName = "sgd"
    schedule: optim.ScheduleName = "cosine"
    clip: float = 0.0
    augmentation: Augmentation = "lamda"

    card: ClassVar[Card] = Card(
        title="BitFit, sequential",
        paper="https://arxiv.org/abs/2106.10199",
        summary="Trains the biases of the backbone and a classifier, task after task.",
        memory="all biases of the backbone (134 D for 12 blocks); C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "epochs": (self.epochs >= 1, "at least 1"),
                "batch_size": (self.batch_size >= 1, "at least 1"),
                "lr": (self.lr > 0, "above 0"),
                "weight_decay": (self.weight_decay >= 0, "at least 0"),
                "clip": (self.clip >= 0, "at least 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            optimizer=optim.optimizer(self.optimizer, self.lr, self.weight_decay),
            schedule=optim.schedule(self.schedule),
            clip=self.clip,
        )

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
            {"params": [p for p in self.vit.parameters() if p.requires_grad]},
            {"params": list(self.head.parameters()), "weight_decay": 0.0},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": current_cross_entropy(self.logits(images, query), targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.vit, forward_tokens(self.vit, images))
