"""LAE: small modules that learn at once, a slow copy of them, and the surer of the two decides."""

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.stream import Passes, StreamNeeds
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks import vit as seams
from graftwork.methods.parts import averaging, optim
from graftwork.methods.parts.epochs import Decayed, Epochs, rules, usual_recipe
from graftwork.methods.parts.heads import LinearHead, OtherRows, current_cross_entropy

Pet = Literal["adapter", "lora", "prefix"]


@dataclass(frozen=True, kw_only=True)
class LAE(Decayed, Epochs):
    """Trains online modules task after task; offline ones follow by a moving average of all steps.

    Gao et al., https://arxiv.org/abs/2303.10070. Defaults are the authors' for CIFAR-100 and 224
    pixels. Both experts share the classifier; an image's class has the highest probability that
    either of them gives, which takes two passes. The first task has no offline expert.

    Args:
        weight_decay: of modules and current head.
        pet: adapters parallel to the attention, low-rank updates of keys and values, or prefixes of
            keys and values.
        blocks: how many blocks have a module, from the first on.
        bottleneck: hidden units of an adapter.
        rank: rank of an update.
        length: keys and values of a prefix.
        ema_decay: what the offline modules keep of themselves at every step, from 0 to 1; of their
            start, a task leaves this to the power of its steps.
        freeze_epochs: epochs at the start of each task but the first in which the new head alone
            is trained.
    """

    epochs: int = 5
    batch_size: int = 24
    lr: float = 0.0028125
    weight_decay: float = 0.0
    optimizer: optim.OptimizerName = "adam"
    schedule: optim.ScheduleName = "constant"
    pet: Pet = "adapter"
    blocks: int = 5
    bottleneck: int = 5
    rank: int = 5
    length: int = 10
    ema_decay: float = 0.9999
    freeze_epochs: int = 3
    augmentation: Augmentation = "imagenet"

    card: ClassVar[Card] = Card(
        title="LAE",
        paper="https://arxiv.org/abs/2303.10070",
        summary="Small modules and a moving average of them; the higher probability of the two.",
        memory="twice the modules: per block 2 * R * D + R + D + 1 floats (adapter of R units), "
        "4 * R * D + 2 (update of rank R) or 2 * L * D + 2 (prefix of length L); "
        "C * D + C floats of classifier; two forward passes per image",
        uses_seed=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "blocks": (self.blocks >= 1, "at least 1"),
                "bottleneck": (self.bottleneck >= 1, "at least 1"),
                "rank": (self.rank >= 1, "at least 1"),
                "length": (self.length >= 1, "at least 1"),
                "ema_decay": (0 <= self.ema_decay <= 1, "between 0 and 1"),
                "freeze_epochs": (self.freeze_epochs >= 0, "at least 0"),
            },
        )

    def stream_needs(self) -> StreamNeeds:
        if not self.freeze_epochs:
            return StreamNeeds()
        return StreamNeeds(passes=Passes(field="freeze_epochs", count=self.freeze_epochs))

    def recipe(self, task: Task) -> Recipe:
        return replace(usual_recipe(self), drop_last=True)

    def learner(self, vit: VisionTransformer, task: Task) -> "LAELearner":
        return LAELearner(vit, task, self)


class ParallelAdapter(nn.Module):
    """scale * up(gelu(down(x))) beside the attention; zero at the start.

    Args:
        width: D.
        bottleneck: hidden units.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * self.up(F.gelu(self.down(tokens)))


class KeyValueUpdate(nn.Module):
    """Low-rank updates of a block's keys and values; zero at the start.

    Args:
        width: D.
        rank: R.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(2, rank, width))
        self.up = nn.Parameter(torch.zeros(2, width, rank))
        self.scale = nn.Parameter(torch.ones(2))
        for half in self.down:
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Addends [B, N, 3 D] to queries (nothing), keys and values."""
        parts = [
            scale * F.linear(F.linear(tokens, down), up)
            for scale, down, up in zip(self.scale, self.down, self.up, strict=True)
        ]
        return torch.cat([torch.zeros_like(parts[0]), *parts], dim=-1)


class KeyValuePrefix(nn.Module):
    """Keys and values that a block's tokens attend to in addition.

    Args:
        width: D.
        length: L.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(2, length, width))
        self.scale = nn.Parameter(torch.ones(2))
        nn.init.uniform_(self.tokens, 0, 0.01)

    def forward(self, heads: int) -> seams.Prefix:
        """Keys and values, each [1, H, L, D / H]."""
        both = (self.scale[:, None, None] * self.tokens).unflatten(2, (heads, -1))
        key, value = both.transpose(1, 2)[:, None]  # each [1, H, L, D / H]
        return key, value


class LAELearner(Learner):
    """A frozen ViT, online and offline modules in its first blocks, and a head that both use.

    Args:
        vit: stays frozen.
        task: the task.
        method: hyper-parameters.

    Raises:
        ValueError: the ViT has fewer blocks than have a module.
    """

    def __init__(self, vit: VisionTransformer, task: Task, method: LAE) -> None:
        super().__init__(vit, task)
        if method.blocks > len(vit.blocks):
            raise ValueError(
                f"blocks: must be at most the {len(vit.blocks)} of the backbone, "
                f"got {method.blocks}"
            )
        self._pet, self._decay = method.pet, method.ema_decay
        self._freeze_epochs = method.freeze_epochs if task.index else 0
        self._frozen = False
        self.online = nn.ModuleList(_module(vit.embed_dim, method) for _ in range(method.blocks))
        if task.index:
            self.offline = copy.deepcopy(self.online).requires_grad_(False)
        self.head = LinearHead(vit.num_features, task.seen)
        nn.init.normal_(self.head.weight, std=0.001)
        nn.init.zeros_(self.head.bias)

    def begin(self) -> None:
        self._others = OtherRows(self.head, self.task)
        if self.task.index == 1:
            self.offline.load_state_dict(self.online.state_dict())

    def begin_epoch(self, epoch: int) -> None:
        self._frozen = epoch < self._freeze_epochs

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        # No gradient at all, so that the optimiser passes the modules over and counts no step.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            features = self.features(images)
        return {"loss": current_cross_entropy(self.head(features), targets, self.task)}

    def after_step(self) -> None:
        self._others.put_back()
        if self.task.index:
            pairs = zip(self.offline.parameters(), self.online.parameters(), strict=True)
            for offline, online in pairs:
                averaging.ema_(offline, online, self._decay)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        """Logarithms [B, C] of the higher of both experts' probabilities."""
        scores = self._scores(self.online, images)
        if self.task.index:
            scores = torch.maximum(scores, self._scores(self.offline, images))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """Those of the online expert."""
        return self._through(self.online, images)

    def _scores(self, modules: nn.ModuleList, images: Tensor) -> Tensor:
        return F.log_softmax(self.head(self._through(modules, images)).float(), dim=1)

    def _through(self, modules: nn.ModuleList, images: Tensor) -> Tensor:
        network = self.network
        rest = [None] * (len(network.blocks) - len(modules))
        own = [*modules, *rest]
        if self._pet == "adapter":
            tokens = seams.forward_tokens(network, images, attention_adapters=own)
        elif self._pet == "lora":
            tokens = seams.forward_tokens(network, images, projections=own)
        else:
            heads, _ = seams.heads(network)
            prefixes = [*(module(heads) for module in modules), *rest]
            tokens = seams.forward_tokens(network, images, prefixes=prefixes, compensate=True)
        return seams.read_out(network, tokens)


def _module(width: int, method: LAE) -> nn.Module:
    if method.pet == "adapter":
        return ParallelAdapter(width, method.bottleneck)
    if method.pet == "lora":
        return KeyValueUpdate(width, method.rank)
    return KeyValuePrefix(width, method.length)
