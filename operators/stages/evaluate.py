"""Predictions of a method on the test images after every task, and their metrics.

One row per prediction; every metric is derived from these rows. The label space after a task is
exactly the classes seen so far; neither the task's identity nor the batch is known to the method.

Shapes: N rows, C classes seen.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import DamagedStage
from graftwork.operators.evaluation import metrics
from graftwork.operators.evaluation.fitted_scores import FittedScores
from graftwork.operators.formats import predictions, selection
from graftwork.operators.formats.manifests import EvaluationFacts, StageFacts, facts_of
from graftwork.operators.keys import canonical
from graftwork.operators.parameters.as_json import from_json, to_json
from graftwork.operators.parameters.fitting import EvaluateParameters, Measures
from graftwork.operators.parameters.hints import EvaluateHints
from graftwork.operators.store import Store

NO_ROWS = SplitIndex.empty().digest
"""Digest of the test rows of a task that has none."""


def run(work: Assignment, store: Store) -> Result:
    """The operator `evaluate`: predictions and the summary of their metrics.

    Those of a fitted method are made here of cached features; those of a trained one were made by
    `predict` stages, and are put together.

    Raises:
        DamagedStage: an input is damaged.
    """
    parameters = from_json(EvaluateParameters, work.parameters)
    hints = from_json(EvaluateHints, work.hints)
    torch.set_num_threads(max(1, int(hints.cpus)))
    if stored := work.inputs("predictions"):
        table = predictions.join(predictions.read(store, *stage) for stage in stored)
    else:
        table = _predict(parameters, work, store, hints)
    classes = parameters.tasks[-1].seen
    assert classes is not None, "test rows say how many classes are known"
    measures = parameters.measures or Measures()
    summary = metrics.summarise(
        table,
        len(parameters.tasks),
        classes,
        {group.name: group.classes for group in measures.groups},
        measures.online,
        [number for number, task in enumerate(parameters.tasks) if task.rows == NO_ROWS],
    )
    if measures.transfer:
        tables = _ahead(work, store, table, len(parameters.tasks))
        summary = replace(summary, ahead=metrics.ahead(tables, len(parameters.tasks)))
    encoded = predictions.encode(table, canonical(parameters.order), parameters.seed)
    return Result(
        files={
            "predictions.parquet": encoded,
            "summary.json": canonical(summary.to_json()).encode(),
        },
        facts={**summary.finals(), **to_json(_facts(work, store))},
    )


def _predict(
    parameters: EvaluateParameters, work: Assignment, store: Store, hints: EvaluateHints
) -> predictions.Table:
    """Predictions of a fitted method after every task."""
    given = hints.selection
    tasks = selection.of(work, store, given, parameters.tasks)
    rows, true_task = selection.joined(tasks), selection.numbers(tasks)
    matrix = selection.matrix(work, store, given, rows)
    assert matrix is not None, "a fitted method is evaluated on cached features"
    scores = FittedScores(parameters, work, store, rows, matrix)
    tables, begun = _beginning(store, hints)
    for number, task in list(enumerate(parameters.tasks))[begun:]:
        assert task.seen is not None, "test rows say how many classes are known"
        own = scores.after(number, predictions.shown(true_task, number), task.seen)
        tables.append(predictions.decide(rows.index, parameters.tasks, true_task, number, own))
    return predictions.join(tables)


def _ahead(
    work: Assignment, store: Store, table: predictions.Table, tasks: int
) -> list[predictions.Table]:
    """Predictions on the test images of all tasks, among all classes, after each task.

    Those of a method that nothing trains are the ones after the last task, whatever it has seen.
    """
    if stored := work.inputs("ahead"):
        return [predictions.read(store, *stage) for stage in stored]
    last = table["task_trained"] == tasks - 1
    return [{name: column[last] for name, column in table.items()}] * tasks


def _beginning(store: Store, hints: EvaluateHints) -> tuple[list[predictions.Table], int]:
    """Predictions that an evaluation after fewer tasks made, and the number of these tasks."""
    for key in hints.beginnings:
        try:
            if store.has("evaluate", key):
                table = predictions.read(store, "evaluate", key)
                return [table], int(table["task_trained"].max()) + 1
        except DamagedStage:
            continue  # made again; who reads it has it computed again
    return [], 0


def _facts(work: Assignment, store: Store) -> EvaluationFacts:
    """Sums the costs of a run over the stages that are its own."""

    def facts(*roles: str) -> list[StageFacts]:
        return [facts_of(store, *stage) for role in roles for stage in work.inputs(role)]

    models, first, beside = facts("model"), facts("first_session"), facts("beside")
    made = facts("predictions", "branches", "scores")
    if not models:  # an ensemble: its predictions are all that it has
        models, made = made, []
    learning = [*first, *facts("experts"), *models]
    everything = [*learning, *beside, *made]
    return EvaluationFacts(
        seconds_fitting=sum(each.seconds for each in everything),
        # A chain's newest state holds what the earlier ones did.
        state_bytes=sum(stages[-1].state_bytes for stages in (first, models, beside) if stages),
        # A join trains nothing; of two branches that are trained side by side, both count.
        trainable_parameters=_most_trained(learning) + _most_trained(beside),
        forwards=sum(each.images_forwarded for each in everything),
        fit=models[-1].fit,
        training=tuple(each.training for each in [*learning, *beside] if each.training),
    )


def _most_trained(stages: Iterable[StageFacts]) -> int:
    """The most parameters that one of some stages trained."""
    return max((each.trainable_parameters for each in stages), default=0)
