"""One method on one class order with one seed: what it is made of, and what becomes of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.fitting import EvaluateParameters, Measures
from graftwork.operators.parameters.hints import EvaluateHints
from graftwork.operators.parameters.learners import LearnerRef, MethodRef
from graftwork.operators.parameters.predictors import FittedPart, FusedPart, Part, TrainedPart
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.parameters.training import SinglePass, TrainingData
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.streams.scenario import OrderName
from graftwork.operators.streams.stream import Rows, Stream
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.reads import Hints, Reads
from graftwork.pipelines.planning.shared import Shared


@dataclass(frozen=True, kw_only=True)
class Model:
    """A stage that leaves the state of a learner after a task.

    Args:
        stage: the training, the join or the merge.
        learner: what the state belongs to.
        data: what the task is trained on.
        rows: the task's own training rows.
    """

    stage: Stage
    learner: LearnerRef
    data: TrainingData
    rows: Rows


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
    stream: Stream
    seed: int
    own: tuple[Stage, ...]
    model: Stage
    evaluate: Stage
    evaluated: EvaluateParameters
    served: Served | None = None
    parents: tuple["Run", ...] = ()
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Stages that a run is made of.

    Args:
        shared: what all runs share.
        stream: its tasks.
        grows: whether more tasks may come: what a longer stream goes on from is kept.
        measures: what is measured beside the measures of every run.
        single: of an online stream, the pass over the images of a section.
        mask: "batch" where training steps choose from the classes of their batch alone.
    """

    shared: Shared
    method: Method
    order: OrderName
    stream: Stream
    seed: int
    beside: Shared | None = None
    grows: bool = False
    measures: Measures | None = None
    single: SinglePass | None = None
    mask: Literal["batch"] | None = None

    @property
    def label(self) -> str:
        return f"{self.method.label} order {self.order} seed {self.seed}"

    @property
    def transfers(self) -> bool:
        """Tells whether later tasks are asked about, too."""
        return bool(self.shared.spec.transfer and self.method.facts.zero_shot)

    @property
    def tested(self) -> tuple[TaskData, ...]:
        """The test rows of the tasks."""
        return tuple(task.tested for task in self.stream.tasks)

    def evaluated(
        self, method: MethodRef, columns: tuple[int, ...] | None = None
    ) -> EvaluateParameters:
        """Stage that is evaluated.

        Args:
            method: a method, a merge or a rule.
            columns: of a fitted method, where one fit serves all class orders, its columns.
        """
        return EvaluateParameters(
            method=method,
            columns=columns,
            order=self.order,
            seed=self.seed,
            tasks=self.tested,
            measures=replace(self.measures or Measures(), transfer=True)
            if self.transfers
            else self.measures,
        )

    def run(
        self,
        *,
        own: Iterable[Stage],
        model: Stage,
        evaluated: EvaluateParameters,
        inputs: Mapping[str, tuple[Stage, ...]],
        served: Served | None,
        reads: Reads | None = None,
        beginnings: Callable[[], list[str]] = list,
        parents: Iterable[Run] = (),
        models: Iterable[Model] = (),
    ) -> Run:
        """The run, with its evaluation.

        Args:
            inputs: of the evaluation.
            reads: rows that it reads; None if it puts together what others predicted.
            beginnings: keys of the evaluations after fewer tasks, the longest first.
        """
        evaluate = self.evaluation(evaluated, inputs, reads, beginnings)
        return Run(
            method=self.method,
            order=self.order,
            stream=self.stream,
            seed=self.seed,
            own=tuple(own),
            model=model,
            evaluate=evaluate,
            evaluated=evaluated,
            served=served,
            parents=tuple(parents),
            models=tuple(models),
        )

    def evaluation(
        self,
        evaluated: EvaluateParameters,
        inputs: Mapping[str, tuple[Stage, ...]],
        reads: Reads | None = None,
        beginnings: Callable[[], list[str]] = list,
    ) -> Stage:
        """The stage of an evaluation; see `run`."""
        cpus = self.shared.spec.resources.fit.cpus
        return Stage(
            operator="evaluate",
            parameters=to_json(evaluated),
            inputs=inputs,
            reads=reads.stages() if reads else {},
            hints=Hints(
                EvaluateHints(cpus=cpus),
                beginnings=beginnings,
                **({"selection": reads.selection} if reads else {}),
            ),
            resources=Resources(cpus=cpus),
            label=f"evaluate {self.label}",
        )
