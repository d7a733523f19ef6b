"""VPT, trained on task after task: a baseline of prompt methods, shallow or deep."""

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.parts.epochs import Clipped, Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import current_cross_entropy, linear_head
from graftwork.methods.parts.prompt_tokens import PromptDepth, PromptInit, PromptTokens

PAPER = "https://arxiv.org/abs/2203.12119"


@dataclass(frozen=True, kw_only=True)
class VPT(Clipped, Decayed, Epochs):
    """Learns a few tokens for a frozen ViT, on every task in turn; no method yet.

    Jia et al., https://arxiv.org/abs/2203.12119; the tokens are the same for all tasks.
    Defaults are the first session of LAMDA-PILOT's `aper_vpt` (commit 2647455); the authors' code
    has `augmentation: vpt` on fine-grained data sets, and none on VTAB.

    Args:
        weight_decay: of the prompts; the classifier has none, so that earlier classes keep theirs.
        vpt_init: start of the tokens; from zeros, as in LAMDA-PILOT, they stay copies of one.
    """

    card: ClassVar[Card]
    depth: ClassVar[PromptDepth]
    """Where the tokens enter."""

    batch_size: int = 48
    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"

    def __post_init__(self) -> None:
        require(self, rules(self) | {"prompt_length": (self.prompt_length >= 0, "at least 0")})

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "VPTLearner":
        return VPTLearner(vit, task, self)


@dataclass(frozen=True, kw_only=True)
class VPTShallow(VPT):
    """Learns a few tokens that enter a frozen ViT before its first block, on every task in turn.

    VPT-shallow, https://arxiv.org/abs/2203.12119.

    Args:
        weight_decay: of the prompt; the classifier has none, so that earlier classes keep theirs.
        prompt_length: tokens.
    """

    card: ClassVar[Card] = Card(
        title="VPT-shallow, sequential",
        paper=PAPER,
        summary="Trains prompt tokens before the first block and a classifier, task after task.",
        memory="prompt_length * D floats; C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )
    depth = "shallow"


@dataclass(frozen=True, kw_only=True)
class VPTDeep(VPT):
    """Learns a few tokens for every block of a frozen ViT, on every task in turn.

    VPT-deep, https://arxiv.org/abs/2203.12119.

    Args:
        prompt_length: tokens of each block.
    """

    card: ClassVar[Card] = Card(
        title="VPT-deep, sequential",
        paper=PAPER,
        summary="Trains prompt tokens of every block and a classifier, task after task.",
        memory="blocks * prompt_length * D floats; C * D + C floats of classifier",
        uses_seed=True,
        contract="trained",
    )
    depth = "deep"


class VPTLearner(Learner):
    """Tokens for the input or for every block, and a linear head that grows.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: VPT) -> None:
        super().__init__(vit, task)
        self.prompt = PromptTokens(vit, method.prompt_length, method.depth, method.vpt_init)
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
        return self.prompt(self.network, images)
