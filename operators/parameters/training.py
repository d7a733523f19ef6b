"""Parameters of the operators of trained methods: train, join, score, predict and blend."""

from dataclasses import dataclass, field

from graftwork.operators.images.augmentation import Augmentation
from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, named
from graftwork.operators.parameters.learners import LearnerRef, MethodRef, Numerics
from graftwork.operators.parameters.tasks import Memory, TaskData


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rows that a task is trained on.

    Args:
        task: its own images.
        memory: exemplars of earlier tasks; None for none.
        reference: texts of no task, for a method that asks for them; their images are an input.
    """

    task: TaskData = field(metadata=named("images"))
    memory: Memory | None = field(default=None, metadata=OPTIONAL)
    reference: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class TrainParameters:
    """Parameters of `train`.

    Args:
        learner: what is trained.
        data: on what.
        augmentation: of the training images.
        numerics: of the training.
    """

    learner: LearnerRef = field(metadata=INLINE)
    data: TrainingData = field(metadata=INLINE)
    augmentation: Augmentation
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class JoinParameters:
    """Parameters of `join`.

    Args:
        learner: what the expert is joined to.
        data: what the expert was trained on.
        numerics: of the joining.
    """

    learner: LearnerRef = field(metadata=INLINE)
    data: TrainingData = field(metadata=INLINE)
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class ScoreParameters:
    """Parameters of `score`.

    Args:
        learner: the branch that scores.
        data: what it was trained on.
        numerics: of the forward passes.
    """

    learner: LearnerRef = field(metadata=INLINE)
    data: TrainingData = field(metadata=INLINE)
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class PredictParameters:
    """Parameters of `predict`.

    Args:
        learner: what predicts.
        numerics: of the forward passes.
        tasks: up to the last one of `after`.
        after: numbers of the tasks that the predictions stand for.
        vote_batch: images per batch of a method that decides by the batch; None decides each image
            on its own.
    """

    learner: LearnerRef = field(metadata=INLINE)
    numerics: Numerics
    tasks: tuple[TaskData, ...]
    after: tuple[int, ...]
    vote_batch: int | None


@dataclass(frozen=True, kw_only=True)
class BlendParameters:
    """Parameters of `blend`.

    Args:
        method: the fused method.
        learned: class ids of the columns.
        tasks: up to the last one of `after`.
        after: numbers of the tasks that the predictions stand for.
    """

    method: MethodRef
    learned: tuple[int, ...]
    tasks: tuple[TaskData, ...]
    after: tuple[int, ...]
