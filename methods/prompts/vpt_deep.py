"""VPT-deep, trained on task after task: a baseline of prompt methods."""

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task
from graftwork.methods.parts import optim
from graftwork.methods.parts.heads import current_cross_entropy, linear_head
from graftwork.methods.parts.prompt_tokens import PromptInit, PromptTokens


@dataclass(frozen=True, kw_only=True)
class VPTDeep:
    """Learns a few tokens for every block of a frozen ViT, on every task in turn.

    Jia et al., https://arxiv.org/abs/2203.12119; the prompts are the same for all tasks.
    Defaults are the first session of LAMDA-PILOT's `aper_vpt` (commit 2647455).

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        weight_decay: of the prompts; the classifier has none, so that earlier classes keep theirs.
        optimizer: optimiser, new for every task.
        schedule: learning rate over the epochs of a task.
        clip: largest norm of all gradients together; 0 does not clip.
        prompt_length: tokens of each block.
        vpt_init: start of the tokens; from zeros, as in LAMDA-PILOT, they stay copies of one.
        augmentation: of the training images.
    """

    epochs: int = 20
    batch_size: int = 48
    lr: float = 0.01
    weight_decay: float = 5e-4
    optimizer: optim.OptimizerName = "sgd"
    schedule: optim.ScheduleName = "cosine"
    clip: float = 0.0
    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"
    augmentation: Augmentation = "lamda"

    card: ClassVar[Card] = Card(
        title="VPT-deep, sequential",
        paper="https://arxiv.org/abs/2203.12119",
        summary="Trains prompt tokens of every block and a classifier, task after task.",
        memory="blocks * prompt_length * D floats; C * D + C floats of classifier",
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
                "prompt_length": (self.prompt_length >= 0, "at least 0"),
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

    def learner(self, vit: VisionTransformer, task: Task) -> "VPTDeepLearner":
        return VPTDeepLearner(vit, task, self)


class VPTDeepLearner(Learner):
    """Tokens for every block, and a linear head that grows.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: VPTDeep) -> None:
        super().__init__(vit, task)
        self.prompt = PromptTokens(vit, method.prompt_length, "deep", method.vpt_init)
        self.head = linear_head(vit.num_features, task.seen)

    def groups(self) -> list[dict]:
        """The head without decay, which would shrink the rows of earlier classes."""
        return [
            {"params": [self.prompt.tokens]},
            {"params": list(self.head.parameters()), "weight_decay": 0.0},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": current_cross_entropy(self.logits(images, query), targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return self.prompt(self.vit, images)
