"""Adaptation of a backbone on the first task: what APER and RanPAC build on."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens, read_out, unfreeze
from graftwork.methods.parts import peft
from graftwork.methods.parts.epochs import Decayed, Epochs, usual_recipe
from graftwork.methods.parts.heads import CosineHead, cross_entropy
from graftwork.methods.parts.prompt_tokens import PromptInit, PromptTokens

Peft = Literal["finetune", "vpt_shallow", "vpt_deep", "ssf", "adapter"]

USED = {
    "finetune": (),
    "vpt_shallow": ("prompt_length", "vpt_init"),
    "vpt_deep": ("prompt_length", "vpt_init"),
    "ssf": (),
    "adapter": ("bottleneck", "dropout"),
}
"""The fields that only some kinds of adaptation use."""


@dataclass(frozen=True, kw_only=True)
class FirstSession(Decayed, Epochs):
    """Trains a copy of the backbone, or what is put into it, on the first task alone.

    Stage A of Zhou et al., https://arxiv.org/abs/2303.07338, and phase 1 of RanPAC. It is a part of
    other methods: they fit a classifier in closed form on the features that it leaves.

    Args:
        peft: what is trained: all weights, prompts, scales and shifts, or adapters.
        epochs: passes over the images of the first task.
        lr: learning rate of everything that is trained, classifier included.
        weight_decay: of everything that is trained, classifier included.
        optimizer: optimiser.
        schedule: learning rate over the epochs.
        prompt_length: prompt tokens of VPT, in every block if deep.
        vpt_init: start of the prompts: uniform as VPT, zeros as LAMDA-PILOT.
        bottleneck: width of the adapters.
        dropout: of the adapters' hidden units.
    """

    card: ClassVar[Card] = Card(
        title="First session",
        paper="https://arxiv.org/abs/2303.07338",
        summary="Adapts the backbone on the first task with a cosine classifier.",
        memory="what is trained; C_0 * D + 1 floats of classifier",
        uses_seed=True,
        contract="trained",
    )

    peft: Peft = "adapter"
    batch_size: int = 48
    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"
    bottleneck: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "FirstSessionLearner":
        return FirstSessionLearner(vit, task, self)


class FirstSessionLearner(Learner):
    """An adapted ViT, and a cosine classifier of the first task that nothing uses afterwards.

    Args:
        vit: trained or changed as `peft` says.
        task: the first one.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: FirstSession) -> None:
        super().__init__(vit, task)
        self.prompt: PromptTokens | None = None
        self.adapters = None
        match method.peft:
            case "finetune":
                unfreeze(vit)
            case "vpt_shallow":
                self.prompt = PromptTokens(vit, method.prompt_length, "shallow", method.vpt_init)
            case "vpt_deep":
                self.prompt = PromptTokens(vit, method.prompt_length, "deep", method.vpt_init)
            case "ssf":
                peft.scale_and_shift(vit)
            case "adapter":
                self.adapters = peft.adapters(vit, method.bottleneck, method.dropout)
        self.head = CosineHead(vit.num_features, task.seen)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.logits(images, query).float(), targets, self.task)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        if self.prompt is not None:
            return self.prompt(self.network, images)
        added = None if self.adapters is None else list(self.adapters)
        return read_out(self.network, forward_tokens(self.network, images, adapters=added))


def of(kind: Peft, method: object) -> FirstSession:
    """The first session of a method, from the fields that the two have in common.

    A field that `kind` does not use keeps its default, so that methods share one training.
    """
    unused = {name for names in USED.values() for name in names} - set(USED[kind])
    shared = {
        field.name: getattr(method, field.name)
        for field in fields(FirstSession)
        if hasattr(method, field.name) and field.name not in unused
    }
    return FirstSession(**{**shared, "peft": kind})


def rules(method: object) -> dict[str, tuple[bool, str]]:
    """Rules for `require` of the fields that a method has in common with `FirstSession`."""
    wanted: dict[str, tuple[Callable[[float], bool], str]] = {
        "epochs": (lambda value: value >= 1, "at least 1"),
        "batch_size": (lambda value: value >= 1, "at least 1"),
        "lr": (lambda value: value > 0, "above 0"),
        "weight_decay": (lambda value: value >= 0, "at least 0"),
        "prompt_length": (lambda value: value >= 1, "at least 1"),
        "bottleneck": (lambda value: value >= 1, "at least 1"),
        "dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    }
    return {
        name: (kept(getattr(method, name)), what)
        for name, (kept, what) in wanted.items()
        if hasattr(method, name)
    }
