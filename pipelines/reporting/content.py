"""The content of a report: results, stages and what they cost, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of stages.

    Args:
        seconds: times of their operators, added up whether they ran side by side or not.
        images: images that went through a network, each as often as it did.
    """

    seconds: float = 0.0
    images: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(seconds=self.seconds + other.seconds, images=self.images + other.images)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task of the stream.

    Args:
        classes: names of those that it has training images of.
        new: how many of these no task before had.
        training, test: its images.
    """

    name: str
    classes: Sequence[str]
    new: int
    training: int
    test: int


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method with one class order and one seed. Accuracies in percent.

    Args:
        order: name of the class order.
        matrix, curve, task_curve: as `operators.evaluation.metrics.Summary` has them.
        metrics: `a_avg`, `a_last`, `forgetting`, `bwt`, `task_a_avg`, and variants.
        seconds: fit or training, and evaluation, whenever they were computed.
    """

    method: str
    hyperparameters: Mapping[str, Any]
    order: str
    seed: int
    matrix: Sequence[Sequence[float | None]]
    curve: Sequence[float]
    task_curve: Sequence[float]
    metrics: Mapping[str, float]
    trainable_parameters: int
    seconds: float
    cached: bool


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One stage of the graph.

    Args:
        state: computed, cached or failed.
        now: what it took in this run; nothing if it was stored.
        ever: what it took when it was computed; None if the store no longer knows.
        results: positions in `ReportData.results` of those that need it; a merge or an ensemble
            counts for what it needs beyond its parents.
    """

    name: str
    operator: str
    state: str
    now: Cost
    ever: Cost | None
    results: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything in the report; all texts are escaped when rendered.

    Args:
        status: succeeded, failed or interrupted.
        created: date and time as shown.
        seconds: wall-clock time of the run.
        images_forwarded: images that this run sent through a network.
        facts: shown at the top, such as data, scenario and backbone.
        spec: the resolved spec as YAML.
        environment: versions and hardware.
        tasks: those of the first class order.
    """

    pipeline: str
    status: str
    created: str
    seconds: float
    images_forwarded: int
    facts: Mapping[str, str]
    spec: str
    results: Sequence[MethodResult]
    stages: Sequence[StageResult]
    environment: Mapping[str, str] = field(default_factory=dict)
    tasks: Sequence[TaskResult] = ()
