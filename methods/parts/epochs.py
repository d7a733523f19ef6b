"""The hyper-parameters that nearly all trained methods have: their meaning, ranges and recipe.

A method includes the dataclasses whose fields it has and declares again only what is different, a
default or a sentence. They hold values and no behaviour; `rules` and `usual_recipe` are functions.
Fields are listed from the last base to the first: `(Clipped, Decayed, Epochs)` begins with epochs.
A default is in the keys of all methods that do not declare it again.
"""

from dataclasses import dataclass

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.trained import Recipe
from graftwork.methods.parts import optim


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps of an optimiser, in several passes over the same rows.

    Args:
        epochs: passes over the images of a task.
        batch_size: images per step, of all workers together.
        lr: learning rate.
        optimizer: optimiser, new for every task.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.01
    optimizer: optim.OptimizerName = "sgd"


@dataclass(frozen=True, kw_only=True)
class Scheduled(Steps):
    """Steps whose learning rate follows a curve over the epochs.

    Args:
        schedule: learning rate over the epochs of a task.
    """

    schedule: optim.ScheduleName = "cosine"


@dataclass(frozen=True, kw_only=True)
class Epochs(Scheduled):
    """Passes over images, which may be augmented.

    Args:
        augmentation: of the training images.
    """

    augmentation: Augmentation = "lamda"


@dataclass(frozen=True, kw_only=True)
class Decayed:
    """Weight decay; a method's own docstring says of what.

    Args:
        weight_decay: of everything that is trained.
    """

    weight_decay: float = 5e-4


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """Gradients of bounded length.

    Args:
        clip: largest norm of all gradients together; 0 does not clip.
    """

    clip: float = 0.0


def rules(method: Steps) -> dict[str, tuple[bool, str]]:
    """Rules for `require` of those fields of this module that a method has."""
    found = {
        "epochs": (method.epochs >= 1, "at least 1"),
        "batch_size": (method.batch_size >= 1, "at least 1"),
        "lr": (method.lr > 0, "above 0"),
    }
    if isinstance(method, Decayed):
        found["weight_decay"] = (method.weight_decay >= 0, "at least 0")
    if isinstance(method, Clipped):
        found["clip"] = (method.clip >= 0, "at least 0")
    return found


def usual_recipe(method: Scheduled) -> Recipe:
    """The recipe that says what the fields say; what has no field is left out.

    Without `Decayed` nothing decays, and without `augmentation` images are as they are tested.
    """
    return Recipe(
        epochs=method.epochs,
        batch_size=method.batch_size,
        augmentation=method.augmentation if isinstance(method, Epochs) else "none",
        optimizer=optim.optimizer(
            method.optimizer,
            method.lr,
            method.weight_decay if isinstance(method, Decayed) else 0.0,
        ),
        schedule=optim.schedule(method.schedule),
        clip=method.clip if isinstance(method, Clipped) else 0.0,
    )
