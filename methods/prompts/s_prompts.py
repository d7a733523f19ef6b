"""S-Prompts: a prompt and a classifier for every task, chosen by the nearest cluster of images.

Shapes: B batch, D width, L prompt length, T tasks so far, K centres of a task, C classes seen,
R rows of all tasks' classifiers together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.parts import entries, optim
from graftwork.methods.parts.clusters import k_means
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import cross_entropy
from graftwork.methods.parts.prompt_tokens import without_prompt

FAR = -1e9
"""Logit of a class that the chosen task does not have."""


@dataclass(frozen=True, kw_only=True)
class SPrompts(Decayed, Epochs):
    """Learns every task on its own: nothing is shared, so nothing is forgotten.

    Wang et al., https://arxiv.org/abs/2207.12819, the variant for image models (S-iPrompts).
    Made for domain-incremental streams. Defaults are those of the authors' code for DomainNet,
    whose settings files are all for CLIP; its CDDB runs train 10 epochs.

    Args:
        weight_decay: of the prompt and the classifier, on task 0.
        later_weight_decay: the same on later tasks.
        augmentation: of the training images; centres are of images without it.
        prompt_length: L, tokens of a prompt.
        centres: K, clusters of a task's images.
    """

    epochs: int = 30
    later_weight_decay: float = 2e-4
    augmentation: Augmentation = "imagenet"
    prompt_length: int = 10
    centres: int = 5

    card: ClassVar[Card] = Card(
        title="S-Prompts (S-iPrompts)",
        paper="https://arxiv.org/abs/2207.12819",
        summary="A prompt and a classifier per task, chosen by the nearest of the tasks' centres; "
        "where tasks bring new classes, all classes of other tasks than the chosen one are "
        "ruled out.",
        memory="T * (L + K) * D floats; classifiers of T * C * (D + 1) floats if "
        "domain-incremental, C * (D + 1) if class-incremental",
        growth="tasks",
        apart=True,
        version=3,
        uses_seed=True,
        query=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "later_weight_decay": (self.later_weight_decay >= 0, "at least 0"),
                "prompt_length": (self.prompt_length >= 1, "at least 1"),
                "centres": (self.centres >= 1, "at least 1"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        decay = self.later_weight_decay if task.index else self.weight_decay
        recipe = usual_recipe(self)
        return replace(recipe, optimizer=optim.optimizer(self.optimizer, self.lr, decay))

    def learner(self, vit: VisionTransformer, task: Task) -> "SPromptsLearner":
        return SPromptsLearner(vit, task, self)


class SPromptsLearner(Learner):
    """Prompts, classifiers and centres of all tasks so far.

    The classifiers are rows of one matrix, task after task.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    # Clusters come in the order in which they were found.
    counting_buffers = ("centres",)
    centres: Tensor
    rows: Tensor
    """Task and column of each row of the classifiers [R, 2]; -1 for a row that is not used."""

    def __init__(self, vit: VisionTransformer, task: Task, method: SPrompts) -> None:
        super().__init__(vit, task)
        self._count = method.centres
        tasks, width = task.index + 1, vit.embed_dim
        self.prompts = nn.Parameter(_drawn(width, tasks, method.prompt_length, width))
        self._hold(entries.usual(task))
        self.register_buffer("centres", torch.zeros(tasks, method.centres, width))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def _hold(self, before: int) -> None:
        """Makes place for the rows of the classifiers of earlier tasks and of this one's."""
        rows, width = before + len(self.task.current), self.network.embed_dim
        self._own = slice(before, rows)
        self.weight = nn.Parameter(_drawn(width, rows, width))
        self.bias = nn.Parameter(_drawn(width, rows))
        self.register_buffer("rows", entries.pairs(self.task, before))

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        before, device = entries.earlier(stored["rows"][:, 0], self.task), self.rows.device
        if before != self._own.start:
            self._hold(before)
            self.to(device)
        return stored

    @property
    def needs_query(self) -> bool:  # type: ignore[override]
        """To choose a task; not while training, when it is known."""
        return not self.training

    def begin(self) -> None:
        first = self._own.start
        pairs = ((self.prompts, self.task.index), (self.weight, first), (self.bias, first))
        for parameter, earlier in pairs:
            self._kept.append((parameter, parameter[:earlier].detach().clone()))

    def after_step(self) -> None:
        # Weight decay reaches all rows of a tensor; those of earlier tasks are frozen.
        with torch.no_grad():
            for parameter, kept in self._kept:
                parameter[: len(kept)] = kept

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        features = self._features(images, self.prompts[-1:])
        own = len(self.task.current)
        scores = F.linear(features, self.weight[self._own], self.bias[self._own])
        place = torch.zeros(self.task.seen, dtype=torch.int64, device=targets.device)
        place[self.rows[self._own, 1]] = torch.arange(own, device=targets.device)
        return {"loss": cross_entropy(scores.float(), place[targets], self.task)}

    def finish(self, data: TaskImages) -> None:
        # Differs from iamwangyabin/S-Prompts, which clusters one pass of augmented images: what a
        # task looks like then depends on no draw.
        features = data.map(lambda images, query: _queries(query))
        self.centres[-1] = k_means(features, self._count)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        task = self.chosen(_queries(query))
        features = self._features(images, self.prompts[task])
        scores = F.linear(features, self.weight, self.bias).float()
        scores = F.pad(scores, (0, 1), value=FAR)  # the last row is of no task
        rows = torch.arange(len(self.rows), device=scores.device)
        table = rows.new_full((self.task.index + 1, self.task.seen), len(rows))
        used = self.rows[:, 0] >= 0
        table[self.rows[used, 0], self.rows[used, 1]] = rows[used]
        return scores.gather(1, table[task])

    def chosen(self, features: Tensor) -> Tensor:
        """Task [B] whose centres are nearest in the L1 distance to features [B, D] of length 1."""
        # The authors' code takes the root of every squared difference on its own: that is L1.
        distances = torch.cdist(features, self.centres.flatten(0, 1), p=1)
        return distances.unflatten(1, self.centres.shape[:2]).amin(dim=2).argmin(dim=1)

    def _features(self, images: Tensor, prompt: Tensor) -> Tensor:
        tokens = forward_tokens(self.network, images, prompt=prompt)
        return read_out(self.network, without_prompt(self.network, tokens, prompt.shape[1]))


def _drawn(width: int, *shape: int) -> Tensor:
    """The start of a linear layer of this width."""
    bound = 1 / math.sqrt(width)
    return torch.empty(shape).uniform_(-bound, bound)


def _queries(query: Tensor | None) -> Tensor:
    assert query is not None
    return F.normalize(query.float(), dim=1)
