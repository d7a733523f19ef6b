"""The ViT branch of PromptFusion: one prompt from whose output the feature is read, a classifier.

Shapes: B batch, C classes seen, L prompt length, D width of the ViT.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.mixtures.promptfusion_parts import PAPER, Common, Mask, recipe, rules
from graftwork.methods.networks.vit import forward_tokens
from graftwork.methods.parts.heads import linear_head


@dataclass(frozen=True, kw_only=True)
class Booster(Common):
    """The ViT branch of PromptFusion: one prompt for all tasks and a linear classifier.

    Chen et al., https://arxiv.org/abs/2303.07223; see `methods/mixtures/promptfusion.py`.

    Args:
        vit_prompt_length: learned tokens beside an image's patches.
    """

    card: ClassVar[Card] = Card(
        title="PromptFusion, ViT branch",
        paper=PAPER,
        summary="A prompt and a linear classifier on a frozen ViT.",
        memory="L * D + C * (D + 2) floats; images",
        exemplars=5000,
        uses_seed=True,
        contract="trained",
    )

    vit_prompt_length: int = 30

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "BoosterLearner":
        return BoosterLearner(vit, task, self)


class BoosterLearner(Learner[VisionTransformer]):
    """A frozen ViT, a prompt from whose output the feature is read, and a linear classifier.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: Booster) -> None:
        super().__init__(vit, task)
        self.prompt = nn.Parameter(torch.empty(method.vit_prompt_length, vit.embed_dim))
        nn.init.uniform_(self.prompt, -1, 1)
        # Differs from PromptFusion: rows for classes to come are made when they come.
        self.head = linear_head(vit.num_features, task.seen)
        self.mask = Mask(task, method.batch_size if method.legacy_mask else 1)

    def begin(self) -> None:
        self.mask.reset()

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": self.mask.loss(self.logits(images, query), targets)}

    def features(self, images: Tensor) -> Tensor:
        start, prompt = self.network.num_prefix_tokens, self.prompt[None]
        positions = None if self.network.no_embed_class else self.network.pos_embed
        if self.network.cls_token is not None and positions is not None:
            prompt = prompt + positions[:, :1]
        found = forward_tokens(self.network, images, prompt=prompt)
        return self.network.fc_norm(found[:, start : start + len(self.prompt)].mean(dim=1))

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))
