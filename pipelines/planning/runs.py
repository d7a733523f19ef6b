"""One method on one class order with one seed: what it is made of, and what becomes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from graftwork.operators.data.scenario import OrderName, StreamTask, seen_classes
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.fitting import EvaluateParameters
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.learners import LearnerRef, MethodRef
from graftwork.operators.parameters.predictors import FittedPart, FusedPart, Part, TrainedPart
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.parameters.training import TrainingData
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.shared import Shared


@dataclass(frozen=True, kw_only=True)
class Model:
    """A stage that leaves the state of a learner after a task.

    Args:
        stage: the training, the join or the merge.
        learner: what the state belongs to.
        data: what the task is trained on.
    """

    stage: Stage
    learner: LearnerRef
    data: TrainingData


@dataclass(frozen=True, kw_only=True)
class Served:
    """Model that a run predicts with in the end, to be used outside of the pipeline.

    Args:
        predictor: what it is made of; file names stand for states.
        states: file name -> the stage that holds the state, and the prefix of its tensors' names
            there.
        beside: of the second network, if a part of the predictor is on it.
    """

    predictor: Part
    states: dict[str, tuple[Stage, str]]
    beside: Shared | None = None

    def within(self, name: str) -> "Served":
        """As a part of another predictor: its files begin with a name."""
        return replace(
            self,
            predictor=_within(self.predictor, name),
            states={f"{name}.{file}": held for file, held in self.states.items()},
        )


def _within(part: Part, name: str) -> Part:
    """A predictor whose files begin with a name."""
    if isinstance(part, TrainedPart):
        return _trained_within(part, name)
    if isinstance(part, FusedPart):
        return replace(
            part,
            state=f"{name}.{part.state}",
            clip=_trained_within(part.clip, name),
            vit=_trained_within(part.vit, name),
        )
    assert isinstance(part, FittedPart), "an ensemble is no part of another predictor"
    graft = part.graft and replace(part.graft, state=f"{name}.{part.graft.state}")
    return replace(part, state=f"{name}.{part.state}", graft=graft)


def _trained_within(part: TrainedPart, name: str) -> TrainedPart:
    return replace(part, state=f"{name}.{part.state}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one class order with one seed.

    Args:
        own: its stages before the evaluation: a fit, or trainings (and joins) and predictions.
        model: the stage that holds what it predicts with in the end.
        evaluate: what the run is for.
        evaluated: its parameters.
        served: what it predicts with; None if that takes more than an image, as a vote over the
            test batch does.
        parents: runs whose models or scores it combines.
        models: what there is to merge: the learner's state after every task.
    """

    method: Method
    order: OrderName
    tasks: tuple[StreamTask, ...]
    seed: int
    own: tuple[Stage, ...]
    model: Stage
    evaluate: Stage
    evaluated: EvaluateParameters
    served: Served | None = None
    parents: tuple["Run", ...] = ()
    models: tuple[Model, ...] = ()

    @property
    def classes(self) -> list[int]:
        """Ids of the classes seen in the end, ascending."""
        return sorted(seen_classes(self.tasks, len(self.tasks) - 1))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Stages that a run is made of.

    Args:
        shared: what all runs share.
        stream: its tasks.
        described: the same as keys hold them.
    """

    shared: Shared
    method: Method
    order: OrderName
    stream: tuple[StreamTask, ...]
    described: tuple[TaskData, ...]
    seed: int
    beside: Shared | None = None

    @property
    def label(self) -> str:
        return f"{self.method.label} order {self.order} seed {self.seed}"

    @property
    def num_classes(self) -> int:
        return len(self.shared.dataset.classes)

    def evaluated(self, method: MethodRef, separable: bool | None = None) -> EvaluateParameters:
        """Stage that is evaluated.

        Args:
            method: a method, a merge or a rule.
            separable: of a fitted method, whether one fit on all classes predicts.
        """
        return EvaluateParameters(
            method=method,
            separable=separable,
            order=self.order,
            seed=self.seed,
            num_classes=self.num_classes,
            tasks=self.described,
        )

    def run(
        self,
        *,
        own: Iterable[Stage],
        model: Stage,
        evaluated: EvaluateParameters,
        inputs: Mapping[str, tuple[Stage, ...]],
        served: Served | None,
        parents: Iterable[Run] = (),
        models: Iterable[Model] = (),
    ) -> Run:
        """The run, with its evaluation.

        Args:
            inputs: of the evaluation.
        """
        cpus = self.shared.spec.resources.fit.cpus
        evaluate = Stage(
            operator="evaluate",
            parameters=to_json(evaluated),
            inputs=inputs,
            hints=to_json(CpuHints(cpus=cpus)),
            resources=Resources(cpus=cpus),
            label=f"evaluate {self.label}",
        )
        return Run(
            method=self.method,
            order=self.order,
            tasks=self.stream,
            seed=self.seed,
            own=tuple(own),
            model=model,
            evaluate=evaluate,
            evaluated=evaluated,
            served=served,
            parents=tuple(parents),
            models=tuple(models),
        )


def task_data(task: StreamTask) -> TaskData:
    """A task as keys hold it: without its place in the stream."""
    return TaskData(classes=task.classes, domains=task.domains)
