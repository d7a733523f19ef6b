"""ESN: a classifier for every task, trained in isolation; the energies of all of them vote.

Shapes: B batch, D width, H heads, L prompt length, S tasks (stages) so far, C classes seen, N
classes of a task, X tokens, Q temperatures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation, Learner, Recipe, Task, TaskImages
from graftwork.methods.networks.vit import forward_tokens, heads
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import cross_entropy
from graftwork.methods.parts.stage_heads import NONE, StageHeads

COLDEST = 0.001
"""Temperature of the first stage, which has nothing to be told apart from."""
CANDIDATES = {
    "slow": tuple(step / 1000 for step in range(1, 1000)),
    "fast": (0.001, 0.01, *(step / 10 for step in range(1, 11))),
}
AnchorOn = Literal["logits", "negated"]


@dataclass(frozen=True, kw_only=True)
class ESN(Decayed, Epochs):
    """Learns a small classifier per task on a frozen ViT, all at one level of energy.

    Wang et al., https://arxiv.org/abs/2211.15969. Training pulls the free energy
    F = -logsumexp(z) of a stage's logits z towards an anchor. At test time all stages score an
    image; for every temperature the stage of the lowest energy gets a vote, and the stage with most
    votes names the class. Defaults are the paper's; the authors' code has `prompt_length: 100`,
    `candidates: fast`, `dedup: true` and `anchor_on: negated`.

    Args:
        augmentation: of the training images; temperatures are chosen on images without it.
        prompt_length: L, tokens of the prompt that the first task trains for all.
        anchor: what free energies are pulled to.
        anchor_weight: of the squared distance to the anchor, beside the cross-entropy.
        anchor_on: takes the free energy of the logits, or of the negated logits.
        candidates: temperatures that each task chooses one from, 0.001 to 0.999 or 12 of them.
        dedup: counts a temperature that several tasks chose once, not once for each.
    """

    epochs: int = 30
    augmentation: Augmentation = "imagenet"
    prompt_length: int = 10
    anchor: float = -10.0
    anchor_weight: float = 0.1
    anchor_on: AnchorOn = "logits"
    candidates: Literal["slow", "fast"] = "slow"
    dedup: bool = False

    card: ClassVar[Card] = Card(
        title="ESN",
        paper="https://arxiv.org/abs/2211.15969",
        summary="A class-attention block and a classifier per task, each trained alone; the task "
        "of the lowest energy is found by a vote over temperatures.",
        memory="L * D floats; T * (5 D^2 + 10.5 D + 1); classifiers of C * (D + 3) floats if "
        "class-incremental, T * C * (D + 3) if domain-incremental",
        uses_seed=True,
        growth="tasks",
        apart=True,
        linear_layers=False,
        independent=True,
        shared=("prompt",),
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "prompt_length": (self.prompt_length >= 1, "at least 1"),
                "anchor_weight": (self.anchor_weight >= 0, "at least 0"),
            },
        )

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def expert(self, vit: VisionTransformer, task: Task) -> "ESNExpert":
        return ESNExpert(vit, task, self)

    def learner(self, vit: VisionTransformer, task: Task) -> "ESNLearner":
        return ESNLearner(vit, task, self)


class Stage(nn.Module):
    """A token that attends to an image's tokens once, and an MLP (CaiT's class attention).

    Args:
        vit: gives width, heads and the token's start, its class token.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        width, self._heads = vit.embed_dim, heads(vit)[0]
        start = vit.cls_token
        own = torch.randn(1, 1, width) * 0.02 if start is None else start.detach().clone()
        self.token = nn.Parameter(own)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        for layer in (self.q, self.k, self.v, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Feature [B, D] of tokens [B, X, D] before the ViT's final norm."""
        own = self.token.expand(len(tokens), -1, -1).to(tokens.dtype)
        normed = self.norm1(torch.cat([own, tokens], dim=1))
        q, k, v = (
            layer(part).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for layer, part in ((self.q, normed[:, :1]), (self.k, normed), (self.v, normed))
        )
        own = own + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (own + self.fc2(F.gelu(self.fc1(self.norm2(own)))))[:, 0]


class ESNExpert(Learner):
    """One stage with its classifier; the first one trains the prompt, too.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: ESN) -> None:
        super().__init__(vit, task)
        self._method = method
        bound = 1 / math.sqrt(vit.embed_dim)
        start = torch.empty(1, method.prompt_length, vit.embed_dim).uniform_(-bound, bound)
        # Differs from iamwangyabin/ESN, whose later tasks train the prompt on: it freezes one that
        # it then replaces. Stages of earlier tasks would be given another prompt than their own.
        self.prompt = nn.Parameter(start, requires_grad=task.index == 0)
        self.stage = Stage(vit)
        self.head = nn.Linear(vit.embed_dim, len(task.current))
        place = torch.zeros(task.seen, dtype=torch.int64)
        place[list(task.current)] = torch.arange(len(task.current))
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        scores = self.own_logits(images)
        entropy = cross_entropy(scores, self.place[targets], self.task)
        energy = free_energy(scores, self._method.anchor_on)
        pull = (energy - self._method.anchor).square().mean()
        return {
            "loss": entropy + self._method.anchor_weight * pull,
            "cross_entropy": entropy,
            "energy": energy.mean(),
        }

    def own_logits(self, images: Tensor) -> Tensor:
        """Scores [B, N] float32 of the task's classes."""
        return self.head(self.stage(tokens_of(self.network, images, self.prompt))).float()


class ESNLearner(Learner):
    """All stages so far, and the temperatures under which they vote.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.
    """

    learned_buffers, counting_buffers = ("prompt",), ("temperatures",)
    prompt: Tensor
    """[1, L, D]."""
    temperatures: Tensor
    """What each task has chosen [S], float32."""

    def __init__(self, vit: VisionTransformer, task: Task, method: ESN) -> None:
        super().__init__(vit, task)
        self._method = method
        self.register_buffer("prompt", torch.zeros(1, method.prompt_length, vit.embed_dim))
        self.stages = nn.ModuleList(Stage(vit) for _ in range(task.index + 1))
        self.stages.requires_grad_(False)
        self.heads = StageHeads(vit.embed_dim, task)
        self.register_buffer("temperatures", torch.full((task.index + 1,), COLDEST))

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.heads.adopt(stored, "heads")

    def join(self, expert: State, data: TaskImages) -> None:
        if not self.task.index:
            self.prompt.copy_(expert["prompt"])
        own = {n.removeprefix("stage."): t for n, t in expert.items() if n.startswith("stage.")}
        self.stages[-1].load_state_dict(own)
        self.heads.take(expert["head.weight"], expert["head.bias"])
        if self.task.index:
            candidates = CANDIDATES[self._method.candidates]
            found = data.map(lambda images, query: self._claimed(images, candidates))
            # The first of the best, as in the authors' code.
            self.temperatures[-1] = candidates[int(found.double().mean(dim=0).argmax())]

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        scores = self.stage_logits(images)
        return impartial(scores, vote(scores, self.pool()))

    def pool(self) -> Tensor:
        """The temperatures that vote [Q]."""
        return self.temperatures.unique() if self._method.dedup else self.temperatures

    def stage_logits(self, images: Tensor) -> Tensor:
        """Scores [B, S, C] of all stages, minus infinity where one did not have a class."""
        tokens = tokens_of(self.network, images, self.prompt)
        return self.heads([stage(tokens) for stage in self.stages])

    def _claimed(self, images: Tensor, candidates: tuple[float, ...]) -> Tensor:
        """Tells whether the newest stage has the lowest energy [B, candidates], as 0 and 1."""
        scores, newest = self.stage_logits(images), self.task.index
        return torch.stack([(winners(scores, t) == newest).float() for t in candidates], dim=1)


def tokens_of(vit: VisionTransformer, images: Tensor, prompt: Tensor) -> Tensor:
    """All tokens [B, X, D] behind the last block, those of the prompt among them."""
    return forward_tokens(vit, images, prompt=prompt, normalise=False)


def free_energy(scores: Tensor, of: AnchorOn = "logits") -> Tensor:
    """-logsumexp [B] of logits [B, N], or of the negated logits."""
    # Differs from iamwangyabin/ESN, which trains with the free energy of the negated logits and
    # then compares stages by that of the logits: there the lowest logit is at the anchor.
    return -torch.logsumexp(scores if of == "logits" else -scores, dim=-1)


def winners(scores: Tensor, temperature: float) -> Tensor:
    """The stage [B] of the lowest energy among scores [B, S, C]; of equal ones the first."""
    # T * logsumexp(z / T), without the factor, which is the same for all stages.
    level = torch.logsumexp(scores.float() / temperature, dim=2)
    first = torch.arange(level.shape[1], 0, -1, device=level.device)
    return ((level == level.amax(dim=1, keepdim=True)) * first).argmax(dim=1)


def vote(scores: Tensor, pool: Tensor) -> Tensor:
    """The stage [B] that wins under most temperatures [Q]; of equal ones the first.

    Args:
        scores: [B, S, C].
        pool: [Q].
    """
    stages = scores.shape[1]
    won = torch.stack([winners(scores, float(t)) for t in pool], dim=1)
    counts = F.one_hot(won, stages).sum(dim=1)
    return (counts * stages - torch.arange(stages, device=counts.device)).argmax(dim=1)


def impartial(scores: Tensor, stage: Tensor) -> Tensor:
    """Scores [B, C]: the chosen stage's classes as they are, all others below the lowest of them.

    The others are shifted by one amount per row, which keeps their order. A class of several other
    stages has the highest of its scores.

    Args:
        scores: [B, S, C], minus infinity where a stage does not have a class.
        stage: chosen [B].
    """
    chosen = stage[:, None, None].expand(-1, 1, scores.shape[2])
    own = scores.gather(1, chosen)[:, 0]
    rest = scores.scatter(1, chosen, NONE).amax(dim=1)
    lowest = own.masked_fill(own == NONE, torch.inf).amin(dim=1, keepdim=True)
    # Of a class that no stage has had there is nothing to say: it stands with the last.
    known = rest != NONE
    bottom = rest.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True).minimum(lowest)
    rest = torch.where(known, rest, bottom)
    shift = 1 + (rest.amax(dim=1, keepdim=True) - lowest).clamp(min=0)
    return torch.where(own == NONE, rest - shift, own)
