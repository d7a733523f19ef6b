"""PROOF: projections behind a frozen CLIP that grow with the tasks, and a cross-modal fusion."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import exemplars, optim
from methods.base import Card
from methods.clip import Clip, phrases
from methods.exemplars import Budget, Selection
from methods.heads import EPS, batch_rows, batch_sum
from methods.hyperparameters import require
from methods.trained import Learner, Recipe, Task, TaskImages


@dataclass(frozen=True, kw_only=True)
class PROOF:
    """Linear projections per task behind both towers of a frozen CLIP, summed, then fused.

    Zhou et al., https://arxiv.org/abs/2305.19270. A score is the sum of three similarities: of
    image and text, and, after an attention layer that sees the image, all texts, all prototypes
    and learned context, of image and text and of image and prototype.
    Shapes: B batch, C classes seen, E joint width, T tasks so far.

    Args:
        epochs: passes over the features of a task and its exemplars.
        batch_size: images per step, of all workers together.
        lr: learning rate of everything that is trained.
        weight_decay: of everything that is trained.
        optimizer: optimiser.
        schedule: learning rate over the epochs.
        exemplars: images of earlier tasks that are kept.
        exemplar_budget: of all classes together, or of each class.
        exemplar_selection: how the images are chosen.
        context_length: learned context vectors per task.
        dropout: of the attention and of what comes out of it.
        eval_selection: whether an image is compared with texts and prototypes as they are beside it
            in the attention, or with their mean over the batch, as the authors' code does.
        freeze_text_projections: train only the newest projection of texts, as the paper says; the
            authors' code goes on training all of them.
        normalise_at_test: give the projected image unit length at test time too.
        plain_scale: factor on the similarity of image and text before the attention.
        text_scale: factor on the similarity of image and text after it.
        prototype_scale: factor on the similarity of image and prototype after it.
    """

    card: ClassVar[Card] = Card(
        title="PROOF",
        paper="https://arxiv.org/abs/2305.19270",
        summary="Projections per task behind a frozen CLIP, summed, and one attention over "
        "image, texts and prototypes.",
        memory="T * (2 * E * (E + 1) + 3 * E) + 4 * E * E + 3 * E + C * (E + 1) + 1 floats; images",
        exemplars=2000,
        uses_seed=True,
        growth="tasks",
        query=True,
        images=False,
        network="clip",
        contract="trained",
    )

    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    optimizer: optim.OptimizerName = "sgd"
    schedule: optim.ScheduleName = "cosine"
    exemplars: int = 2000
    exemplar_budget: Budget = "total"
    exemplar_selection: Selection = "herding"
    context_length: int = 3
    dropout: float = 0.1
    eval_selection: Literal["instance", "batch_mean"] = "instance"
    freeze_text_projections: bool = False
    normalise_at_test: bool = False
    plain_scale: float = 1.0
    text_scale: float = 1.0
    prototype_scale: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            {
                "epochs": (self.epochs >= 1, "at least 1"),
                "batch_size": (self.batch_size >= 1, "at least 1"),
                "lr": (self.lr > 0, "above 0"),
                "weight_decay": (self.weight_decay >= 0, "at least 0"),
                **exemplars.rules(self),
                "context_length": (self.context_length >= 0, "at least 0"),
                "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation="none",
            optimizer=optim.optimizer(self.optimizer, self.lr, self.weight_decay),
            schedule=optim.schedule(self.schedule),
        )

    def learner(self, vit: Clip, task: Task) -> "ProofLearner":
        return ProofLearner(vit, task, self)


class Projections(nn.ModuleList):
    """The sum of linear layers, one for each task so far.

    The sum of linear layers is one linear layer: the cost of a row does not grow with the tasks.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__(nn.Linear(width, width) for _ in range(count))

    def collapsed(self) -> tuple[Tensor, Tensor]:
        """Weight [E, E] and bias [E] of the one layer that the sum is."""
        weights = torch.stack([layer.get_parameter("weight") for layer in self])
        biases = torch.stack([layer.get_parameter("bias") for layer in self])
        return weights.sum(0), biases.sum(0)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., E] of rows [..., E]."""
        return F.linear(rows, *self.collapsed())

    def freeze_old(self) -> None:
        """Trains the newest layer alone."""
        for layer in list(self)[:-1]:
            layer.requires_grad_(False)


class Attention(nn.Module):
    """One head of self-attention with a residual and a norm after it.

    Args:
        width: E.
        dropout: of the attention's weights, and of the output.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, E] of tokens [B, N, E]."""
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        weights = (query @ key.mT / tokens.shape[-1] ** 0.5).softmax(dim=-1)
        return self.norm(tokens + self.dropout(self.out(self.dropout(weights) @ value)))


class Fusion(nn.Module):
    """What PROOF adds to a frozen CLIP: tensors on features, without either tower.

    Args:
        width: E.
        tasks: T.
        classes: C.
        method: hyper-parameters.
    """

    prototypes: Tensor
    counts: Tensor

    def __init__(self, width: int, tasks: int, classes: int, method: PROOF) -> None:
        super().__init__()
        self.method = method
        self.images, self.texts = Projections(width, tasks), Projections(width, tasks)
        self.attention = Attention(width, method.dropout)
        self.context = nn.ParameterList(
            torch.randn(method.context_length, width) for _ in range(tasks)
        )
        # Means of the classes' frozen image features, and of how many.
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes))
        self.images.freeze_old()
        for earlier in list(self.context)[:-1]:
            earlier.requires_grad_(False)
        if method.freeze_text_projections:
            self.texts.freeze_old()

    def remember(self, features: Tensor, targets: Tensor) -> None:
        """Takes frozen features [N, E] of new images into the prototypes of their classes."""
        rows = F.normalize(features.float(), dim=1, eps=EPS)
        new = torch.zeros_like(self.counts).index_add_(0, targets, torch.ones_like(rows[:, 0]))
        total = self.prototypes * self.counts[:, None]
        total.index_add_(0, targets, rows)
        self.counts += new
        self.prototypes.copy_(total / self.counts.clamp(min=1)[:, None])

    def image(self, features: Tensor) -> Tensor:
        """Projected images [B, E] of frozen image features [B, E]."""
        return self.images(features.float())

    def text(self, features: Tensor) -> Tensor:
        """Projected texts [C, E] of unit length of frozen text features [C, P, E] of P templates.

        The mean over the templates' projections of unit length.
        """
        return unit(unit(self.texts(features.float())).mean(dim=1))

    def fused(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities [B, C] of images to texts and to prototypes, after the attention.

        Args:
            images: [B, E].
            texts: [C, E].
        """
        known = torch.cat([texts, unit(self.images(self.prototypes)), *self.context])
        tokens = torch.cat([images[:, None], known.expand(len(images), *known.shape)], dim=1)
        tokens = self.attention(tokens)
        image, classes = tokens[:, 0], len(texts)
        text, prototype = tokens[:, 1 : 1 + 2 * classes].split(classes, dim=1)
        # Differs from PROOF: their mean over the batch is taken only if asked for, because with it
        # an image's scores depend on its neighbours.
        if self.method.eval_selection == "batch_mean":
            count = batch_sum(image.new_tensor(float(len(image))))
            text, prototype = (batch_sum(part.sum(0)) / count for part in (text, prototype))
            return image @ text.T, image @ prototype.T
        by_text, by_prototype = (torch.einsum("bd,bkd->bk", image, p) for p in (text, prototype))
        return by_text, by_prototype

    def scores(self, features: Tensor, texts: Tensor) -> Tensor:
        """Scores [B, C] of frozen features [B, E] and [C, P, E]."""
        image, text = self.image(features), self.text(texts)
        # Differs from PROOF only if asked for: its images have unit length in training alone.
        if self.method.normalise_at_test:
            image = unit(image)
        by_text, by_prototype = self.fused(image, text)
        factors = self.method
        plain = factors.plain_scale * image @ text.T
        return plain + factors.text_scale * by_text + factors.prototype_scale * by_prototype

    def losses(
        self, features: Tensor, texts: Tensor, targets: Tensor, scale: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch, and its three terms.

        Args:
            features: [B, E], frozen.
            texts: [C, P, E], frozen; the first template is trained with.
            targets: columns [B].
            scale: logarithm of the factor on similarities of the contrastive term.
        """
        image, text = unit(self.image(features)), self.text(texts[:, :1])
        by_text, by_prototype = self.fused(image, text)
        terms = {
            "text": F.cross_entropy(by_text, targets),
            "contrast": contrast(image, text[targets], scale.float().exp()),
            "prototype": F.cross_entropy(by_prototype, targets),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class ProofLearner(Learner[Clip]):
    """CLIP's features of images and texts, and what is trained behind them.

    Args:
        vit: frozen; images come as queries, so that only its text tower is run, once.
        task: t.
        method: hyper-parameters.
    """

    needs_query = True

    def __init__(self, vit: Clip, task: Task, method: PROOF) -> None:
        super().__init__(vit, task)
        self.fusion = Fusion(vit.num_features, task.index + 1, task.seen, method)
        self.scale = nn.Parameter(vit.logit_scale.detach().clone())
        self._texts: Tensor | None = None

    def prepare(self, data: TaskImages) -> None:
        new = ~data.exemplars
        features = data.map(lambda images, query: given(query))[new]
        device = self.fusion.prototypes.device
        self.fusion.remember(features.to(device), data.targets[new].to(device))

    def texts(self) -> Tensor:
        """Frozen text features [C, P, E] of the classes in P templates, not of unit length."""
        if self._texts is None:
            names = self.task.names
            with torch.no_grad():
                parts = [
                    self.vit.text(self.vit.tokenise(phrases(names, template)))
                    for template in self.task.templates
                ]
            self._texts = torch.stack(parts, dim=1).float()
        return self._texts

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        with torch.autocast(targets.device.type, enabled=False):
            return self.fusion.losses(given(query), self.texts(), targets, self.scale)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        with torch.autocast(self.scale.device.type, enabled=False):
            return self.fusion.scores(given(query), self.texts())


def given(query: Tensor | None) -> Tensor:
    """The query, which is always there."""
    assert query is not None, "needs_query is set"
    return query.float()


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: cross-entropy of each image among the texts of the batch, and the reverse.

    The texts of two images of one class are negatives of each other, as in the authors' code. The
    batch is that of all workers together.

    Args:
        images: [B, E] of unit length.
        texts: [B, E] of unit length, the texts of the same rows.
        scale: factor on similarities.
    """
    every_image, own = batch_rows(images)
    every_text, _ = batch_rows(texts)
    by_image, by_text = scale * images @ every_text.T, scale * texts @ every_image.T
    return 0.5 * (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own))


def unit(rows: Tensor) -> Tensor:
    """Rows [..., E], scaled to length 1."""
    return F.normalize(rows, dim=-1, eps=EPS)
