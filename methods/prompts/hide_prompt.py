"""HiDe-Prompt: the task of an image, the classes within it, and their balance, learned apart.

Shapes: B batch, D width, H heads, K = D / H, L prefix length, R blocks with a prefix, T tasks so
far, C classes seen, E entries: classes of each task, so that E = C if no class occurs again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import Prefix, forward_tokens, heads, read_out
from graftwork.methods.parts import entries, optim
from graftwork.methods.parts.epochs import Clipped, Steps, rules
from graftwork.methods.parts.heads import cross_entropy, current_cross_entropy, linear_head
from graftwork.methods.prompts.contrast import contrast
from graftwork.methods.prompts.gaussian_mixtures import Mixtures, Statistics, align


@dataclass(frozen=True, kw_only=True)
class HiDePrompt(Clipped, Steps):
    """Infers an image's task by a network on frozen features, then classifies it with its prefix.

    Wang et al., https://arxiv.org/abs/2310.07234. Defaults are those of the authors' code for
    CIFAR-100 (thu-ml/HiDe-Prompt), on 8 GPUs with 24 images each; it scales learning rates by
    24 / 256 all the same. For ImageNet-R it has `prompt_length: 20`, `contrast_weight: 0.5`,
    `schedule: cosine`, `epochs: 150` and `augmentation: lamda`.

    Args:
        epochs: passes over the images of a task, for the prefix and the inference of tasks alike.
        lr: learning rate of a task's prefix.
        head_lr_scale: learning rate of the classifier as a part of `lr`.
        tii_lr: learning rate of the task inference.
        optimizer: optimiser, new for every task; without decay, which would move what belongs to
            earlier tasks.
        schedule: learning rates over the epochs of a task; milestone divides them by 10 once.
        milestone: epoch from which on the learning rates are a tenth, with that schedule.
        prompt_length: L, keys, and as many values, of a task's prefix.
        first_block: first block with a prefix, from 0.
        last_block: last block with a prefix.
        prompt_momentum: part of the mean of earlier tasks' prefixes in a task's own.
        contrast_weight: of the term that keeps features apart from each other and from the stored
            means of earlier classes.
        contrast_temperature: that similarities are divided by in this term.
        statistics: what is stored of a class, among features and among prompted features.
        centroids: components that are stored of a class, with centroids.
        alignment_epochs: passes of both alignments after each task but the first; 0 leaves them
            out.
        alignment_lr: learning rate of the classifier in its alignment.
        samples_per_class: prompted features drawn of each component in each of these passes, and
            size of a batch there.
        tii_alignment_lr: learning rate of the task inference in its alignment.
        tii_samples_per_class: features drawn of each component for it, and size of a batch.
        kv_layout: scrambled mimics the authors' code, which mixes the keys and values of the images
            of a batch, also at test time and for what is stored of the classes: no use but to
            reproduce it.
        test_batch: images of one task, or of one class for what is stored of it, that are forwarded
            together with that layout; without it no image sees another one.
        augmentation: of the training images.
    """

    epochs: int = 50
    batch_size: int = 192
    lr: float = 0.0028125
    head_lr_scale: float = 0.1
    tii_lr: float = 4.6875e-5
    optimizer: optim.OptimizerName = "adam"
    schedule: Literal["milestone", "constant", "cosine", "half_cosine"] = "milestone"
    # timm's scheduler is told of an epoch after it, hence one later than every 30 epochs.
    milestone: int = 31
    clip: float = 1.0
    prompt_length: int = 5
    first_block: int = 0
    last_block: int = 4
    prompt_momentum: float = 0.01
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.8
    statistics: Statistics = "centroids"
    centroids: int = 10
    alignment_epochs: int = 30
    alignment_lr: float = 0.005
    samples_per_class: int = 120
    tii_alignment_lr: float = 4.6875e-4
    tii_samples_per_class: int = 24
    kv_layout: Literal["correct", "scrambled"] = "correct"
    test_batch: int = 24
    augmentation: Augmentation = "slca"

    card: ClassVar[Card] = Card(
        title="HiDe-Prompt",
        paper="https://arxiv.org/abs/2310.07234",
        summary="A prefix per task, chosen by a classifier of tasks on frozen features; both "
        "classifiers are aligned on features sampled from what is stored of the classes.",
        memory="2 * T * R * L * D floats of prefixes; 4 * D * D + 5 * D of task inference; "
        "(C + E) * (D + 1) of classifiers; 2 * E * k * (2 * D + 1) + 2 * E numbers of statistics "
        "with k centroids (1 with variances), 2 * E * (D * D + D + 1) + 2 * E with covariances; "
        "E = C, or T * C if "
        "domain-incremental",
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
                "head_lr_scale": (self.head_lr_scale > 0, "above 0"),
                "tii_lr": (self.tii_lr > 0, "above 0"),
                "milestone": (self.milestone >= 0, "at least 0"),
                "prompt_length": (self.prompt_length >= 1, "at least 1"),
                "first_block": (self.first_block >= 0, "at least 0"),
                "last_block": (self.last_block >= self.first_block, "at least first_block"),
                "prompt_momentum": (0 <= self.prompt_momentum < 1, "from 0 to below 1"),
                "contrast_weight": (self.contrast_weight >= 0, "at least 0"),
                "contrast_temperature": (self.contrast_temperature > 0, "above 0"),
                "centroids": (self.centroids >= 1, "at least 1"),
                "alignment_epochs": (self.alignment_epochs >= 0, "at least 0"),
                "alignment_lr": (self.alignment_lr > 0, "above 0"),
                "samples_per_class": (self.samples_per_class >= 1, "at least 1"),
                "tii_alignment_lr": (self.tii_alignment_lr > 0, "above 0"),
                "tii_samples_per_class": (self.tii_samples_per_class >= 1, "at least 1"),
                "test_batch": (self.test_batch >= 1, "at least 1"),
            },
        )

    def neighbours(self) -> Neighbours | None:
        return Neighbours(size=self.test_batch) if self.kv_layout == "scrambled" else None

    def recipe(self, task: Task) -> Recipe:
        # Differs from the authors' code, which trains the task inference in a run of its own, for
        # 20 epochs, with a constant learning rate and gradients clipped on their own: one pass
        # over the images serves both, whose parameters and losses have nothing in common. Only
        # the clipping couples them, and Adam makes little of the scale of a gradient.
        if self.schedule == "milestone":
            schedule = optim.milestone(self.milestone)
        else:
            schedule = optim.schedule(self.schedule)
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            optimizer=optim.optimizer(self.optimizer, self.lr),
            schedule=schedule,
            clip=self.clip,
        )

    def learner(self, vit: VisionTransformer, task: Task) -> "HiDePromptLearner":
        """A new learner for a task.

        Raises:
            ValueError: the ViT has fewer blocks than the prefixes are for.
        """
        if self.last_block >= len(vit.blocks):
            raise ValueError(
                f"last_block: must be below {len(vit.blocks)}, the number of the backbone's "
                f"blocks, got {self.last_block}"
            )
        return HiDePromptLearner(vit, task, self)


class TaskInference(nn.Module):
    """Scores of entries by frozen features: a residual layer, its norm, a linear head.

    Args:
        width: D.
        entries: E.
    """

    def __init__(self, width: int, entries: int) -> None:
        super().__init__()
        self.up = linear_head(width, 2 * width)
        self.down = linear_head(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = linear_head(width, entries)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, E] of features [B, D], in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            rows = features.float()
            return self.head(self.norm(rows + self.down(F.gelu(self.up(rows)))))


class HiDePromptLearner(Learner):
    """The prefixes, the task inference, a linear head that grows, and what is kept of classes.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    needs_query: ClassVar[bool] = True

    entries: Tensor
    """Task and column of each entry [E, 2] int64."""
    place: Tensor
    """Position of each column [C] among those of the task."""

    def __init__(self, vit: VisionTransformer, task: Task, method: HiDePrompt) -> None:
        super().__init__(vit, task)
        self._method, self._own = method, len(task.current)
        width, blocks = vit.num_features, method.last_block - method.first_block + 1
        before = entries.usual(task)
        # Axis 1: block; next: key or value.
        shape = (task.index + 1, blocks, 2, method.prompt_length, *heads(vit))
        self.e = nn.Parameter(torch.empty(shape).uniform_(-1, 1))
        self.head = linear_head(width, task.seen)
        self.tii = TaskInference(width, before + self._own)
        self._hold(before)
        place = torch.zeros(task.seen, dtype=torch.int64)
        place[list(task.current)] = torch.arange(self._own)
        self.register_buffer("place", place, persistent=False)

    def _hold(self, before: int) -> None:
        """Makes place for what is kept of the classes of earlier tasks and of this one."""
        method, number, width = self._method, before + self._own, self.network.num_features
        self.plain = Mixtures(number, width, method.statistics, method.centroids)
        self.prompted = Mixtures(number, width, method.statistics, method.centroids)
        self.register_buffer("entries", entries.pairs(self.task, before))

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        before = entries.earlier(stored["entries"][:, 0], self.task)
        if before + self._own != len(self.entries):
            device = self.entries.device
            self.tii.head = linear_head(self.network.num_features, before + self._own)
            self._hold(before)
            self.to(device)
        return stored

    def begin(self) -> None:
        """Starts the task's prefix as a copy of the one before."""
        if now := self.task.index:
            self.e.detach()[now].copy_(self.e.detach()[now - 1])

    def groups(self) -> list[dict[str, Any]]:
        method = self._method
        return [
            {"params": [self.e]},
            {"params": list(self.head.parameters()), "lr": method.lr * method.head_lr_scale},
            {"params": list(self.tii.parameters()), "lr": method.tii_lr},
        ]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert query is not None
        method = self._method
        features = self._features(images, self.mixed())
        entropy = current_cross_entropy(self.head(features), targets, self.task)
        tii = cross_entropy(self.tii(query)[:, -self._own :], self.place[targets], self.task)
        means = self.prompted.means()
        apart = contrast(means, features.float(), method.contrast_temperature)
        loss = entropy + method.contrast_weight * apart + tii
        return {"loss": loss, "cross_entropy": entropy, "contrast": apart, "task_inference": tii}

    def finish(self, data: TaskImages) -> None:
        now = self.task.index
        with torch.no_grad():
            self.e[now] = self.mixed()[0]
        places = self.place.cpu()[data.targets.cpu()]
        rows = data.map(self._both, self._batches(places))
        for mixtures, features in zip((self.plain, self.prompted), rows.unbind(1), strict=True):
            mixtures.measure(features, places, self._own)
        method, steps = self._method, len(self.entries) - self._own
        if not now or not method.alignment_epochs:
            return
        align(
            self.plain,
            torch.arange(len(self.entries), device=self.entries.device),
            self.tii,
            list(self.tii.parameters()),
            lr=method.tii_alignment_lr,
            epochs=method.alignment_epochs,
            size=method.tii_samples_per_class,
            steps=steps,
        )
        align(
            self.prompted,
            self.entries[:, 1],
            self.head,
            list(self.head.parameters()),
            lr=method.alignment_lr,
            epochs=method.alignment_epochs,
            size=method.samples_per_class,
            steps=steps,
        )

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None
        return self.head(self._features(images, self.e[self.inferred(query)]))

    def inferred(self, query: Tensor) -> Tensor:
        """Task [B] of the entry that scores highest for queries [B, D]."""
        return self.entries[self.tii(query).argmax(dim=1), 0]

    def mixed(self) -> Tensor:
        """The task's prefix as it is trained [1, R, 2, L, H, K]: with some of earlier ones."""
        now, part = self.task.index, self._method.prompt_momentum
        own = self.e[now : now + 1]
        if not now or not part:
            return own
        return (1 - part) * own + part * self.e[:now].detach().mean(dim=0, keepdim=True)

    def prefixes(self, own: Tensor, batch: int) -> list[Prefix | None]:
        """Keys and values in front of each attention, of prefixes [B or 1, R, 2, L, H, K]."""
        found: list[Prefix | None] = [None] * len(self.network.blocks)
        own = own.permute(1, 2, 0, 4, 3, 5)  # [R, 2, B or 1, H, L, K]
        if self._method.kv_layout == "scrambled":
            own = own.expand(-1, -1, batch, -1, -1, -1)
            own = own.reshape(len(own), batch, 2, *own.shape[3:]).transpose(1, 2)
        for block, (key, value) in enumerate(own, self._method.first_block):
            found[block] = key, value
        return found

    def _features(self, images: Tensor, own: Tensor) -> Tensor:
        prefixes = self.prefixes(own, len(images))
        return read_out(self.network, forward_tokens(self.network, images, prefixes=prefixes))

    def _batches(self, places: Tensor) -> list[list[int]] | None:
        """Rows of the batches that are measured: of one class each, where they mix their rows.

        Args:
            places: of the rows' classes among those of the task [N].
        """
        # Differs from the authors' code, which shuffles the rows of a class: the first half of a
        # batch is measured with the keys, the other with the values.
        if self._method.kv_layout == "correct":
            return None
        size = self._method.test_batch
        return [
            batch.tolist()
            for place in range(self._own)
            for batch in (places == place).nonzero().flatten().split(size)
            if len(batch)
        ]

    def _both(self, images: Tensor, query: Tensor | None) -> Tensor:
        """Features without and with the task's prefix [B, 2, D]."""
        assert query is not None
        now = self.task.index
        prompted = self._features(images, self.e[now : now + 1])
        return torch.stack([query.float(), prompted.float()], dim=1)
