"""The stages of trained methods: tasks in a chain or side by side, and predictions after each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from graftwork.operators.data import sources
from graftwork.operators.data.exemplars import shares
from graftwork.operators.errors import ConfigError
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import TrainHints
from graftwork.operators.parameters.learners import LearnerRef, MethodRef
from graftwork.operators.parameters.predictors import TrainedPart
from graftwork.operators.parameters.tasks import Columns
from graftwork.operators.parameters.training import (
    JoinParameters,
    Memory,
    PredictParameters,
    ScoreParameters,
    SinglePass,
    TrainingData,
    TrainParameters,
)
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.streams.stream import Rows, described, union
from graftwork.pipelines.planning.methods import Exemplars, Method, trained_facts
from graftwork.pipelines.planning.reads import Hints
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


def score(cell: Cell, training: Training) -> Stage:
    """Scores of a trained task on the rows that it was trained on."""
    resources, hints, model = cell.shared.spec.resources.extract, training.hints, training.model
    reading = replace(
        hints.value.reading,
        images=hints.value.reading.images // _passes(cell, cell.method.training.epochs),
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
        reads=model.stage.reads,
        hints=Hints(replace(hints.value, reading=reading), **hints.later),
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
        label=f"{group} task {model.learner.task.index + 1}/{len(cell.stream.tasks)}",
        group=group,
    )


def predicted(cell: Cell, method: Method, models: Sequence[Model]) -> list[Stage]:
    """Predictions of each model: after its task, or after all for a method that sees all at once.

    Args:
        method: whose learner the models are states of.
    """
    last, every = len(cell.stream.tasks) - 1, method.facts.upper_bound
    return [
        _prediction(cell, method, model, tuple(range(last + 1)) if every else (number,))
        for number, model in enumerate(models)
    ]


def ahead(cell: Cell, models: Sequence[Model]) -> list[Stage]:
    """Predictions of each model on all tasks, of which it has not seen the later ones.

    The learner is asked about the classes of the whole stream, by their names.
    """
    stream = cell.stream
    names, last = stream.classes, len(stream.tasks) - 1
    return [
        _prediction(
            cell,
            cell.method,
            replace(
                model,
                learner=replace(
                    model.learner,
                    task=replace(model.learner.task, seen=len(names), names=names),
                ),
            ),
            (last,),
            f"ahead {number + 1}/{last + 1}",
        )
        for number, model in enumerate(models)
    ]


def _prediction(
    cell: Cell, method: Method, model: Model, after: tuple[int, ...], about: str = ""
) -> Stage:
    """Predictions of a model on the test images up to the last task of `after`.

    Args:
        about: which model it is, where `after` does not say so.
    """
    shared, tasks, facts = cell.shared, cell.stream.tasks, method.facts
    resources = shared.spec.resources.extract
    shown = [task.test for task in tasks[: after[-1] + 1]]
    reads = shared.reads(shown, frozen=facts.query)
    group, votes = f"predict {cell.label}", method.neighbours
    return Stage(
        operator="predict",
        parameters=to_json(
            PredictParameters(
                learner=model.learner,
                numerics=shared.numerics(resources.gpus, compile=False),
                query=shared.kind() if facts.query else None,
                tasks=cell.tested[: after[-1] + 1],
                after=after,
                vote_batch=votes and votes.size,
                walk=votes and votes.walk,
            )
        ),
        inputs={"model": (model.stage,)},
        reads=reads.stages(),
        hints=Hints(
            shared.reading(sum(map(len, shown)), resources.cpus),
            places=partial(places, shown if facts.images else ()),
            selection=reads.selection,
        ),
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
        label=f"{group} {about or f'task {after[-1] + 1}/{len(tasks)}'}",
        group=group,
    )


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
        learned=tuple(range(learner.task.seen)),
        state=f"{within}.{STATE}" if within else STATE,
    )


def places(tasks: Sequence[Rows]) -> dict[str, Any]:
    """Places of the images of some tasks, in the order in which a worker reads them."""
    return sources.together(union(tasks).places())


def chain(cell: Cell, method: MethodRef, parts: Sequence[Rows]) -> list[Training]:
    """One training per task, each with the one before as its input."""
    found: list[Training] = []
    for number in range(len(parts)):
        inputs = {"previous": tuple(each.model.stage for each in found[-1:])}
        found.append(_training(cell, method, parts, number, inputs, cell.label))
    return found


def side_by_side(cell: Cell, parts: Sequence[Rows]) -> tuple[list[Model], list[Model]]:
    """One training per task, each on its own, and what joins them one after the other."""
    shared, method = cell.shared, cell.method
    resources, facts = shared.spec.resources.extract, cell.method.facts
    group = f"join {cell.label}"
    experts: list[Model] = []
    joins: list[Model] = []
    for number, part in enumerate(parts):
        before = tuple(join.stage for join in joins)
        inputs = {"first": before[:1]} if facts.shared else {}
        # A chain of one stage: a worker group for each, as many at once as the cluster has room.
        alone = f"{cell.label} expert {number + 1}"
        expert = _training(cell, method.description, parts, number, inputs, alone).model
        reads = shared.reads([part], frozen=expert.data.query is not None)
        stage = Stage(
            operator="join",
            parameters=to_json(
                JoinParameters(
                    learner=expert.learner,
                    data=expert.data,
                    numerics=shared.numerics(resources.gpus, compile=False),
                )
            ),
            inputs={"previous": before[-1:], "expert": (expert.stage,)},
            reads=reads.stages(),
            # Whether a method looks at images once more is its own affair: none are announced.
            hints=Hints(
                shared.reading(0, resources.cpus),
                places=partial(places, [part]),
                selection=reads.selection,
            ),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"{group} task {number + 1}/{len(parts)}",
            group=group,
        )
        joins.append(Model(stage=stage, learner=expert.learner, data=expert.data, rows=expert.rows))
        experts.append(expert)
    return experts, joins


def _training(
    cell: Cell,
    method: MethodRef,
    parts: Sequence[Rows],
    number: int,
    inputs: dict[str, tuple[Stage, ...]],
    chain: str,
) -> Training:
    """The training of a task."""
    shared, part = cell.shared, parts[number]
    card, facts = cell.method.facts, trained_facts(method.hyperparameters)
    resources, plain = shared.spec.resources.train, facts.augmentation == "none"
    images, kept = len(part), facts.exemplars if len(parts) > 1 else None
    memory = _memory(cell, kept, parts[: number + 1]) if kept and number else None
    # Of all that may be kept: a worker reads the exemplars alone.
    readable = parts[: number + 1] if memory else [part]
    if memory:
        earlier = [rows.blocks for rows in readable[:-1]]
        images += sum(shares(earlier, memory.exemplars, memory.budget).values())
    query = shared.kind() if card.query and plain else None
    reads = shared.reads(readable, frozen=query is not None)
    reference = shared.reference if card.reference else None
    if reference is not None:
        inputs = inputs | {"reference": (reference.stage(),)}
    learner = LearnerRef(
        method=method,
        seed=cell.seed,
        task=_columns(cell, parts, number),
        network=shared.network(),
        preprocessing=shared.preprocessing,
    )
    data = TrainingData(
        task=described(part),
        memory=memory,
        query=query,
        reference=reference and reference.texts,
    )
    passes = _passes(cell, facts.epochs) * (2 if card.query and not plain else 1)
    reading = shared.reading(images * passes, resources.cpus)
    hints = Hints(
        TrainHints(
            reading=reading,
            tasks=len(parts),
            checkpoint_minutes=resources.checkpoint_minutes,
        ),
        places=partial(places, readable if card.images else ()),
        selection=reads.selection,
        **({"reference": partial(places, [reference.rows])} if reference else {}),
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
                single=_single(cell),
            )
        ),
        inputs=inputs,
        reads=reads.stages() | ({"exemplars": _ranks(cell, kept, parts)} if kept else {}),
        hints=hints,
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus, workers=resources.workers),
        chain=chain,
        label=f"{group} task {number + 1}/{len(parts)}",
        group=group,
    )
    return Training(model=Model(stage=stage, learner=learner, data=data, rows=part), hints=hints)


def _single(cell: Cell) -> SinglePass | None:
    """The pass over an online stream; what sees all tasks at once learns in its own epochs."""
    return None if cell.method.facts.upper_bound else cell.single


def _passes(cell: Cell, epochs: int) -> int:
    """Steps that see an image, which a method would see in so many epochs."""
    single = _single(cell)
    return epochs if single is None else single.times


def _columns(cell: Cell, parts: Sequence[Rows], number: int) -> Columns:
    """Facts that the method may know about a task; class names and templates if it reads them."""
    facts = cell.method.facts
    before, seen = (
        1 + max((r.classes[-1] for r in parts[:n]), default=-1) for n in (number, number + 1)
    )
    reads = facts.network in ("clip", "pair")
    return Columns(
        index=number,
        count=len(parts) if cell.method.needs.count else None,
        current=parts[number].classes,
        before=before,
        seen=seen,
        names=cell.stream.classes[:seen] if reads else None,
        templates=cell.shared.templates if reads else None,
        mask=None if facts.upper_bound else cell.mask,
    )


def _memory(cell: Cell, exemplars: Exemplars, parts: Sequence[Rows]) -> Memory:
    """Images that a task may train on again.

    Args:
        parts: the tasks before, and the task.

    Raises:
        ConfigError: the budget leaves a class without a single image.
    """
    budget, kind, earlier = exemplars.count, exemplars.budget, parts[:-1]
    classes = len({label for rows in earlier for label in rows.classes})
    if kind == "total" and budget < classes:
        raise ConfigError(
            f"{cell.method.name} shares exemplars {budget} among {classes} classes, which "
            f"leaves none for some; give at least {classes}, or 0",
            key="methods",
        )
    return Memory(
        earlier=tuple(map(described, earlier)),
        exemplars=budget,
        budget=kind,
        ranking=cell.shared.ranking(exemplars.selection, cell.seed),
        order=union(parts).digest,
    )


def _ranks(cell: Cell, exemplars: Exemplars, parts: Sequence[Rows]) -> tuple[Stage, ...]:
    """Ranks of the images of all tasks but the last, whichever task asks.

    A worker group trains on as long as nothing is missing that the next task reads.
    """
    ranking = cell.shared.ranking(exemplars.selection, cell.seed)
    return tuple(stage for rows in parts[:-1] for stage in cell.shared.ranks(ranking, rows))


def run_of(cell: Cell) -> Run:
    """Tasks in a chain, or side by side and then joined, and predictions after each."""
    facts, method = cell.method.facts, cell.method.description
    parts = [task.train for task in cell.stream.tasks]
    if facts.upper_bound:
        parts = [union(parts)]
    experts: list[Model] = []
    if facts.independent:
        experts, models = side_by_side(cell, parts)
    else:
        models = [each.model for each in chain(cell, method, parts)]
    predictions = predicted(cell, cell.method, models)
    further = ahead(cell, models) if cell.transfers else []
    alone, states = (tuple(model.stage for model in part) for part in (experts, models))
    # A vote over the neighbours in a batch is no prediction of an image.
    votes = facts.batch_information_at_test
    return cell.run(
        own=[*alone, *states, *predictions, *further],
        model=states[-1],
        evaluated=cell.evaluated(method),
        inputs={
            "predictions": tuple(predictions),
            "model": states,
            **({"ahead": tuple(further)} if further else {}),
            **({"experts": alone} if alone else {}),
        },
        served=None if votes else served_learner(models[-1]),
        models=models,
    )
