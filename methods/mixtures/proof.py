"""PROOF: projections behind a frozen CLIP that grow with the tasks, and a cross-modal fusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftwork.methods.contracts import exemplars
from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.exemplars import Budget, Selection
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Learner, Recipe, Task, TaskImages
from graftwork.methods.mixtures.proof_fusion import Comparison, Fusion
from graftwork.methods.networks.clip import Clip, phrases
from graftwork.methods.parts.epochs import Decayed, Scheduled, rules, usual_recipe


@dataclass(frozen=True, kw_only=True)
class PROOF(Decayed, Scheduled):
    """Linear projections per task behind both towers of a frozen CLIP, summed, then fused.

    Zhou et al., https://arxiv.org/abs/2305.19270. A score is the sum of three similarities: of
    image and text, and, after an attention layer that sees the image, all texts, all prototypes
    and learned context, of image and text and of image and prototype.
    Shapes: B batch, C classes seen, E joint width, T tasks so far.

    Args:
        epochs: passes over the features of a task and its exemplars.
        lr: learning rate of everything that is trained.
        optimizer: optimiser.
        schedule: learning rate over the epochs.
        exemplars: images of earlier tasks that are kept.
        exemplar_budget: of all classes together, or of each class.
        exemplar_selection: how the images are chosen.
        context_length: learned context vectors per task.
        dropout: of the attention and of what comes out of it.
        train_selection: compares a training image with texts and prototypes as they are beside it
            in the attention, or with their mean over the batch of a step.
        eval_selection: the same of a test image; the mean is then that of `batch_size` images of
            one walk over all tasks. The authors' code takes means in training and at test time.
        freeze_text_projections: train only the newest projection of texts, as the paper says; the
            authors' code goes on training all of them.
        normalise_at_test: give the projected image unit length at test time too.
        plain_scale: factor on the similarity of image and text before the attention.
        text_scale: factor on the similarity of image and text after it.
        prototype_scale: factor on the similarity of image and prototype after it.
    """

    card: ClassVar[Card] = Card(
        title="PROOF",
        paper="https://arxiv.org/abs/2305.19270",
        summary="Projections per task behind a frozen CLIP, summed, and one attention over "
        "image, texts and prototypes.",
        memory="T * (2 * E * (E + 1) + 3 * E) + 4 * E * E + 3 * E + C * (E + 1) + 1 floats; images",
        version=2,
        exemplars=2000,
        uses_seed=True,
        growth="tasks",
        query=True,
        images=False,
        network="clip",
        contract="trained",
    )

    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    exemplars: int = 2000
    exemplar_budget: Budget = "total"
    exemplar_selection: Selection = "herding"
    context_length: int = 3
    dropout: float = 0.1
    train_selection: Comparison = "instance"
    eval_selection: Comparison = "instance"
    freeze_text_projections: bool = False
    normalise_at_test: bool = False
    plain_scale: float = 1.0
    text_scale: float = 1.0
    prototype_scale: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            rules(self)
            | {
                **exemplars.rules(self),
                "context_length": (self.context_length >= 0, "at least 0"),
                "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            },
        )

    def neighbours(self) -> Neighbours | None:
        if self.eval_selection == "instance":
            return None
        return Neighbours(size=self.batch_size, walk="stream")

    def recipe(self, task: Task) -> Recipe:
        return usual_recipe(self)

    def learner(self, network: Clip, task: Task) -> "ProofLearner":
        return ProofLearner(network, task, self)


class ProofLearner(Learner[Clip]):
    """CLIP's features of images and texts, and what is trained behind them.

    Args:
        network: frozen; images come as queries, so that only its text tower is run, once.
        task: t.
        method: hyper-parameters.
    """

    needs_query = True

    def __init__(self, network: Clip, task: Task, method: PROOF) -> None:
        super().__init__(network, task)
        self.fusion = Fusion(network.num_features, task.index + 1, task.seen, method)
        self.scale = nn.Parameter(network.logit_scale.detach().clone())
        self._texts: Tensor | None = None

    def prepare(self, data: TaskImages) -> None:
        new = ~data.exemplars
        features = data.map(lambda images, query: given(query))[new]
        device = self.fusion.prototypes.device
        self.fusion.remember(features.to(device), data.targets[new].to(device))

    def texts(self) -> Tensor:
        """Frozen text features [C, P, E] of the classes in P templates, not of unit length."""
        if self._texts is None:
            names = self.task.names
            with torch.no_grad():
                parts = [
                    self.network.text(self.network.tokenise(phrases(names, template)))
                    for template in self.task.templates
                ]
            self._texts = torch.stack(parts, dim=1).float()
        return self._texts

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        with torch.autocast(targets.device.type, enabled=False):
            return self.fusion.losses(given(query), self.texts(), targets, self.scale, self.task)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        with torch.autocast(self.scale.device.type, enabled=False):
            return self.fusion.scores(given(query), self.texts())


def given(query: Tensor | None) -> Tensor:
    """The query, which is always there."""
    assert query is not None, "needs_query is set"
    return query.float()
