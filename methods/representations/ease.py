"""EASE: an adapter for every task, and prototypes in the subspaces of all adapters."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import CosineHead, cosine, cross_entropy
from graftwork.methods.parts.peft import adapters


@dataclass(frozen=True, kw_only=True)
class EASE(Decayed, Epochs):
    """Trains a fresh adapter on every task; classes are prototypes in every adapter's subspace.

    Zhou et al., https://arxiv.org/abs/2403.12030. Defaults are the authors' for CIFAR-100.
    Prototypes of classes that came before an adapter are composed from those of later classes.

    Args:
        weight_decay: of the adapter and of the temporary classifier.
        bottleneck: hidden units of an adapter.
        dropout: of the hidden units.
        alpha: weight of all subspaces together in which a class was not trained.
        beta: weight of the untouched backbone's prototypes; 0 leaves them out.
    """

    batch_size: int = 48
    lr: float = 0.025
    bottleneck: int = 64
    dropout: float = 0.1
    alpha: float = 0.1
    beta: float = 0.0

    card: ClassVar[Card] = Card(
        title="EASE",
        paper="https://arxiv.org/abs/2403.12030",
        summary="A frozen adapter per task; cosine prototypes in all their subspaces. "
        "A class that occurs again is averaged over the subspaces that it was trained in.",
        memory="T * (adapter + C * D + C) floats; T forward passes per image",
        growth="tasks",
        apart=True,
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "bottleneck": (self.bottleneck >= 1, "at least 1"),
                "dropout": (0 <= self.dropout < 1, "between 0 and below 1"),
                "alpha": (self.alpha >= 0, "at least 0"),
                "beta": (self.beta >= 0, "at least 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "EASELearner":
        return EASELearner(vit, task, self)


class Space(nn.Module):
    """A task's adapter, and the prototypes of all classes in its subspace.

    Args:
        vit: frozen.
        bottleneck: hidden units.
        dropout: of the hidden units.
        classes: C.
    """

    prototypes: Tensor
    """Class means [C, D]; composed ones where `count` is 0."""
    count: Tensor
    """Images [C] that a class's mean was taken over."""

    def __init__(
        self, vit: VisionTransformer, bottleneck: int, dropout: float, classes: int
    ) -> None:
        super().__init__()
        self.adapters = adapters(vit, bottleneck, dropout)
        self.register_buffer("prototypes", torch.zeros(classes, vit.num_features))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))


class EASELearner(Learner):
    """A frozen ViT, the adapters of all tasks, of which the last is trained, and prototypes.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    plain: Tensor
    """Prototypes [C, D] of the untouched backbone, if they count."""
    place: Tensor
    """Of a column among the current ones [C]."""

    def __init__(self, vit: VisionTransformer, task: Task, method: EASE) -> None:
        super().__init__(vit, task)
        self._alpha, self._beta = method.alpha, method.beta
        classes, width = task.seen, vit.num_features
        # Named by their task: nothing of an earlier one grows but the rows of its prototypes.
        self.spaces = nn.ModuleList(
            Space(vit, method.bottleneck, method.dropout, classes) for _ in range(task.index + 1)
        )
        for space in self.spaces[:-1]:
            space.requires_grad_(False)
        if method.beta:
            self.register_buffer("plain", torch.zeros(classes, width))
        self.proxy: CosineHead | None = CosineHead(width, len(task.current))
        place = torch.zeros(classes, dtype=torch.int64)
        place[list(task.current)] = torch.arange(len(task.current))
        self.register_buffer("place", place, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert self.proxy is not None
        scores = self.proxy(self._through(self._all()[-1], images))
        return {"loss": cross_entropy(scores.float(), self.place[targets], self.task)}

    def finish(self, data: TaskImages) -> None:
        self.proxy = None  # served the training of this adapter alone: nothing to store
        device, index = self.place.device, self.place.new_tensor(self.task.current)
        features = data.map(lambda images, query: self.subspaces(images).flatten(1)).to(device)
        targets = data.targets.to(device)
        new = torch.bincount(targets, minlength=self.task.seen)[index]
        old = self._counts()[:, index]
        sums = features.new_zeros(self.task.seen, features.shape[1], dtype=torch.float64)
        sums.index_add_(0, targets, features.double())
        means = (sums[index] / new[:, None]).unflatten(1, (-1, self.network.num_features))

        def pooled(kept: Tensor, number: int, before: Tensor) -> None:
            # An image of an earlier task counts if it was seen in this subspace at all.
            share = (new / (new + before))[:, None]
            kept[index] = (kept[index] + share * (means[:, number] - kept[index])).float()

        for number, space in enumerate(self._all()):
            pooled(space.prototypes, number, old[number])
            space.count[index] += new
        if self._beta:
            pooled(self.plain, len(old), old[0])
        self._compose()

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        features, counts = self.subspaces(images).unbind(1), self._counts()
        # Cosines close to 1 are all alike in bfloat16.
        with torch.autocast(images.device.type, enabled=False):
            scores = sum(
                weight * cosine(feature.float(), space.prototypes)
                for weight, feature, space in zip(
                    weights(counts, self._alpha), features, self._all(), strict=False
                )
            )
            if self._beta:
                scores = scores + self._beta * cosine(features[-1].float(), self.plain)
        assert isinstance(scores, Tensor)
        return scores

    def subspaces(self, images: Tensor) -> Tensor:
        """Features [B, S, D] of every task's adapter, and of the plain backbone if it counts."""
        features = [self._through(space, images) for space in self._all()]
        if self._beta:
            features.append(self._through(None, images))
        return torch.stack(features, dim=1)

    def _through(self, space: Space | None, images: Tensor) -> Tensor:
        own = None if space is None else list(space.adapters)
        return read_out(self.network, forward_tokens(self.network, images, adapters=own))

    def _all(self) -> list[Space]:
        return list(self.spaces)  # type: ignore[arg-type]

    def _counts(self) -> Tensor:
        return torch.stack([space.count for space in self._all()])

    def _compose(self) -> None:
        """Gives every class a prototype in the subspaces that are newer than its images."""
        counts = self._counts()
        newest = (counts > 0).sum(dim=0) - 1
        for number, space in enumerate(self._all()):
            known = counts[number] > 0
            for task in newest[~known].unique().tolist():
                lacking = ~known & (newest == task)
                own = self._all()[task].prototypes
                space.prototypes[lacking] = compose(
                    own[lacking], own[known], space.prototypes[known]
                )


def compose(own: Tensor, similar: Tensor, there: Tensor) -> Tensor:
    """Prototypes [A, D] in a subspace where a class has no images.

    Args:
        own: of these classes in their own subspace [A, D].
        similar: of later classes in that same subspace [B, D].
        there: of the later classes in the subspace in question [B, D].
    """
    return F.softmax(cosine(own, similar), dim=1) @ there


def weights(counts: Tensor, alpha: float) -> Tensor:
    """Weights of a subspace's cosine for a class [S, C].

    1 together for the subspaces that the class was trained in, and `alpha` together, divided by
    the number of earlier tasks, for the others.

    Args:
        counts: images [S, C] of a class that were seen in a subspace: all since its task.
    """
    later = torch.cat([counts[1:], torch.zeros_like(counts[:1])])
    own = counts > later
    other = alpha / max(len(counts) - 1, 1)
    return torch.where(own, 1 / own.sum(dim=0).clamp(min=1), other)
