"""CoOp: the words around a class's name are learned vectors; both towers stay frozen.

Shapes: B batch, C classes seen, E joint width, L context length, W width of the text tower.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.clip import Clip, context_tokens, cosines, text_with_context
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import cross_entropy, current_cross_entropy


@dataclass(frozen=True, kw_only=True)
class CoOp(Decayed, Epochs):
    """Learns the context of a prompt `[context] name.` by cross-entropy.

    Zhou et al., https://arxiv.org/abs/2109.01134, section 3. Defaults are those of the authors'
    code (KaiyangZhou/CoOp, commit ff61507) for ViT-B/16: 16 random vectors before the name, shared
    by all classes, for 200 epochs, as with 8 or 16 images of a class; the paper takes 100 with 2 or
    4, and 50 with one, and on ImageNet. It knows one task. Here a shared context is trained on in
    every task, while class-specific ones are frozen when their classes are no longer in the task.

    Args:
        weight_decay: of the context.
        schedule: learning rate over the epochs of a task after the warm-up.
        warmup_epochs: first epochs of every task, at a constant rate.
        warmup_lr: learning rate of the warm-up.
        context_length: L, learned vectors before the name.
        class_specific: a context for each class; otherwise one for all.
        loss: columns of the cross-entropy: those of the current task, or all seen.
    """

    epochs: int = 200
    batch_size: int = 32
    lr: float = 2e-3
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    context_length: int = 16
    class_specific: bool = False
    loss: Literal["current", "seen"] = "current"
    augmentation: Augmentation = "imagenet_bicubic"

    card: ClassVar[Card] = Card(
        title="CoOp",
        paper="https://arxiv.org/abs/2109.01134",
        summary="Learns the context words of CLIP's class texts; both towers stay frozen.",
        memory="L * W floats, C * L * W if class-specific",
        version=2,
        uses_seed=True,
        query=True,
        network="clip",
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "warmup_epochs": (self.warmup_epochs >= 0, "at least 0"),
                "warmup_lr": (self.warmup_lr > 0, "above 0"),
                "context_length": (1 <= self.context_length <= 64, "in 1..64"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        after = optim.schedule(self.schedule)

        def schedule(epoch: int, epochs: int) -> float:
            if epoch < self.warmup_epochs:
                return self.warmup_lr / self.lr
            # The cosine spans all epochs and is cut off, as in the authors' code.
            return after(epoch - self.warmup_epochs, epochs)

        return replace(usual_recipe(self), schedule=schedule)

    def learner(self, network: Clip, task: Task) -> "CoOpLearner":
        return CoOpLearner(network, task, self)


class CoOpLearner(Learner[Clip]):
    """A frozen CLIP and the context.

    Args:
        network: frozen.
        task: the task.
        method: hyper-parameters.
    """

    needs_query = True

    def __init__(self, network: Clip, task: Task, method: CoOp) -> None:
        super().__init__(network, task)
        self._method = method
        self._tokens = context_tokens(network, task.names, method.context_length)
        groups = task.seen if method.class_specific else 1
        self.context = nn.Parameter(torch.empty(groups, method.context_length, network.text_width))
        nn.init.normal_(self.context, std=0.02)
        others = set(range(task.seen)) - set(task.current)
        self._frozen = sorted(others) if method.class_specific else []
        self._kept: Tensor | None = None
        self._texts: Tensor | None = None

    def begin(self) -> None:
        self._kept = self.context.detach()[self._frozen].clone()

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.logits(images, query)
        if self._method.loss == "seen":
            return {"loss": cross_entropy(scores, targets, self.task)}
        return {"loss": current_cross_entropy(scores, targets, self.task)}

    @torch.no_grad()
    def after_step(self) -> None:
        # Momentum and weight decay would move contexts that have no gradient.
        assert self._kept is not None, "begin comes before the first step"
        self.context[self._frozen] = self._kept
        self._texts = None

    def texts(self) -> Tensor:
        """Text features [C, E] of all classes seen."""
        if torch.is_grad_enabled():
            return text_with_context(self.network, self._tokens, self.context)
        if self._texts is None:
            self._texts = text_with_context(self.network, self._tokens, self.context)
        return self._texts

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None, "needs_query is set"
        return self.network.logit_scale.exp() * cosines(query, self.texts())

    def features(self, images: Tensor) -> Tensor:
        return self.network.image(images)
