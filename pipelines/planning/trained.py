"""The stages of trained methods: tasks in a chain or side by side, and predictions after each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from graftwork.operators.data.exemplars import shares
from graftwork.operators.data.scenario import rows_of, seen_classes
from graftwork.operators.errors import ConfigError
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import TrainHints
from graftwork.operators.parameters.learners import LearnerRef, MethodRef
from graftwork.operators.parameters.predictors import TrainedPart
from graftwork.operators.parameters.tasks import Columns, Memory, TaskData
from graftwork.operators.parameters.training import (
    JoinParameters,
    PredictParameters,
    ScoreParameters,
    TrainingData,
    TrainParameters,
)
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.hints import Hints
from graftwork.pipelines.planning.methods import Exemplars, Method, trained_facts
from graftwork.pipelines.planning.runs import Cell, Model, Run, Served

STATE = "state.safetensors"
"""File of a learner's state in a served model."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A stage that trains a task.

    Args:
        model: what it leaves.
        hints: of the stage.
    """

    model: Model
    hints: Hints[TrainHints]


def learned(cell: Cell) -> tuple[int, ...]:
    """Classes in the order learned."""
    return tuple(seen_classes(cell.stream, len(cell.stream) - 1))


def score(cell: Cell, training: Training) -> Stage:
    """Scores of a trained task on the rows that it was trained on."""
    resources, hints, model = cell.shared.spec.resources.extract, training.hints, training.model
    reading = replace(
        hints.value.reading,
        images=hints.value.reading.images // cell.method.training.epochs,
        cpus=resources.cpus,
    )
    group = f"score {cell.label}"
    return Stage(
        operator="score",
        parameters=to_json(
            ScoreParameters(
                learner=model.learner,
                data=model.data,
                numerics=cell.shared.numerics(resources.gpus, compile=False),
            )
        ),
        inputs={
            "model": (model.stage,),
            **{role: s for role, s in model.stage.inputs.items() if role != "previous"},
        },
        hints=Hints(replace(hints.value, reading=reading), hints.places),
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
        label=f"{group} {_place(model.learner.task)}",
        group=group,
    )


def predicted(cell: Cell, method: Method, models: Sequence[Model]) -> list[Stage]:
    """Predictions of each model: after its task, or after all for a method that sees all at once.

    Args:
        method: whose learner the models are states of.
    """
    shared, stream, facts = cell.shared, cell.stream, method.facts
    test, resources = shared.dataset.test, shared.spec.resources.extract
    group, predictions = f"predict {cell.label}", []
    for number, model in enumerate(models):
        after = tuple(range(len(stream))) if facts.upper_bound else (number,)
        shown = cell.described[: after[-1] + 1]
        images = sum(int(shared.counts(test, task).sum()) for task in shown)
        places = partial(rows_of, test.labels, test.domains, shown if facts.images else ())
        predictions.append(
            Stage(
                operator="predict",
                parameters=to_json(
                    PredictParameters(
                        learner=model.learner,
                        numerics=shared.numerics(resources.gpus, compile=False),
                        tasks=shown,
                        after=after,
                        vote_batch=method.training.vote_batch,
                    )
                ),
                inputs={
                    "model": (model.stage,),
                    "dataset": (test.stage(),),
                    "features": shared.features(test) if facts.query else (),
                },
                hints=shared.placed(shared.reading(images, resources.cpus), test, places),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"{group} task {after[-1] + 1}/{len(stream)}",
                group=group,
            )
        )
    return predictions


def served_learner(last: Model) -> Served:
    """A method's learner with what is stored after its last task."""
    learner = last.learner
    return Served(
        predictor=trained_part(learner),
        states={STATE: (last.stage, "")},
    )


def trained_part(learner: LearnerRef, within: str = "") -> TrainedPart:
    """A learner as a predictor.

    Args:
        within: name that its file begins with, as a part of another predictor.
    """
    return TrainedPart(
        method=learner.method,
        seed=learner.seed,
        task=learner.task,
        learned=learner.learned,
        state=f"{within}.{STATE}" if within else STATE,
    )


def chain(
    cell: Cell, method: MethodRef, parts: Sequence[TaskData], learned: Sequence[int]
) -> list[Training]:
    """One training per task, each with the one before as its input."""
    found: list[Training] = []
    for number in range(len(parts)):
        inputs = {"previous": tuple(each.model.stage for each in found[-1:])}
        found.append(_training(cell, method, parts, learned, number, inputs, cell.label))
    return found


def side_by_side(
    cell: Cell, parts: Sequence[TaskData], learned: Sequence[int]
) -> tuple[list[Model], list[Model]]:
    """One training per task, each on its own, and what joins them one after the other."""
    shared, method, train = cell.shared, cell.method, cell.shared.dataset.train
    resources, facts = shared.spec.resources.extract, cell.method.facts
    group = f"join {cell.label}"
    experts: list[Model] = []
    joins: list[Model] = []
    for number, part in enumerate(parts):
        before = tuple(join.stage for join in joins)
        inputs = {"first": before[:1]} if facts.shared else {}
        # A chain of one stage: a worker group for each, as many at once as the cluster has room.
        alone = f"{cell.label} expert {number + 1}"
        expert = _training(cell, method.description, parts, learned, number, inputs, alone).model
        stage = Stage(
            operator="join",
            parameters=to_json(
                JoinParameters(
                    learner=expert.learner,
                    data=expert.data,
                    numerics=shared.numerics(resources.gpus, compile=False),
                )
            ),
            inputs={
                "dataset": (train.stage(),),
                "previous": before[-1:],
                "expert": (expert.stage,),
                "features": shared.features(train) if facts.query else (),
            },
            # Whether a method looks at images once more is its own affair: none are announced.
            hints=shared.placed(
                shared.reading(0, resources.cpus),
                train,
                partial(rows_of, train.labels, train.domains, [part]),
            ),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"{group} {_place(expert.learner.task)}",
            group=group,
        )
        joins.append(Model(stage=stage, learner=expert.learner, data=expert.data))
        experts.append(expert)
    return experts, joins


def _training(
    cell: Cell,
    method: MethodRef,
    parts: Sequence[TaskData],
    learned: Sequence[int],
    number: int,
    inputs: dict[str, tuple[Stage, ...]],
    chain: str,
) -> Training:
    """The training of a task."""
    shared, train, part = cell.shared, cell.shared.dataset.train, parts[number]
    card, facts = cell.method.facts, trained_facts(method.hyperparameters)
    resources, plain = shared.spec.resources.train, facts.augmentation == "none"
    images = int(shared.counts(train, part).sum())
    memory: Memory | None = None
    inputs = {
        "dataset": (train.stage(),),
        **inputs,
        "features": shared.features(train) if card.query and plain else (),
    }
    # Of all that may be kept: a worker reads the exemplars alone.
    readable = [part]
    if facts.exemplars is not None and len(parts) > 1:
        memory = _memory(cell, facts.exemplars, parts[:number])
        # Of the first task too, which needs none: its group then trains the whole chain.
        inputs["exemplars"] = (shared.exemplars(facts.exemplars.selection, cell.seed),)
        images += _kept(cell, memory)
        readable = list(parts[: number + 1])
    reference = shared.reference if card.reference else None
    if reference is not None:
        inputs["reference"] = (reference.stage(),)
    learner = LearnerRef(
        method=method,
        seed=cell.seed,
        task=_columns(cell, parts, learned, number),
        learned=_seen(parts, learned, number),
        network=shared.network(),
        preprocessing=shared.preprocessing,
    )
    data = TrainingData(task=part, memory=memory, reference=reference and reference.texts)
    hints = shared.placed(
        TrainHints(
            reading=shared.reading(
                images * facts.epochs * (2 if card.query and not plain else 1), resources.cpus
            ),
            checkpoint_minutes=resources.checkpoint_minutes,
            reference=reference and reference.images.places(0, len(reference.images)),
        ),
        train,
        partial(rows_of, train.labels, train.domains, readable if card.images else []),
    )
    group = f"train {cell.label}"
    stage = Stage(
        operator="train",
        parameters=to_json(
            TrainParameters(
                learner=learner,
                data=data,
                augmentation=AUGMENTATIONS[facts.augmentation],
                numerics=shared.numerics(resources.gpus, compile=resources.compile),
            )
        ),
        inputs=inputs,
        hints=hints,
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus, workers=resources.workers),
        chain=chain,
        label=f"{group} {_place(learner.task)}",
        group=group,
    )
    return Training(model=Model(stage=stage, learner=learner, data=data), hints=hints)


def _place(task: Columns) -> str:
    """A task's place in the stream, for people."""
    return f"task {task.index + 1}/{task.count}"


def _seen(parts: Sequence[TaskData], learned: Sequence[int], number: int) -> tuple[int, ...]:
    """Classes of the tasks up to one, in the order learned."""
    return tuple(learned[: len({c for part in parts[: number + 1] for c in part.classes})])


def _columns(cell: Cell, parts: Sequence[TaskData], learned: Sequence[int], number: int) -> Columns:
    """Facts that the method may know about a task; class names and templates if it reads them."""
    shared, part, seen = cell.shared, parts[number], _seen(parts, learned, number)
    place = {c: column for column, c in enumerate(learned)}
    counts = shared.counts(shared.dataset.train, part)
    # A domain need not have images of every class.
    present = [c for c, count in zip(part.classes, counts, strict=True) if count]
    reads = cell.method.facts.network == "clip"
    return Columns(
        index=number,
        count=len(parts),
        current=tuple(sorted(place[c] for c in present)),
        before=len(_seen(parts, learned, number - 1)),
        seen=len(seen),
        names=tuple(shared.dataset.classes[c] for c in seen) if reads else None,
        templates=shared.templates if reads else None,
    )


def _memory(cell: Cell, exemplars: Exemplars, earlier: Sequence[TaskData]) -> Memory:
    """Images that a task may train on again.

    Raises:
        ConfigError: the budget leaves a class without a single image.
    """
    budget, kind = exemplars.count, exemplars.budget
    classes = len({c for task in earlier for c in task.classes})
    if kind == "total" and budget < classes:
        raise ConfigError(
            f"{cell.method.name} shares exemplars {budget} among {classes} classes, which "
            f"leaves none for some; give at least {classes}, or 0",
            key="methods",
        )
    return Memory(earlier=tuple(earlier), exemplars=budget, budget=kind)


def _kept(cell: Cell, memory: Memory) -> int:
    """Number of exemplars."""
    table = cell.shared.table(cell.shared.dataset.train)
    return sum(shares(table, memory.earlier, memory.exemplars, memory.budget).values())


def run_of(cell: Cell) -> Run:
    """Tasks in a chain, or side by side and then joined, and predictions after each."""
    facts = cell.method.facts
    parts = (_union(cell.described),) if facts.upper_bound else cell.described
    order, method = learned(cell), cell.method.description
    experts: list[Model] = []
    if facts.independent:
        experts, models = side_by_side(cell, parts, order)
    else:
        models = [each.model for each in chain(cell, method, parts, order)]
    predictions = predicted(cell, cell.method, models)
    alone, states = (tuple(model.stage for model in part) for part in (experts, models))
    # A vote over the neighbours in a batch is no prediction of an image.
    votes = facts.batch_information_at_test
    return cell.run(
        own=[*alone, *states, *predictions],
        model=states[-1],
        evaluated=cell.evaluated(method),
        inputs={
            "predictions": tuple(predictions),
            "model": states,
            **({"experts": alone} if alone else {}),
        },
        served=None if votes else served_learner(models[-1]),
        models=models,
    )


def _union(described: Sequence[TaskData]) -> TaskData:
    """All tasks as one."""
    return TaskData(
        classes=tuple(dict.fromkeys(c for task in described for c in task.classes)),
        domains=tuple(dict.fromkeys(d for task in described for d in task.domains)),
    )
