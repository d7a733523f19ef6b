"""Sequential fine-tuning of the whole network: the lower bound."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import LinearHead, cross_entropy, current_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Finetune(Decayed, Epochs):
    """Trains all weights on every task, and forgets.

    Defaults are those of https://github.com/sun-hailong/LAMDA-PILOT (commit 2647455), which takes
    the cross-entropy over the columns of the current task only; over all columns (`loss: seen`) it
    forgets far more.

    Args:
        weight_decay: of all parameters, on task 0.
        later_weight_decay: of all parameters, on later tasks.
        loss: columns of the cross-entropy: those of the current task, or all seen.
    """

    lr: float = 1e-3
    later_weight_decay: float = 2e-4
    schedule: optim.ScheduleName = "constant"
    loss: Literal["current", "seen"] = "current"

    card: ClassVar[Card] = Card(
        title="Sequential fine-tuning",
        paper="https://github.com/sun-hailong/LAMDA-PILOT",
        summary="Trains the whole network on task after task; the lower bound.",
        memory="backbone; C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self, rules(self) | {"later_weight_decay": (self.later_weight_decay >= 0, "at least 0")}
        )

    def recipe(self, task: Task) -> Recipe:
        decay = self.later_weight_decay if task.index else self.weight_decay
        recipe = usual_recipe(self)
        return replace(recipe, optimizer=optim.optimizer(self.optimizer, self.lr, decay))

    def learner(self, vit: VisionTransformer, task: Task) -> "FinetuneLearner":
        return FinetuneLearner(vit, task, self)


class FinetuneLearner(Learner):
    """The whole ViT and a linear head that grows.

    Args:
        vit: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: Finetune) -> None:
        super().__init__(vit, task)
        self._loss = method.loss
        unfreeze(vit)
        self.head = LinearHead(vit.num_features, task.seen)
        nn.init.kaiming_uniform_(self.head.weight, nonlinearity="linear")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.logits(images, query)
        if self._loss == "seen":
            return {"loss": cross_entropy(scores.float(), targets, self.task)}
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.network, forward_tokens(self.network, images))
