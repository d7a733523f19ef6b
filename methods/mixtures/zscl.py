"""ZSCL: CLIP trained whole, held by distillation on reference data and by averaging its weights.

Shapes: B batch, C classes seen, E joint width, R reference images, N reference texts.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.clip import Clip, class_texts, cosines, phrases, unit
from graftwork.methods.parts import optim
from graftwork.methods.parts.epochs import Decayed, Steps, rules
from graftwork.methods.parts.heads import cross_entropy

TEXTS = 64
"""Reference texts encoded at once."""


@dataclass(frozen=True, kw_only=True)
class ZSCL(Decayed, Steps):
    """Fine-tunes both towers of CLIP and keeps what it could do before.

    Zheng et al., https://arxiv.org/abs/2303.06628, sections 4.1 to 4.3. Defaults are those of the
    authors' class-incremental code (Thunderbeee/ZSCL, commit b96e714). With `distillation: 0`,
    `constraint: 0` and `average_every: 0` it is plain fine-tuning of CLIP. Images and texts of the
    distillation are the spec's `reference`; its images come in passes, each in a random order of
    its own, whose last batch may be smaller.

    Args:
        batch_size: images per step, of all workers together; as many reference images.
        weight_decay: of all parameters.
        warmup: steps of every task in which the rate rises; a cosine per step follows.
        label_smoothing: of the cross-entropy over the current task's classes.
        distillation: weight of the distillation on reference data; 0 needs none.
        temperature: of the distillation.
        constraint: weight of the squared distance from the weights before the task.
        average_every: steps between weights that are averaged; 0 keeps the last weights.
        augmentation: of the training images.
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 7.1e-6
    weight_decay: float = 0.0
    optimizer: optim.OptimizerName = "adamw"
    warmup: int = 30
    label_smoothing: float = 0.2
    distillation: float = 5.0
    temperature: float = 2.0
    constraint: float = 0.0
    average_every: int = 10
    augmentation: Augmentation = "clip"

    card: ClassVar[Card] = Card(
        title="ZSCL",
        paper="https://arxiv.org/abs/2303.06628",
        summary="Trains all of CLIP, distils the zero-shot model on reference data, averages.",
        memory="both towers",
        version=2,
        uses_seed=True,
        network="clip",
        reference=True,
        zero_shot=True,
        contract="trained",
    )

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                "lr": (self.lr >= 0, "at least 0"),
                "warmup": (self.warmup >= 0, "at least 0"),
                "label_smoothing": (0 <= self.label_smoothing < 1, "in 0..1"),
                "distillation": (self.distillation >= 0, "at least 0"),
                "temperature": (self.temperature > 0, "above 0"),
                "constraint": (self.constraint >= 0, "at least 0"),
                "average_every": (self.average_every >= 0, "at least 0"),
            },
        )

    @property
    def needs_reference(self) -> bool:
        """Tells whether these hyper-parameters read the spec's `reference`."""
        return self.distillation > 0

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            optimizer=optim.optimizer(self.optimizer, self.lr, self.weight_decay),
            schedule=optim.schedule("constant"),
            step_schedule=optim.warmup_cosine(self.warmup),
        )

    def learner(self, network: Clip, task: Task) -> "ZSCLLearner":
        return ZSCLLearner(network, task, self)


class ZSCLLearner(Learner[Clip]):
    """All of CLIP but its logit scale; beside it the zero-shot model, anchor and average.

    Args:
        network: all of it is trained.
        task: the task.
        method: hyper-parameters.
    """

    average: Tensor | None
    """[P], mean of the weights before the task and of those sampled since."""
    steps: Tensor | None
    """Steps taken; in snapshots, so that an interrupted task goes on with the same average."""

    def __init__(self, network: Clip, task: Task, method: ZSCL) -> None:
        super().__init__(network, task)
        self._method = method
        # A tuple hides it from state, optimiser and workers. Made now: `restore` comes next.
        self._zero_shot: tuple[Clip, ...] = (
            (copy.deepcopy(network),) if method.needs_reference else ()
        )
        network.requires_grad_(True)
        network.logit_scale.requires_grad_(False)
        current = [task.names[column] for column in task.current]
        self._tokens = network.tokenise(phrases(current, task.templates[0]))
        self._seed = int(torch.randint(2**62, ()))
        self._anchor: list[Tensor] = []
        self._reference_texts: Tensor | None = None
        self._texts: Tensor | None = None
        self.register_buffer("average", None)
        self.register_buffer("steps", None)

    def begin(self) -> None:
        if self._method.constraint:
            self._anchor = [p.detach().clone() for p in self._trained()]
        self.average = torch.cat([p.detach().reshape(-1) for p in self._trained()])
        self.steps = torch.zeros((), dtype=torch.int64)
        if self._zero_shot:
            if self.reference is None:
                raise ValueError(
                    "reference: must be images and texts where distillation is above 0"
                )
            self._reference_texts = self._encode(list(self.reference.texts))

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        method, scale = self._method, self.network.logit_scale.exp()
        scores = scale * cosines(self.network.image(images), self.network.text(self._tokens))
        current = torch.tensor(self.task.current, device=targets.device)
        loss = cross_entropy(
            scores,
            torch.searchsorted(current, targets),
            self.task,
            label_smoothing=method.label_smoothing,
        )
        terms = {"cross_entropy": loss.detach()}
        if self._zero_shot:
            terms["distillation"] = self._distilled()
            loss = loss + method.distillation * terms["distillation"]
        if self._anchor:
            pairs = zip(self._trained(), self._anchor, strict=True)
            terms["constraint"] = torch.stack([(p - a).square().sum() for p, a in pairs]).sum()
            loss = loss + method.constraint * terms["constraint"]
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def after_step(self) -> None:
        assert self.steps is not None and self.average is not None, "begin comes first"
        every, step = self._method.average_every, int(self.steps)
        if every and step % every == 0:
            now = torch.cat([p.reshape(-1) for p in self._trained()])
            # Equal weights stay what they are to the bit, as (n * e + now) / (n + 1) would not.
            self.average += (now - self.average) / (step // every + 2)
        self.steps += 1
        self._texts = None

    @torch.no_grad()
    def finish(self, data: object) -> None:
        assert self.average is not None, "begin comes first"
        if self._method.average_every:
            sizes = [p.numel() for p in self._trained()]
            for p, mean in zip(self._trained(), self.average.split(sizes), strict=True):
                p.copy_(mean.view_as(p))
        self.average = self.steps = None
        self._texts = None

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        texts = None if torch.is_grad_enabled() else self._texts
        if texts is None:
            texts = class_texts(self.network, self.task.names, self.task.templates)
        self._texts = texts.detach()
        return self.network.logit_scale.exp() * cosines(self.network.image(images), texts)

    def features(self, images: Tensor) -> Tensor:
        return self.network.image(images)

    def _trained(self) -> Iterator[Tensor]:
        return (p for p in self.network.parameters() if p.requires_grad)

    def _reference_images(self) -> Tensor:
        """The reference images of this step, the same on all workers."""
        assert self.reference is not None and self.steps is not None
        size, count = self._method.batch_size, len(self.reference)
        passed, place = divmod(int(self.steps), math.ceil(count / size))
        generator = torch.Generator().manual_seed(self._seed + passed)
        # Texts are scored over the images of a batch: parts of it would be another loss.
        rows = torch.randperm(count, generator=generator).split(size)[place].tolist()
        self.images_beside = 2 * len(rows)
        return self.reference.batch(rows)

    def _distilled(self) -> Tensor:
        """Both terms of the distillation; texts are those of the frozen tower on either side."""
        # Reading images is nothing to compile.
        read = cast("Callable[[], Tensor]", torch.compiler.disable(self._reference_images))
        images, zero_shot = read(), self._zero_shot[0]
        texts, scale = self._reference_texts, self.network.logit_scale.exp()
        assert texts is not None, "begin comes first"
        own = scale * cosines(self.network.image(images), texts)
        with torch.no_grad():
            target = scale * cosines(zero_shot.image(images), texts)
        temperature = self._method.temperature
        return distillation(target, own, temperature) + distillation(target.T, own.T, temperature)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        """Features [N, E] of unit length, of the zero-shot text tower."""
        zero_shot = self._zero_shot[0]
        parts = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
        return torch.cat([unit(zero_shot.text(zero_shot.tokenise(part))) for part in parts])


def distillation(target: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softened scores [B, N] against softened targets, times temperature squared.

    Its smallest value, where both agree, is the entropy of the target, not 0.
    """
    soft = (target / temperature).softmax(dim=1)
    return temperature**2 * F.cross_entropy(own / temperature, soft)
