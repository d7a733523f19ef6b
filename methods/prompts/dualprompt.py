"""DualPrompt: key and value prefixes, shared ones in the first blocks, a task's own in later ones.

Shapes: B batch, D width, H heads, K = D / H, L prefix length, R blocks with a prefix, T tasks so
far, C classes seen.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.stream import StreamNeeds
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import Prefix, forward_tokens, heads, read_out
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Clipped, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import current_cross_entropy, linear_head
from graftwork.methods.prompts.selection import Selection, nearest, select, similarity, voters


@dataclass(frozen=True, kw_only=True)
class DualPrompt(Clipped, Epochs):
    """Trains a prefix for all tasks (G) and one for each task (E), found by its key at test time.

    Wang et al., https://arxiv.org/abs/2204.04799. Defaults are LAMDA-PILOT's for CIFAR-100 in 10
    tasks (commit 2647455), with gradients clipped as in the authors' code (google-research/l2p).
    That code has `pull_weight: 1.0`, `prompt_init: narrow` and `lr` 0.03 per 256 images of a batch
    instead; for ImageNet-R 0.005 per 256 images, `e_length: 20` and `epochs: 50`.

    Args:
        optimizer: optimiser, new for every task; without decay, which would move earlier tasks'
            prefixes.
        g_length: keys, and as many values, of the prefix for all tasks; 0 leaves it out.
        g_first: first block with the prefix for all tasks, from 0.
        g_last: last block with the prefix for all tasks.
        e_length: keys, and as many values, of a task's prefix; 0 leaves it out.
        e_first: first block with a task's prefix.
        e_last: last block with a task's prefix.
        pull_weight: of the term that pulls a task's key towards its queries.
        prompt_init: start of prefixes and keys, uniform in (-1, 1) as in the PyTorch ports or,
            narrow, in (0, 0.01) as in the authors' code.
        kv_layout: scrambled mimics the PyTorch ports, which mix the keys and values of the images
            of a batch, also at test time, in batches of `batch_size`: no use but to reproduce them.
        candidate_keys: tasks that an image may be taken for: those seen, or all of the stream,
            with the untrained keys of tasks to come, as published; a stream with them cannot grow.
        eval_selection: the task of an image by its own nearest key, or by a vote of the test
            batch, which leaks what an image's neighbours are; in batches of `batch_size` of each
            task, as in the authors' code and the port, or of LAMDA-PILOT's walk over all tasks.
    """

    epochs: int = 5
    batch_size: int = 24
    lr: float = 1e-3
    optimizer: optim.OptimizerName = "adam"
    schedule: optim.ScheduleName = "constant"
    clip: float = 1.0
    g_length: int = 5
    g_first: int = 0
    g_last: int = 1
    e_length: int = 5
    e_first: int = 2
    e_last: int = 4
    pull_weight: float = 0.1
    prompt_init: Literal["wide", "narrow"] = "wide"
    kv_layout: Literal["correct", "scrambled"] = "correct"
    candidate_keys: Literal["seen", "all"] = "seen"
    eval_selection: Selection = "instance"

    card: ClassVar[Card] = Card(
        title="DualPrompt",
        paper="https://arxiv.org/abs/2204.04799",
        summary="A key and value prefix for all tasks, and one per task that a key selects.",
        memory="2 * R * L * D floats of shared prefix; T * (2 * R * L * D + D) of tasks' prefixes "
        "and keys; C * D + C of classifier",
        growth="tasks",
        uses_seed=True,
        query=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        apart = self.g_last < self.e_first or self.e_last < self.g_first
        require(
            self,
            rules(self)
            | {
                "g_length": (self.g_length >= 0, "at least 0"),
                "g_first": (self.g_first >= 0, "at least 0"),
                "g_last": (self.g_last >= self.g_first, "at least g_first"),
                "e_length": (self.e_length >= 0, "at least 0"),
                "e_first": (self.e_first >= 0 and apart, "a block without the prefix of all tasks"),
                "e_last": (self.e_last >= self.e_first, "at least e_first"),
                "pull_weight": (self.pull_weight >= 0, "at least 0"),
            },
        )

    def stream_needs(self) -> StreamNeeds:
        return StreamNeeds(count=self.candidate_keys == "all")

    def neighbours(self) -> Neighbours | None:
        by = self.eval_selection
        mixed = by == "instance" and self.kv_layout == "scrambled"
        return voters("batch_vote" if mixed else by, self.batch_size)

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "DualPromptLearner":
        """A new learner for a task.

        Raises:
            ValueError: the ViT has fewer blocks than the prefixes are for.
        """
        for name in ("g_last", "e_last"):
            if getattr(self, name) >= len(vit.blocks):
                raise ValueError(
                    f"{name}: must be below {len(vit.blocks)}, the number of the backbone's "
                    f"blocks, got {getattr(self, name)}"
                )
        return DualPromptLearner(vit, task, self)


class DualPromptLearner(Learner):
    """The prefixes, a key per task and a linear head that grows.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    needs_query: ClassVar[bool] = True

    def __init__(self, vit: VisionTransformer, task: Task, method: DualPrompt) -> None:
        super().__init__(vit, task)
        self._method = method
        low, high = (-1.0, 1.0) if method.prompt_init == "wide" else (0.0, 0.01)
        shared = method.g_last - method.g_first + 1
        own = method.e_last - method.e_first + 1
        tasks = task.counted() if method.candidate_keys == "all" else task.index + 1

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(low, high))

        # Axis 0 or 1: block; next: key or value.
        self.g = uniform(shared, 2, method.g_length, *heads(vit))
        self.e = uniform(tasks, own, 2, method.e_length, *heads(vit))
        self.key = uniform(tasks, vit.embed_dim)
        self.head = linear_head(vit.num_features, task.seen)

    def begin(self) -> None:
        """Starts the task's prefix as a copy of the one before; its key stays random."""
        if now := self.task.index:
            self.e.detach()[now].copy_(self.e.detach()[now - 1])

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert query is not None
        now = self.task.index
        scores = similarity(query, self.key)
        found = (nearest(scores.detach(), 1) == now).float().mean()
        ids = torch.full((1,), now, device=query.device)
        entropy = current_cross_entropy(self._scores(images, ids), targets, self.task)
        pull = scores[:, now].mean()
        loss = entropy - self._method.pull_weight * pull
        # The share of images whose task the keys would find.
        return {"loss": loss, "cross_entropy": entropy, "pull": pull, "task_found": found}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None
        chosen = select(similarity(query, self.key), 1, self._method.eval_selection)
        return self._scores(images, chosen[:, 0])

    def prefixes(self, ids: Tensor, batch: int) -> list[Prefix | None]:
        """Prefixes that each block's attention sees, by the tasks' ids [B or 1] of the images."""
        method = self._method
        found: list[Prefix | None] = [None] * len(self.network.blocks)
        shared = self.g.transpose(2, 3)[:, :, None]  # [R, 2, 1, H, L, K]
        own = self.e[ids].permute(1, 2, 0, 4, 3, 5)  # [R, 2, B or 1, H, L, K]
        if method.kv_layout == "scrambled":
            own = own.expand(-1, -1, batch, -1, -1, -1)
            own = own.reshape(len(own), batch, 2, *own.shape[3:]).transpose(1, 2)
        if method.g_length:
            for block, (key, value) in enumerate(shared, method.g_first):
                found[block] = key, value
        if method.e_length:
            for block, (key, value) in enumerate(own, method.e_first):
                found[block] = key, value
        return found

    def _scores(self, images: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, C] with the prefixes of the tasks with ids [B or 1]."""
        prefixes = self.prefixes(ids, len(images))
        return self.head(
            read_out(self.network, forward_tokens(self.network, images, prefixes=prefixes))
        )
