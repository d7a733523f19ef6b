"""Parameters of the operators of trained methods: train, join, score, predict and blend."""

from dataclasses import dataclass, field

from graftwork.methods.contracts.batches import Walk
from graftwork.operators.images.augmentation import Augmentation
from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, named
from graftwork.operators.parameters.features import FeatureKind, Ranking
from graftwork.operators.parameters.learners import LearnerRef, MethodRef, Numerics
from graftwork.operators.parameters.tasks import Budget, TaskData


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The exemplars of a task.

    Args:
        earlier: the tasks before, in learning order.
        exemplars: how many may be kept, of all classes together or of each.
        budget: which of the two.
        ranking: which ones.
        order: digest of the rows of the tasks before and of the task itself, as they stand one
            after the other.
    """

    earlier: tuple[TaskData, ...]
    exemplars: int
    budget: Budget
    ranking: Ranking
    order: str


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rows that a task is trained on.

    Args:
        task: its own images.
        memory: exemplars of earlier tasks; None for none.
        query: features that come from the cache; None where the images are looked at.
        reference: texts of no task, for a method that asks for them; their images are an input.
    """

    task: TaskData = field(metadata=named("images"))
    memory: Memory | None = field(default=None, metadata=OPTIONAL)
    query: FeatureKind | None = field(default=None, metadata=OPTIONAL)
    reference: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SinglePass:
    """A single pass over the images of a task, whatever a method's own number of epochs is.

    Args:
        batch_size: images of a step, of all workers together.
        times: steps on each batch, one after the other.
    """

    batch_size: int
    times: int


@dataclass(frozen=True, kw_only=True)
class TrainParameters:
    """Parameters of `train`.

    Args:
        learner: what is trained.
        data: on what.
        augmentation: of the training images.
        numerics: of the training.
        single: of an online stream, how its images are passed over; None for the method's epochs.
    """

    learner: LearnerRef = field(metadata=INLINE)
    data: TrainingData = field(metadata=INLINE)
    augmentation: Augmentation
    numerics: Numerics
    single: SinglePass | None = field(default=None, metadata=OPTIONAL)


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
        query: features that come from the cache; None where the images are looked at.
        tasks: test rows, up to the last one of `after`.
        after: numbers of the tasks that the predictions stand for.
        vote_batch: images per batch of a method that decides by the batch; None decides each image
            on its own.
        walk: how such batches are cut, see `methods.contracts.batches`; None without them.
    """

    learner: LearnerRef = field(metadata=INLINE)
    numerics: Numerics
    query: FeatureKind | None = field(default=None, metadata=OPTIONAL)
    tasks: tuple[TaskData, ...]
    after: tuple[int, ...]
    vote_batch: int | None
    walk: Walk | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class BlendParameters:
    """Parameters of `blend`.

    Args:
        method: the fused method.
        tasks: test rows, up to the last one of `after`.
        after: numbers of the tasks that the predictions stand for.
    """

    method: MethodRef
    tasks: tuple[TaskData, ...]
    after: tuple[int, ...]
