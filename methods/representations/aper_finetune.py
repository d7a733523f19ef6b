"""APER with fine-tuning: adapted on the first task, then class means of two backbones."""

from dataclasses import dataclass
from typing import ClassVar

from graftwork.methods.contracts.adapted import Parts
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.contracts.trained import Augmentation
from graftwork.methods.parts import first_session, optim


@dataclass(frozen=True, kw_only=True)
class AperFinetune:
    """Fine-tunes a copy of the backbone on the first task; then class means of both features.

    Zhou et al., https://arxiv.org/abs/2303.07338 (APER, earlier ADAM), with the defaults of
    RevisitingCIL for CIFAR-100 in steps of five classes. Features of frozen and adapted backbone
    stand side by side, and SimpleCIL is fitted on them.
    Shapes: C classes seen, D feature width.

    Args:
        epochs: passes over the images of the first task.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        weight_decay: of everything that is trained, classifier included.
        optimizer: optimiser of the first task.
        schedule: learning rate over the epochs.
        augmentation: of the training images.
    """

    card: ClassVar[Card] = Card(
        title="APER with fine-tuning",
        paper="https://arxiv.org/abs/2303.07338",
        summary="Fine-tunes a copy of the backbone on the first task; class means of both.",
        memory="a second backbone; C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.01
    weight_decay: float = 5e-4
    optimizer: optim.OptimizerName = "sgd"
    schedule: optim.ScheduleName = "cosine"
    augmentation: Augmentation = "lamda"

    def __post_init__(self) -> None:
        require(self, first_session.rules(self))

    def parts(self) -> Parts:
        """The first session, and SimpleCIL on the features of both backbones."""
        session = first_session.of("finetune", self)
        return Parts(first_session=session, classifier=("simplecil", {}), keeps_frozen=True)
