"""L2P: prompts chosen from a pool by the image's frozen feature, read out where they stand.

Shapes: B batch, D width, M pool size, N prompts per image, L length of a prompt, T tasks so far,
C classes seen.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.stream import Room, StreamNeeds
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import forward_tokens
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Clipped, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import current_cross_entropy, linear_head
from graftwork.methods.prompts.selection import Selection, histogram, select, similarity, voters


@dataclass(frozen=True, kw_only=True)
class L2P(Clipped, Epochs):
    """Chooses prompts for the input of a frozen ViT, and classifies the mean of their outputs.

    Wang et al., https://arxiv.org/abs/2112.08654. Defaults are those of the PyTorch port
    (JH-LEE-KR/l2p-pytorch) and of LAMDA-PILOT for CIFAR-100 in 10 tasks; the authors' own code
    (google-research/l2p) has `batch_size: 128`, `lr: 0.015`, `prompt_length: 10`, `top_n: 4`,
    `pull_weight: 1.0` and `prompt_init: narrow` instead. All of them test with a vote.

    Args:
        optimizer: optimiser, new for every task; without decay, which would move unused prompts.
        pool_size: M, prompts to choose from, for all tasks together.
        top_n: N, prompts of an image.
        prompt_length: L, tokens of a prompt.
        pull_weight: of the term that pulls chosen keys towards the queries.
        prompt_init: start of prompts and keys, uniform in (-1, 1) or, narrow, in (0, 0.01).
        prompt_pos: position of the prompts, none as in the authors' code or that of the class
            token as in the port and LAMDA-PILOT.
        train_selection: by a vote of the batch as published, by each image alone, or a fixed
            block of N prompts for each task, started as a copy of the block before.
        eval_selection: by each image alone, or by a vote of the test batch, which leaks what an
            image's neighbours are; in batches of `batch_size` of each task, as in the authors' code
            and the port, or of LAMDA-PILOT's walk over all tasks.
    """

    epochs: int = 5
    batch_size: int = 16
    lr: float = 1.875e-3
    optimizer: optim.OptimizerName = "adam"
    schedule: optim.ScheduleName = "constant"
    clip: float = 1.0
    pool_size: int = 10
    top_n: int = 5
    prompt_length: int = 5
    pull_weight: float = 0.1
    prompt_init: Literal["wide", "narrow"] = "wide"
    prompt_pos: Literal["none", "cls"] = "none"
    train_selection: Literal["batch_vote", "instance", "task"] = "batch_vote"
    eval_selection: Selection = "instance"

    card: ClassVar[Card] = Card(
        title="L2P",
        paper="https://arxiv.org/abs/2112.08654",
        summary="Chooses prompts from a pool by the cosine of the frozen feature to their keys.",
        memory="pool_size * (prompt_length + 1) * D floats; C * D + C floats of classifier",
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
                "top_n": (1 <= self.top_n <= self.pool_size, "between 1 and pool_size"),
                "prompt_length": (self.prompt_length >= 1, "at least 1"),
                "pull_weight": (self.pull_weight >= 0, "at least 0"),
            },
        )

    def stream_needs(self) -> StreamNeeds:
        if self.train_selection != "task":
            return StreamNeeds()
        return StreamNeeds(room=Room(field="pool_size", size=self.pool_size, per_task=self.top_n))

    def neighbours(self) -> Neighbours | None:
        return voters(self.eval_selection, self.batch_size)

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, vit: VisionTransformer, task: Task) -> "L2PLearner":
        """A new learner for a task.

        Raises:
            ValueError: the pool has no prompts left for the task, or the ViT has no position for
                a class token.
        """
        # Planning knows how long the stream is, and has refused it.
        if self.train_selection == "task" and self.top_n * (task.index + 1) > self.pool_size:
            raise ValueError(
                f"pool_size: must be at least top_n for each task with train_selection task, "
                f"{self.top_n * (task.index + 1)} for task {task.index + 1}, got {self.pool_size}"
            )
        placed = vit.pos_embed is not None and vit.cls_token is not None and not vit.no_embed_class
        if self.prompt_pos == "cls" and not placed:
            raise ValueError("prompt_pos: must be none, for the class token has no position here")
        return L2PLearner(vit, task, self)


class L2PLearner(Learner):
    """The pool, its keys and a linear head that grows.

    Args:
        vit: frozen.
        task: the task.
        method: hyper-parameters.
    """

    needs_query: ClassVar[bool] = True
    selected: Tensor

    def __init__(self, vit: VisionTransformer, task: Task, method: L2P) -> None:
        super().__init__(vit, task)
        self._method = method
        low, high = (-1.0, 1.0) if method.prompt_init == "wide" else (0.0, 0.01)
        pool = torch.empty(method.pool_size, method.prompt_length, vit.embed_dim)
        key = torch.empty(method.pool_size, vit.embed_dim)
        self.pool = nn.Parameter(pool.uniform_(low, high))
        self.key = nn.Parameter(key.uniform_(low, high))
        self.head = linear_head(vit.num_features, task.seen)
        # How often each task's training chose each prompt: on CIFAR-100 all tasks are known to
        # choose the same few.
        counts = torch.zeros(task.index + 1, method.pool_size, dtype=torch.int64)
        self.register_buffer("selected", counts)

    def begin(self) -> None:
        """Starts the block of the task as a copy of the one before."""
        if self._method.train_selection == "task" and self.task.index:
            blocks = self.pool.detach().split(self._method.top_n)
            blocks[self.task.index].copy_(blocks[self.task.index - 1])

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        assert query is not None
        scores = similarity(query, self.key)
        chosen = self._train_ids(scores.detach())
        everyone = chosen.expand(len(query), -1)
        self.selected[self.task.index] += histogram(everyone, self._method.pool_size)
        entropy = current_cross_entropy(
            self.head(self._features(images, chosen)), targets, self.task
        )
        pull = scores.gather(1, everyone).sum(dim=1).mean()
        loss = entropy - self._method.pull_weight * pull
        return {"loss": loss, "cross_entropy": entropy, "pull": pull}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        assert query is not None
        scores = similarity(query, self.key)
        chosen = select(scores, self._method.top_n, self._method.eval_selection)
        return self.head(self._features(images, chosen))

    def _train_ids(self, scores: Tensor) -> Tensor:
        """Ids [B or 1, N] of the prompts for training images with scores [B, M]."""
        number = self._method.top_n
        if self._method.train_selection == "task":
            start = number * self.task.index
            return torch.arange(start, start + number, device=scores.device)[None]
        return select(scores, number, self._method.train_selection)

    def _features(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Mean [B, D] of the outputs of the prompts with ids [B or 1, N]; not the class token."""
        prompt = self.pool[chosen].flatten(1, 2)
        if self._method.prompt_pos == "cls":
            assert self.network.pos_embed is not None
            prompt = prompt + self.network.pos_embed[:, :1]
        tokens = forward_tokens(self.network, images, prompt=prompt)
        start = self.network.num_prefix_tokens
        return self.network.fc_norm(tokens[:, start : start + prompt.shape[1]].mean(dim=1))
