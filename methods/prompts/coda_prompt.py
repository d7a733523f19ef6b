"""CODA-Prompt: prompts composed of weighted components, which all learn from one loss.

Shapes: B batch, D width, L prompt length (keys and values together), R blocks with prompts,
M components so far, n of them new, C classes seen, H heads, K = D / H.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import LATER, require
from graftwork.methods.contracts.stream import Room, StreamNeeds
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import Prefix, forward_tokens, heads, read_out
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import EPS, LinearHead, current_cross_entropy

Orthogonalisation = Literal["least_squares", "sequential"]


@dataclass(frozen=True, kw_only=True)
class CodaPrompt(Epochs):
    """Adds prompt components with every task and freezes the old ones; no hard selection.

    Smith et al., https://arxiv.org/abs/2211.13218. Defaults are those of the authors' code for
    CIFAR-100 in 10 tasks; for ImageNet-R it trains 50 epochs, for DomainNet 5.

    Args:
        batch_size: images per step, of all workers together; a smaller last batch is left out.
        pool_size: components of all tasks together; each task gets an equal share, so that it
            must be at least the number of tasks, which has to be known. Components beyond the
            width of the ViT cannot be orthogonal to all others and start in random directions.
        components_per_task: new components of each task, for streams that may grow; the pool is
            then as large as it gets, and `pool_size` is not read.
        prompt_length: vectors of a component, half of them keys, half values; even.
        layers: blocks with prompts, from the first.
        mu: weight of the penalty on components, keys and masks that are not orthogonal.
        gs: how new components are made orthogonal to the old ones: exactly, or as in the
            authors' code, which takes the projection on each old one although these are no longer
            orthogonal to each other.
    """

    lr: float = 1e-3
    optimizer: optim.OptimizerName = "adam"
    schedule: optim.ScheduleName = "half_cosine"
    augmentation: Augmentation = "imagenet"
    pool_size: int = 100
    prompt_length: int = 8
    layers: int = 5
    mu: float = 0.0
    gs: Orthogonalisation = "least_squares"
    components_per_task: int | None = field(default=None, metadata=LATER)

    card: ClassVar[Card] = Card(
        title="CODA-Prompt",
        paper="https://arxiv.org/abs/2211.13218",
        summary="Prefixes are sums of components weighted by attention; new ones for every task.",
        memory="layers * pool_size * (prompt_length + 2) * D floats in all, with a pool of T * n "
        "if components_per_task is n; C * (D + 1) of head",
        uses_seed=True,
        query=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "pool_size": (self.pool_size >= 1, "at least 1"),
                "prompt_length": (
                    self.prompt_length >= 2 and self.prompt_length % 2 == 0,
                    "even and at least 2",
                ),
                "layers": (self.layers >= 1, "at least 1"),
                "mu": (self.mu >= 0, "at least 0"),
                "components_per_task": (
                    self.components_per_task is None or self.components_per_task >= 1,
                    "at least 1",
                ),
            },
        )

    def stream_needs(self) -> StreamNeeds:
        if self.components_per_task is not None:
            return StreamNeeds()
        return StreamNeeds(count=True, room=Room(field="pool_size", size=self.pool_size))

    def recipe(self, task: Task) -> Recipe:
        # No weight decay: it would shrink the frozen components, which share their tensor with the
        # new ones.
        return replace(usual_recipe(self), drop_last=True)

    def share(self, task: Task) -> int:
        """New components of each task of the stream.

        Raises:
            ValueError: there are more tasks than components, or nobody knows how many tasks.
        """
        if self.components_per_task is not None:
            return self.components_per_task
        count = task.counted()
        # Planning knows how long the stream is, and has refused it.
        if self.pool_size < count:
            raise ValueError(
                f"pool_size: must be at least the number of tasks, {count}, got {self.pool_size}"
            )
        return self.pool_size // count

    def learner(self, vit: VisionTransformer, task: Task) -> "CodaPromptLearner":
        return CodaPromptLearner(vit, task, self)


class CodaPromptLearner(Learner):
    """Components, keys and masks of all tasks so far, and a linear head that grows.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.

    Raises:
        ValueError: more tasks than components, or fewer blocks than `layers`.
    """

    needs_query: ClassVar[bool] = True

    def __init__(self, vit: VisionTransformer, task: Task, method: CodaPrompt) -> None:
        super().__init__(vit, task)
        self._method = method
        if method.layers > len(vit.blocks):
            raise ValueError(
                f"layers: must be at most the ViT's {len(vit.blocks)} blocks, got {method.layers}"
            )
        self._share = method.share(task)
        rows, width = (task.index + 1) * self._share, vit.embed_dim
        # Rows that were not drawn yet are zero and weigh nothing.
        shape = (rows, method.layers, method.prompt_length, width)
        self.components = nn.Parameter(torch.zeros(shape))
        self.keys = nn.Parameter(torch.zeros(rows, method.layers, width))
        self.masks = nn.Parameter(torch.zeros(rows, method.layers, width))
        self.head = LinearHead(width, task.seen)

    def begin(self) -> None:
        with torch.no_grad():
            for layer in range(self._method.layers):
                for tensor in (self.keys, self.masks, self.components):
                    rows = tensor[:, layer].flatten(1)
                    # Drawn on the CPU, so that one seed gives one start on every device.
                    draws = torch.randn(self._share, rows.shape[1]).to(rows)
                    new = orthogonal_rows(rows[: -self._share], draws, self._method.gs)
                    tensor[-self._share :, layer] = new.view_as(tensor[-self._share :, layer])

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert query is not None
        components, keys, masks = (
            self._active(t) for t in (self.components, self.keys, self.masks)
        )
        scores = self.head(self._features(images, query, components, keys, masks))
        entropy = current_cross_entropy(scores, targets, self.task)
        if not self._method.mu:
            return {"loss": entropy}
        penalty = torch.stack(
            [
                overlap(tensor[:, layer].flatten(1))
                for layer in range(self._method.layers)
                for tensor in (components, keys, masks)
            ]
        ).sum()
        return {
            "loss": entropy + self._method.mu * penalty,
            "cross_entropy": entropy,
            "penalty": penalty,
        }

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None
        return self.head(self._features(images, query, self.components, self.keys, self.masks))

    def _active(self, tensor: Tensor) -> Tensor:
        """All rows, of which only the current task's carry a gradient."""
        return torch.cat([tensor[: -self._share].detach(), tensor[-self._share :]])

    def _features(
        self, images: Tensor, query: Tensor, components: Tensor, keys: Tensor, masks: Tensor
    ) -> Tensor:
        prefixes: list[Prefix | None] = [None] * len(self.network.blocks)
        count, size = heads(self.network)
        for layer in range(self._method.layers):
            weights = attention_weights(query, keys[:, layer], masks[:, layer])
            prompt = torch.einsum("bm,mld->bld", weights, components[:, layer])
            prompt = prompt.unflatten(2, (count, size)).transpose(1, 2)  # [B, H, L, K]
            key, value = prompt.chunk(2, dim=2)
            prefixes[layer] = key, value
        return read_out(self.network, forward_tokens(self.network, images, prefixes=prefixes))


def attention_weights(query: Tensor, keys: Tensor, masks: Tensor) -> Tensor:
    """Weights [B, M]: cosine between each component's masked query and its key, in [-1, 1].

    Written as products of matrices, so that no [B, M, D] is made; in float32.

    Args:
        query: [B, D].
        keys: [M, D].
        masks: [M, D].
    """
    with torch.autocast(query.device.type, enabled=False):
        query, masks = query.float(), masks.float()
        products = query @ (masks * F.normalize(keys.float(), dim=1, eps=EPS)).T
        squares = query.square() @ masks.square().T
        return products / squares.clamp_min(EPS**2).sqrt()


def overlap(rows: Tensor) -> Tensor:
    """Mean square of the difference between the Gram matrix of rows [M, W] and the identity."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.float()
        return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()


def orthogonal_rows(old: Tensor, draws: Tensor, gs: Orthogonalisation) -> Tensor:
    """Unit rows [n, W] in the directions of `draws`, less what lies along earlier rows.

    Args:
        old: [M - n, W], rows of earlier tasks as trained.
        draws: [n, W], random.
        gs: least squares takes away the part in the span of the earlier rows; sequential the
            projection on each of them, which is the same only while they are orthogonal.
    """
    basis = old.double()
    if gs == "least_squares" and len(old):
        basis = torch.linalg.qr(basis.T).Q.T
    new = []
    for draw in draws.double():
        rest = draw
        # Differs from GT-RIPL/CODA-Prompt: an earlier row of zeros has no direction to take away,
        # because drawing again, as there, would never end.
        squares = basis.square().sum(1).clamp_min(1e-8)
        for _ in range(2 if gs == "least_squares" else 1):  # twice against rounding
            rest = rest - (basis @ rest / squares) @ basis
        if rest.norm() > 1e-6 * draw.norm():
            basis = torch.cat([basis, rest[None] / rest.norm()])
        else:
            rest = draw  # the earlier rows span everything
        new.append(rest / rest.norm())
    return torch.stack(new).to(draws.dtype)
