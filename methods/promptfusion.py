"""PromptFusion: prompted CLIP for stability, a prompted ViT for plasticity, one learned weight.

Shapes: B batch, C classes seen, E joint width of CLIP, M context length, W width of CLIP's text
tower, V width of its image tower, D width of the ViT.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methods import exemplars, optim
from methods.base import Card, State
from methods.clip import Clip, ends, phrases, unit
from methods.exemplars import Budget, Selection
from methods.fused import Branches
from methods.heads import linear_head
from methods.hyperparameters import require
from methods.trained import Learner, Recipe, Task
from methods.vit import forward_tokens

PAPER = "https://arxiv.org/abs/2303.07223"


@dataclass(frozen=True, kw_only=True)
class Stabiliser:
    """The CLIP branch of PromptFusion: a context of its own for every class, an image prompt.

    Contexts of earlier classes are frozen, those of a task's classes and the image prompt learn.
    Chen et al., https://arxiv.org/abs/2303.07223.

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
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
        legacy_mask: weights of old and new classes for each place in the batch, as in the authors'
            code; otherwise one for each class.
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
    context_length: int = 30
    image_prompt_length: int = 30
    legacy_double_x: bool = False
    legacy_mask: bool = False

    def __post_init__(self) -> None:
        require(self, rules(self))

    def recipe(self, task: Task) -> Recipe:
        return recipe(self)

    def learner(self, vit: Clip, task: Task) -> "StabiliserLearner":
        return StabiliserLearner(vit, task, self)


@dataclass(frozen=True, kw_only=True)
class Booster:
    """The ViT branch of PromptFusion: one prompt for all tasks and a linear classifier.

    Chen et al., https://arxiv.org/abs/2303.07223.

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


@dataclass(frozen=True, kw_only=True)
class PromptFusion:
    """Blends the scores of a prompted CLIP and a prompted ViT by one learned weight.

    Chen et al., https://arxiv.org/abs/2303.07223; without its Lite variant, which spares the ViT
    for some images. The two branches train side by side as two chains, each with a loss of its own,
    and the weight is fitted after each task on the scores of both; the authors' code trains all of
    it at once by the loss of the blended scores (`Joint`). Defaults are those for CIFAR-100.

    Args:
        epochs: passes over the images of a task and its exemplars.
        batch_size: images per step, of all workers together.
        lr: learning rate of both branches.
        weight_decay: of everything that is trained.
        optimizer: optimiser, new for every task.
        schedule: learning rate over the epochs of a task.
        clip: largest norm of all gradients of a branch together; 0 does not clip.
        exemplars: images of earlier tasks that are kept.
        exemplar_budget: of all classes together, or of each class.
        exemplar_selection: how the images are chosen, by features of CLIP.
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches in CLIP.
        vit_prompt_length: learned tokens beside an image's patches in the ViT.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
        legacy_mask: weights of old and new classes for each place in the batch, as in the authors'
            code; otherwise one for each class.
    """

    card: ClassVar[Card] = Card(
        title="PromptFusion",
        paper=PAPER,
        summary="Scores of a prompted CLIP and of a prompted ViT, blended by one learned weight.",
        memory="C * M * W + L * V + L * D + C * (D + 3) + 1 floats; images",
        exemplars=5000,
        uses_seed=True,
        growth="classes",
        network="clip",
        contract="fused",
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
    context_length: int = 30
    image_prompt_length: int = 30
    vit_prompt_length: int = 30
    legacy_double_x: bool = False
    legacy_mask: bool = False

    def __post_init__(self) -> None:
        require(self, rules(self))

    def branches(self) -> Branches:
        values = asdict(self)
        return Branches(
            clip=("promptfusion_clip", {f.name: values[f.name] for f in fields(Stabiliser)}),
            vit=("promptfusion_vit", {f.name: values[f.name] for f in fields(Booster)}),
        )

    def fit(self, clip: Tensor, vit: Tensor, targets: Tensor) -> State:
        """`weight`, before its sigmoid: where the cross-entropy of the blend is least."""
        return {"weight": fit_weight(clip, vit, targets)}

    def blend(self, state: State, clip: Tensor, vit: Tensor) -> Tensor:
        return blend(clip, vit, state["weight"])


class Mask(nn.Module):
    """Weights of the loss of every class: of old ones theta / sigmoid(beta), of new sigmoid(alpha).

    Both start at 1 with every task; the loss draws alpha down and beta up, and both weights with
    them.

    Args:
        task: t; theta is t / 2.
        slots: rows of a batch that have weights of their own; 1 for weights that all rows share.
    """

    def __init__(self, task: Task, slots: int) -> None:
        super().__init__()
        self._theta = task.index / 2
        old = torch.ones(task.seen, dtype=torch.bool)
        old[list(task.current)] = False
        self.register_buffer("_old", old, persistent=False)
        # Classes first: what grows with the tasks grows along the first axis.
        self.raw = nn.Parameter(torch.ones(task.seen, slots), requires_grad=task.index > 0)

    def reset(self) -> None:
        """Back to the start."""
        # Differs from PromptFusion: its alpha goes on from task to task, though its places then
        # belong to other classes.
        nn.init.ones_(self.raw)

    def forward(self, rows: int) -> Tensor:
        """Weights [B or 1, C]."""
        raw = self.raw if self.raw.shape[1] == 1 else self.raw[:, :rows]
        shown = raw.sigmoid()
        return torch.where(self.get_buffer("_old")[:, None], self._theta / shown, shown).T

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of scores [B, C], every row times the weight of its class."""
        logs = scores.float().log_softmax(dim=1)
        return F.nll_loss(logs * self(len(logs)) if self._theta else logs, targets)


class StabiliserLearner(Learner[Clip]):
    """A frozen CLIP, a context for each class, and an image prompt.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: Clip, task: Task, method: Stabiliser) -> None:
        super().__init__(vit, task)
        length = method.context_length
        self._tokens = tokens(vit, task.names, length, method.legacy_double_x)
        self.context = nn.Parameter(torch.empty(task.seen, length, vit.text_width))
        nn.init.normal_(self.context, std=0.01)
        self.prompt = nn.Parameter(torch.randn(1, method.image_prompt_length, vit.image_width))
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
        features = unit(self.vit.image_with_prompt(images, self.prompt))
        return self.vit.logit_scale.exp() * features @ self.texts().T

    def _features(self, columns: list[int], context: Tensor) -> Tensor:
        """Text features of some classes; of each, the context in place of its placeholders."""
        if not columns:
            return context.new_zeros(0, self.vit.num_features)
        chosen = self._tokens[columns]
        embedded = self.vit.embed(chosen)
        rest = embedded[:, 1 + context.shape[1] :]
        prompted = torch.cat([embedded[:, :1], context.to(embedded.dtype), rest], dim=1)
        return unit(self.vit.text_from(prompted, ends(chosen)))


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


class Joint(nn.Module):
    """Both branches and the blend in one network, with the loss of the authors' code.

    What a pipeline runs is the branches alone, side by side; this is what they are measured by.

    Args:
        clip: the CLIP branch, of which the mask is used.
        vit: the ViT branch.
    """

    def __init__(self, clip: StabiliserLearner, vit: BoosterLearner) -> None:
        super().__init__()
        self.clip, self.vit = clip, vit
        self.weight = nn.Parameter(torch.ones(1))

    def logits(self, clip_images: Tensor, vit_images: Tensor) -> Tensor:
        """Scores [B, C] of images [B, 3, h, w], as each branch sees them."""
        return blend(
            self.clip.logits(clip_images, None), self.vit.logits(vit_images, None), self.weight
        )

    def forward(self, clip_images: Tensor, vit_images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.clip.mask.loss(self.logits(clip_images, vit_images), targets)


def blend(clip: Tensor, vit: Tensor, weight: Tensor) -> Tensor:
    """Scores (1 - s) clip + s vit, s = sigmoid(weight); exactly one of the two at infinity."""
    share = weight.sigmoid()
    return (1 - share) * clip + share * vit


def fit_weight(clip: Tensor, vit: Tensor, targets: Tensor) -> Tensor:
    """The weight [1] of `blend` that makes the cross-entropy least.

    The cross-entropy is convex in s, so that there is one: its derivative is halved 60 times. At
    the ends, where one branch is better alone, s is 1e-6 or 1 - 1e-6.

    Args:
        clip: scores [N, C].
        vit: scores [N, C].
        targets: columns [N].
    """
    clip, vit = clip.double(), vit.double()
    apart = vit - clip
    right = apart.gather(1, targets[:, None]).mean()

    def slope(share: float) -> float:
        likely = (clip + share * apart).softmax(dim=1)
        return float((likely * apart).sum(dim=1).mean() - right)

    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return torch.logit(torch.tensor([0.5 * (low + high)], dtype=torch.float64)).float()


def tokens(clip: Clip, names: tuple[str, ...], length: int, double: bool) -> Tensor:
    """Tokens [C, S] of the names behind places for a context, each with a dot.

    Raises:
        ValueError: a text is longer than CLIP's context.
    """
    places = "X " * (2 * length if double else length)
    return clip.tokenise(phrases(names, places + "{}."))


def recipe(method: Stabiliser | Booster) -> Recipe:
    """How a task of either branch is trained."""
    return Recipe(
        epochs=method.epochs,
        batch_size=method.batch_size,
        augmentation="none",
        optimizer=optim.optimizer(method.optimizer, method.lr, method.weight_decay),
        schedule=optim.schedule(method.schedule),
        clip=method.clip,
        drop_last=True,
    )


def rules(method: Any) -> dict[str, tuple[bool, str]]:
    """What `require` needs for the fields that a method has."""
    wanted = {
        "epochs": (lambda value: value >= 1, "at least 1"),
        "batch_size": (lambda value: value >= 1, "at least 1"),
        "lr": (lambda value: value > 0, "above 0"),
        "weight_decay": (lambda value: value >= 0, "at least 0"),
        "clip": (lambda value: value >= 0, "at least 0"),
        "context_length": (lambda value: 0 <= value <= 64, "in 0..64"),
        "image_prompt_length": (lambda value: value >= 1, "at least 1"),
        "vit_prompt_length": (lambda value: value >= 1, "at least 1"),
    }
    found = {
        name: (kept(getattr(method, name)), what)
        for name, (kept, what) in wanted.items()
        if hasattr(method, name)
    }
    return found | exemplars.rules(method)
