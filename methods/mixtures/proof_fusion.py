"""Additions of PROOF to a frozen CLIP: projections, an attention, prototypes; on features alone.

Shapes: B batch, N rows, C classes seen, P templates, E joint width, T tasks so far.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.collectives import batch_rows, batch_sum
from graftwork.methods.parts.heads import EPS, cross_entropy


class Factors(Protocol):
    """The hyper-parameters that the fusion reads; `PROOF` documents them."""

    @property
    def context_length(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def eval_selection(self) -> str: ...
    @property
    def freeze_text_projections(self) -> bool: ...
    @property
    def normalise_at_test(self) -> bool: ...
    @property
    def plain_scale(self) -> float: ...
    @property
    def text_scale(self) -> float: ...
    @property
    def prototype_scale(self) -> float: ...


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
    """Additions of PROOF to a frozen CLIP: tensors on features, without either tower.

    Args:
        width: E.
        tasks: T.
        classes: C.
        method: hyper-parameters.
    """

    counting_buffers = ("counts",)
    prototypes: Tensor
    counts: Tensor

    def __init__(self, width: int, tasks: int, classes: int, method: Factors) -> None:
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
        self, features: Tensor, texts: Tensor, targets: Tensor, scale: Tensor, task: Task
    ) -> dict[str, Tensor]:
        """The loss of a batch, and its three terms.

        Args:
            features: [B, E], frozen.
            texts: [C, P, E], frozen; the first template is trained with.
            targets: columns [B].
            scale: logarithm of the factor on similarities of the contrastive term.
            task: the task.
        """
        image, text = unit(self.image(features)), self.text(texts[:, :1])
        by_text, by_prototype = self.fused(image, text)
        terms = {
            "text": cross_entropy(by_text, targets, task),
            "contrast": contrast(image, text[targets], scale.float().exp()),
            "prototype": cross_entropy(by_prototype, targets, task),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


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
