"""Parameters of the operators that combine models: statistics, merge and ensemble."""

from dataclasses import dataclass, field
from typing import Literal

from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, named
from graftwork.operators.parameters.features import FeatureKind
from graftwork.operators.parameters.learners import LearnerRef, MethodRef, Numerics
from graftwork.operators.parameters.tasks import Columns, TaskData


@dataclass(frozen=True, kw_only=True)
class StatisticsKind:
    """Sums that a merge weighs models with.

    Args:
        kind: diagonal Fisher information, or Gram matrices.
        labels: of the Fisher information: "model_sample", "model_expectation" or "ground_truth".
    """

    kind: Literal["fisher", "gram"]
    labels: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class StatisticsParameters:
    """Parameters of `statistics`.

    Args:
        learner: the model.
        task: the images that it was trained on last.
        query: features that come from the cache; None where the images are looked at.
        limit: as many of them at most.
        shard: the first of these, and the one after the last.
        statistics: which sums.
        numerics: of the forward passes.
    """

    learner: LearnerRef = field(metadata=INLINE)
    task: TaskData = field(metadata=named("images"))
    query: FeatureKind | None = field(default=None, metadata=OPTIONAL)
    limit: int
    shard: tuple[int, int]
    statistics: StatisticsKind
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class MergeParameters:
    """Parameters of `merge`.

    Args:
        learner: the newest model, whose layout the result has.
        start: what the oldest model knew of its task.
        merge: the merge.
        head: what happens to classifiers; None takes the newest where the state before training
            lacks rows.
        over: what the models differ in: "tasks", "seeds" or "methods".
    """

    learner: LearnerRef = field(metadata=INLINE)
    start: Columns
    merge: MethodRef
    head: Literal["merge", "newest"] | None = field(default=None, metadata=OPTIONAL)
    over: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of an ensemble.

    Args:
        method: a method or a merge.
        columns: as `EvaluateParameters.columns`.
        seed: of its run.
    """

    method: MethodRef
    columns: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)
    seed: int


@dataclass(frozen=True, kw_only=True)
class EnsembleParameters:
    """Parameters of `ensemble`.

    Args:
        rule: the rule.
        members: the models that it combines.
        tasks: the test rows, in learning order.
    """

    rule: MethodRef
    members: tuple[Member, ...]
    tasks: tuple[TaskData, ...]
