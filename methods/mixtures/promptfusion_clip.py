"""The CLIP branch of PromptFusion: a context for every class, and an image prompt.

Shapes: B batch, C classes seen, O of them of earlier tasks, E joint width of CLIP, M context
length, W width of CLIP's text tower, V width of its image tower, S length of a text.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.mixtures.promptfusion_parts import PAPER, Common, Mask, recipe, rules
from graftwork.methods.networks.clip import Clip, ends, phrases, unit
from graftwork.methods.parts.heads import linear_scores


@dataclass(frozen=True, kw_only=True)
class Stabiliser(Common):
    """The CLIP branch of PromptFusion: a context of its own for every class, an image prompt.

    Chen et al., https://arxiv.org/abs/2303.07223; see `promptfusion.py`. Contexts of earlier
    classes are frozen, those of a task's classes and the image prompt learn.

    Args:
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
    """

    card: ClassVar[Card] = Card(
        title="PromptFusion, CLIP branch",
        paper=PAPER,
        summary="Class contexts and an image prompt on a frozen CLIP.",
        memory="C * M * W + L * V + C floats; images",
        exemplars=5000,
        uses_seed=True,
        growth="classes",
        network="clip",
        contract="trained",
    )

    context_length: int = 30
    image_prompt_length: int = 30
    legacy_double_x: bool = False

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, network: Clip, task: Task) -> "StabiliserLearner":
        return StabiliserLearner(network, task, self)


class StabiliserLearner(Learner[Clip]):
    """A frozen CLIP, a context for each class, and an image prompt.

    Args:
        network: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, network: Clip, task: Task, method: Stabiliser) -> None:
        super().__init__(network, task)
        length = method.context_length
        self._tokens = tokens(network, task.names, length, method.legacy_double_x)
        self.context = nn.Parameter(torch.empty(task.seen, length, network.text_width))
        nn.init.normal_(self.context, std=0.01)
        self.prompt = nn.Parameter(torch.randn(1, method.image_prompt_length, network.image_width))
        self.mask = Mask(task, method.batch_size if method.legacy_mask else 1)
        self._old = sorted(set(range(task.seen)) - set(task.current))
        self._kept: tuple[Tensor, Tensor] | None = None
        self._texts: Tensor | None = None

    def begin(self) -> None:
        self.mask.reset()

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": self.mask.loss(self.logits(images, query), targets)}

    @torch.no_grad()
    def after_step(self) -> None:
        # Weight decay would move contexts that have no gradient.
        self.context[self._old] = self.old()[0]
        self._texts = None

    @torch.no_grad()
    def old(self) -> tuple[Tensor, Tensor]:
        """Contexts [O, M, W] of earlier classes, and their text features [O, E]; both stay."""
        if self._kept is None:
            context = self.context.detach()[self._old].clone()
            self._kept = context, self._features(self._old, context)
        return self._kept

    def texts(self) -> Tensor:
        """Text features [C, E] of all classes seen, of unit length."""
        if not torch.is_grad_enabled():
            if self._texts is None:
                self._texts = self._features(list(range(self.task.seen)), self.context)
            return self._texts
        own = list(self.task.current)
        both = torch.cat([self.old()[1], self._features(own, self.context[own])])
        places = torch.tensor(self._old + own, device=both.device)
        return both[places.argsort()]

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        features = unit(self.network.image_with_prompt(images, self.prompt))
        return linear_scores(self.network.logit_scale.exp() * features, self.texts(), None)

    def _features(self, columns: list[int], context: Tensor) -> Tensor:
        """Text features of some classes; of each, the context in place of its placeholders."""
        if not columns:
            return context.new_zeros(0, self.network.num_features)
        chosen = self._tokens[columns]
        embedded = self.network.embed(chosen)
        rest = embedded[:, 1 + context.shape[1] :]
        prompted = torch.cat([embedded[:, :1], context.to(embedded.dtype), rest], dim=1)
        return unit(self.network.text_from(prompted, ends(chosen)))


def tokens(clip: Clip, names: tuple[str, ...], length: int, double: bool) -> Tensor:
    """Tokens [C, S] of the names behind places for a context, each with a dot.

    Raises:
        ValueError: a text is longer than CLIP's context.
    """
    places = "X " * (2 * length if double else length)
    return clip.tokenise(phrases(names, places + "{}."))
