"""LoRA trained on task after task: a baseline that forgets less than fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import LowRank, forward_tokens, read_out, wrap
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import current_cross_entropy, linear_head

LAYERS = {
    "qkv": ("attn.qkv",),
    "attention": ("attn.qkv", "attn.proj"),
    "all": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}
"""Layers of a block that each value of `targets` names."""


@dataclass(frozen=True, kw_only=True)
class LoRA(Decayed, Epochs):
    """One set of low-rank updates of a frozen ViT, trained on all tasks in turn.

    Hu et al., https://arxiv.org/abs/2106.09685, with nothing against forgetting but the loss over
    the current task's columns. Defaults are those of InfLoRA on CIFAR-100 in steps of ten classes
    (LibContinual, commit a399ed4), so that the two differ in the method alone.
    Shapes: C classes seen, D feature width, R rank.

    Args:
        weight_decay: of the updates and the classifier; above 0 it also shrinks the classifier's
            rows of earlier tasks.
        rank: R, rank of an update; queries, keys and values of a block share their lower half.
        scale: factor of the updates, alpha / R in the paper.
        targets: layers with an update: queries, keys and values, the whole attention, or all
            linear layers of the blocks.
    """

    lr: float = 5e-4
    weight_decay: float = 0.0
    optimizer: optim.OptimizerName = "adam"
    schedule: optim.ScheduleName = "half_cosine"
    rank: int = 10
    scale: float = 1.0
    targets: Literal["qkv", "attention", "all"] = "qkv"
    augmentation: Augmentation = "imagenet"

    card: ClassVar[Card] = Card(
        title="Sequential LoRA",
        paper="https://arxiv.org/abs/2106.09685",
        summary="Trains low-rank updates of a frozen backbone on task after task.",
        memory="4 * R * D floats per block for qkv; C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "rank": (self.rank >= 1, "at least 1"),
                "scale": (self.scale > 0, "above 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "LoRALearner":
        return LoRALearner(vit, task, self)


class LoRALearner(Learner):
    """A frozen ViT whose targets have updates, and a linear head that grows.

    Args:
        vit: its targets are wrapped.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: LoRA) -> None:
        super().__init__(vit, task)

        def updated(layer: nn.Module) -> nn.Module:
            assert isinstance(layer, nn.Linear), type(layer)
            return LowRank(layer, method.rank, method.scale)

        for layer in LAYERS[method.targets]:
            wrap(vit, f"blocks.*.{layer}", updated)
        self.head = linear_head(vit.num_features, task.seen)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": current_cross_entropy(self.logits(images, query), targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return read_out(self.network, forward_tokens(self.network, images))
