"""DAP: prompts that a small network in every block makes of the image's own tokens.

Shapes: B batch, N tokens, D width, P prompt length, E width of a task's embedding, T tasks so far,
C classes seen.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import DeepPrompt, forward_tokens, read_out
from graftwork.methods.parts import entries, optim
from graftwork.methods.parts.epochs import Clipped, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import EPS, LinearHead, current_cross_entropy
from graftwork.methods.parts.prompt_tokens import uniform_bound
from graftwork.methods.prompts.selection import Vote, voters

FAR = -1e11
"""Logit of a class that is ruled out."""


@dataclass(frozen=True, kw_only=True)
class DAP(Clipped, Epochs):
    """Generates the prompts of every block from the image, modulated by its inferred task.

    Jung et al., "Generating Instance-level Prompts for Rehearsal-free Continual Learning",
    ICCV 2023, https://github.com/naver-ai/dap-cl.

    Defaults are those of the authors' code for CIFAR-100 in 10 tasks, except that every image
    decides alone which task it belongs to, and for `pull`. For ImageNet-R it has `epochs: 20`,
    `lr: 0.25`, `optimizer: sgd`, `shuffle: false`, `prompt_length: 30`, `embedding: 64`,
    `pull: 256`, `skip_last_block: true`, and masks the logits. Its images are those of the spec's
    preprocessing `dap_224`, without augmentation.

    Args:
        shuffle: draw a new order in every epoch; otherwise the data set's own.
        prompt_length: P, prompt tokens of a block.
        embedding: E, width of a task's embedding.
        pull: weight of the mean cosine between the images' features and their task's key. The
            authors' code counts every image once for each image of the batch, so that its 0.1 is
            12.8 here; this matters only where gradients are clipped.
        head_std: standard deviation of new rows of the classifier; the authors' is the square
            root of 2 / classes of the whole stream.
        down_init: start of the map from tokens to prompts. From zero, as published, all prompts
            of a block start equal, get equal gradients and stay copies of one token.
        skip_last_block: no prompts in the last block.
        eval_selection: the task of an image is its own nearest key, or the one that most images
            of the test batch vote for, as published, in batches of `batch_size` of each task; a
            vote leaks what its neighbours are.
        mask_to_inferred_task: rule out all classes but those of the inferred task.
    """

    epochs: int = 5
    optimizer: optim.OptimizerName = "amsgrad"
    schedule: optim.ScheduleName = "constant"
    clip: float = 1.0
    augmentation: Augmentation = "none"
    shuffle: bool = True
    prompt_length: int = 10
    embedding: int = 16
    pull: float = 0.1
    head_std: float = 0.1414
    down_init: Literal["zero", "small"] = "zero"
    skip_last_block: bool = False
    eval_selection: Vote = "instance"
    mask_to_inferred_task: bool = False

    card: ClassVar[Card] = Card(
        title="DAP",
        paper="https://github.com/naver-ai/dap-cl",
        summary="Every block makes prompts of the image's tokens, for the task nearest to it.",
        memory="blocks * (N * P + 2 * D * (E + 2)) floats; T * (D + E) of keys and embeddings; "
        "C * (D + 1) of head",
        version=2,
        growth="tasks",
        uses_seed=True,
        query=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "prompt_length": (self.prompt_length >= 0, "at least 0"),
                "embedding": (self.embedding >= 1, "at least 1"),
                "pull": (self.pull >= 0, "at least 0"),
                "head_std": (self.head_std > 0, "above 0"),
            },
        )

    def neighbours(self) -> Neighbours | None:
        return voters(self.eval_selection, self.batch_size)

    def recipe(self, task: Task) -> Recipe:
        # No weight decay: it would move the keys and embeddings of earlier tasks.
        return replace(usual_recipe(self), shuffle=self.shuffle)

    def learner(self, vit: VisionTransformer, task: Task) -> "DAPLearner":
        return DAPLearner(vit, task, self)


class Generator(nn.Module):
    """Makes the prompts of one block: norm, a linear map along the token axis, FiLM.

    Args:
        tokens: N.
        width: D.
        method: hyper-parameters.
    """

    def __init__(self, tokens: int, width: int, method: DAP) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(tokens, method.prompt_length)
        self.film = nn.Linear(method.embedding, 2 * width)
        nn.init.zeros_(self.down.bias)
        if method.down_init == "zero":
            nn.init.zeros_(self.down.weight)
        else:
            nn.init.trunc_normal_(self.down.weight, std=0.02)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Prompts [B, P, D] of the tokens [B, N, D] entering the block.

        Args:
            embedding: [B or 1, E], of the images' task.
        """
        mixed = self.down(self.norm(tokens).mT)  # [B, D, P]
        gain, shift = (_direction(part) for part in self.film(embedding).float().chunk(2, dim=1))
        return (gain[:, :, None] * mixed + shift[:, :, None]).mT


class DAPLearner(Learner):
    """A generator per block; a key and an embedding per task; a linear head that grows.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    needs_query: ClassVar[bool] = True
    classes: Tensor
    """Task and column of each class of each task [E, 2] int64."""

    def __init__(self, vit: VisionTransformer, task: Task, method: DAP) -> None:
        super().__init__(vit, task)
        self._method = method
        width, tokens = vit.embed_dim, vit.patch_embed.num_patches + vit.num_prefix_tokens
        count = (len(vit.blocks) - method.skip_last_block) if method.prompt_length else 0
        self.generators = nn.ModuleList(Generator(tokens, width, method) for _ in range(count))
        self.embeddings = nn.Parameter(torch.randn(task.index + 1, method.embedding))
        bound = uniform_bound(vit)
        self.keys = nn.Parameter(torch.empty(task.index + 1, width).uniform_(-bound, bound))
        self.head = LinearHead(width, task.seen)
        # Differs from naver-ai/dap-cl: the spread is a hyper-parameter, because the number of
        # classes of the whole stream, which gives it there, is not known.
        nn.init.normal_(self.head.weight, std=method.head_std)
        nn.init.constant_(self.head.bias, math.log(0.01 / 0.99))
        self.register_buffer("classes", entries.pairs(task, entries.usual(task)))

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        given = dict(stored)
        if (ranges := given.pop("columns", None)) is not None:
            # States of version 1 have the first column of each task's classes, and the end of them.
            ids = [(t, c) for t, (a, b) in enumerate(ranges.tolist()) for c in range(a, b)]
            given["classes"] = torch.tensor(ids)
        before = entries.earlier(given["classes"][:, 0], self.task)
        own = entries.pairs(self.task, before)
        self.register_buffer("classes", own.to(self.classes.device))
        return given

    def begin(self) -> None:
        if self.task.index:
            for generator in self.generators:
                generator.get_submodule("down").requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert query is not None
        task = torch.full((1,), self.task.index, device=images.device)
        scores = self.head(self._features(images, task))
        entropy = current_cross_entropy(scores, targets, self.task)
        pull = self._similarity(query)[:, -1].mean()
        return {
            "loss": entropy - self._method.pull * pull,
            "cross_entropy": entropy,
            "pull": pull,
        }

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None
        task = self.inferred(query)
        scores = self.head(self._features(images, task))
        if not self._method.mask_to_inferred_task:
            return scores
        inside = torch.zeros_like(scores[:1], dtype=torch.bool).repeat(self.task.index + 1, 1)
        inside[self.classes[:, 0], self.classes[:, 1]] = True
        return scores.float().where(inside[task], FAR)

    def inferred(self, query: Tensor) -> Tensor:
        """Task [B] of each image, or of the batch; never one that was not learned yet."""
        nearest = self._similarity(query).argmax(dim=1)
        if self._method.eval_selection == "instance":
            return nearest
        votes = torch.bincount(nearest, minlength=self.task.index + 1)
        return (votes == votes.max()).nonzero()[0].expand(len(query))

    def _similarity(self, query: Tensor) -> Tensor:
        """Cosines [B, T] of queries and keys, in float32."""
        with torch.autocast(query.device.type, enabled=False):
            query = F.normalize(query.float(), dim=1, eps=EPS)
            return query @ F.normalize(self.keys, dim=1, eps=EPS).T

    def _features(self, images: Tensor, task: Tensor) -> Tensor:
        embedding = self.embeddings[task]
        prompts: list[DeepPrompt | None] = [None] * len(self.network.blocks)
        for number, generator in enumerate(self.generators):
            prompts[number] = _prompt(generator, embedding)
        return read_out(self.network, forward_tokens(self.network, images, deep_prompts=prompts))


def _prompt(generator: nn.Module, embedding: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tokens: generator(tokens, embedding)


def _direction(vectors: Tensor) -> Tensor:
    """Vectors [B, D] over their norms, which pass no gradient."""
    return vectors / vectors.detach().norm(dim=1, keepdim=True)
