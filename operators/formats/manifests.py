"""Facts of stored stages that other stages read back.

They are in no key, and an older version of this program may have recorded fewer of them: what is
not there counts as none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.operators.store import Store


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Costs of the training of a task.

    Args:
        seconds: of the whole stage.
        epochs: mean of every loss term, per epoch.
        steps: of the optimiser.
        images_forwarded: images that went through the network.
        images_per_second: the same per second of training.
    """

    seconds: float
    epochs: tuple[Mapping[str, float], ...]
    steps: int
    images_forwarded: int
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """Costs of a stored stage, and what it left.

    Args:
        seconds: of its computation.
        images_forwarded: images that went through a network.
        state_bytes: of the tensors that it left.
        trainable_parameters: parameters that it trained.
        fit: of a fit, what the method reports of every task.
        training: of a training.
    """

    seconds: float
    images_forwarded: int = 0
    state_bytes: int = 0
    trainable_parameters: int = 0
    fit: tuple[Mapping[str, Any], ...] = ()
    training: TrainingFacts | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """Costs of a run, which its evaluation records next to the metrics.

    Args:
        seconds_fitting: of all its stages before the evaluation.
        state_bytes: of what it predicts with in the end.
        trainable_parameters: the most that were trained at once.
        forwards: images that went through a network.
        fit: what a closed-form method reports of every task.
        training: of the tasks that were trained.
    """

    seconds_fitting: float
    state_bytes: int
    trainable_parameters: int
    forwards: int
    fit: tuple[Mapping[str, Any], ...]
    training: tuple[TrainingFacts, ...]


def facts_of(store: Store, operator: str, key: str) -> StageFacts:
    """The facts of a stored stage.

    Raises:
        DamagedStage: its manifest is missing or altered.
    """
    manifest = store.manifest(operator, key)
    seconds, found = manifest["seconds"], manifest["facts"]
    training = None
    if operator == "train":
        training = TrainingFacts(
            seconds=seconds,
            epochs=tuple(found["epochs"]),
            steps=found["steps"],
            images_forwarded=found["images_forwarded"],
            images_per_second=found["images_per_second"],
        )
    return StageFacts(
        seconds=seconds,
        images_forwarded=found.get("images_forwarded", 0),
        state_bytes=found.get("state_bytes", 0),
        trainable_parameters=found.get("trainable_parameters", 0),
        fit=tuple(found.get("tasks", ())) if operator == "fit" else (),
        training=training,
    )
