"""The ViT branch of PromptFusion: one prompt from whose output the feature is read, a classifier.

Shapes: B batch, C classes seen, L prompt length, D width of the ViT.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.exemplars import Budget, Selection
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.mixtures.promptfusion_parts import PAPER, Mask, recipe, rules
from graftwork.methods.networks.vit import forward_tokens
from graftwork.methods.parts import optim
from graftwork.methods.parts.heads import linear_head


@dataclass(frozen=True, kw_only=True)
class Booster:
    """The ViT branch of PromptFusion: one prompt for all tasks and a linear classifier.

    Chen et al., https://arxiv.org/abs/2303.07223; see `methods/mixtures/promptfusion.py`.

    Args:
        epochs: passes over the images of a task and its exemplars.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        weight_decay: of everything that is trained.
        optimizer: optimiser, new for every task.
        schedule: learning rate over the epochs of a task.
        clip: largest norm of all gradients together; 0 does not clip.
        exemplars: images of earlier tasks that are kept.
        exemplar_budget: of all classes together, or of each class.
        exemplar_selection: how the images are chosen.
        vit_prompt_length: learned tokens beside an image's patches.
        legacy_mask: weights of old and new classes for each place in the batch, as in the authors'
            code; otherwise one for each class.
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

    epochs: int = 3
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-4
    optimizer: optim.OptimizerName = "adamw"
    schedule: optim.ScheduleName = "cosine"
    clip: float = 1.0
    exemplars: int = 5000
    exemplar_budget: Budget = "total"
    exemplar_selection: Selection = "herding"
    vit_prompt_length: int = 30
    legacy_mask: bool = False

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
        start, prompt = self.vit.num_prefix_tokens, self.prompt[None]
        positions = None if self.vit.no_embed_class else self.vit.pos_embed
        if self.vit.cls_token is not None and positions is not None:
            prompt = prompt + positions[:, :1]
        found = forward_tokens(self.vit, images, prompt=prompt)
        return self.vit.fc_norm(found[:, start : start + len(self.prompt)].mean(dim=1))

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(self.features(images))
