"""APER with adapters: adapted on the first task, then class means of two backbones."""

from dataclasses import dataclass
from typing import ClassVar

from graftwork.methods.contracts.adapted import Parts
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation
from graftwork.methods.parts import first_session, optim


@dataclass(frozen=True, kw_only=True)
class AperAdapter:
    """Trains adapters beside the MLPs on the first task; then class means of both features.

    Zhou et al., https://arxiv.org/abs/2303.07338 (APER, earlier ADAM), with the defaults of
    RevisitingCIL for CIFAR-100 in steps of five classes. Features of frozen and adapted backbone
    stand side by side, and SimpleCIL is fitted on them.
    Shapes: C classes seen, D feature width, R bottleneck.

    Args:
        epochs: passes over the images of the first task.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        weight_decay: of everything that is trained, classifier included.
        optimizer: optimiser of the first task.
        schedule: learning rate over the epochs.
        augmentation: of the training images.
        bottleneck: R, width of the adapters.
        dropout: of the adapters' hidden units.
    """

    card: ClassVar[Card] = Card(
        title="APER with adapters",
        paper="https://arxiv.org/abs/2303.07338",
        summary="Trains adapters on the first task; class means of both features.",
        memory="adapters (2 R D + R + D floats per block); C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )

    epochs: int = 20
    batch_size: int = 48
    lr: float = 0.01
    weight_decay: float = 5e-4
    optimizer: optim.OptimizerName = "sgd"
    schedule: optim.ScheduleName = "cosine"
    augmentation: Augmentation = "lamda"
    bottleneck: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(self, first_session.rules(self))

    def parts(self) -> Parts:
        """The first session, and SimpleCIL on the features of both backbones."""
        session = first_session.of("adapter", self)
        return Parts(first_session=session, classifier=("simplecil", {}), keeps_frozen=True)
