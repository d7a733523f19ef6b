"""Stages of a merge: statistics, merged states, predictions with them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from graftwork.operators.data import sources
from graftwork.operators.data.holdout import sampled
from graftwork.operators.errors import ConfigError, IncompatibleError
from graftwork.operators.keys import program_digest
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.combining import MergeParameters, StatisticsParameters
from graftwork.operators.parameters.hints import NetworkHints
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.planning.combinations import Combined, Weighing
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.reads import Hints
from graftwork.pipelines.planning.runs import Cell, Model, Run
from graftwork.pipelines.planning.shared import Shared
from graftwork.pipelines.planning.trained import predicted, served_learner


def merge(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """A merged state after every task, its predictions, and their evaluation."""
    chains = [run.models for run in parents]
    count = len(chains[0])
    if entry.asked.over == "tasks":
        if count < 2:
            raise ConfigError(
                "the stream has one task; nothing to merge", key=f"{entry.asked.path}.over"
            )
        series = [chains[0][: number + 1] for number in range(count)]
    else:
        series = [tuple(chain[number] for chain in chains) for number in range(count)]
    merged: list[Model] = []
    measured: dict[str, tuple[Stage, ...]] = {}
    for number, models in enumerate(series):
        if entry.most:
            models = models[-entry.most :]
        for model in models:
            if entry.weighing is not None and model.stage.key not in measured:
                measured[model.stage.key] = _statistics(
                    cell, entry.weighing, model, parents[-1].method
                )
        merged.append(_merge_stage(cell, entry, models, measured, f"{number + 1}/{count}"))
    stages = [model.stage for model in merged]
    predictions = predicted(cell, parents[-1].method, merged)
    used = [stage for found in measured.values() for stage in found]
    votes = cell.method.facts.batch_information_at_test
    return cell.run(
        own=[*used, *stages, *predictions],
        model=stages[-1],
        evaluated=cell.evaluated(entry.operator),
        inputs={"predictions": tuple(predictions), "model": tuple(stages)},
        served=None if votes else served_learner(merged[-1]),
        parents=parents,
    )


def check(shared: Shared, entry: Combined, parents: Sequence[Run], memo: Memo) -> None:
    """Refuses a merge of methods whose models hold other tensors; asks the memo first.

    Raises:
        IncompatibleError: they do not fit together; the tensors are named.
    """
    if entry.asked.section != "merge" or entry.asked.over != "methods":
        return
    learners = [replace(run.models[-1].learner, seed=0) for run in parents]
    preimage = {
        "kind": "mergeable",
        "learners": [to_json(learner) for learner in learners],
        "source": program_digest(),
    }
    known = memo.get(preimage)
    if known is None:
        # It imports torch.
        from graftwork.operators.stages.merge import mismatch

        known = mismatch(learners, shared.where()).encode()
        memo.put(preimage, known)
    if known:
        raise IncompatibleError(known.decode(), key=f"{entry.asked.path}.of")


def _merge_stage(
    cell: Cell,
    entry: Combined,
    models: Sequence[Model],
    measured: Mapping[str, tuple[Stage, ...]],
    task: str,
) -> Model:
    shared, newest = cell.shared, models[-1]
    cpus, group = shared.spec.resources.fit.cpus, f"merge {cell.label}"
    stage = Stage(
        operator="merge",
        parameters=to_json(
            MergeParameters(
                learner=newest.learner,
                start=models[0].learner.task,
                merge=entry.operator,
                head=entry.asked.head,
                over=entry.asked.over,
            )
        ),
        inputs={
            "models": tuple(model.stage for model in models),
            **(
                {f"statistics {i}": measured[model.stage.key] for i, model in enumerate(models)}
                if measured
                else {}
            ),
        },
        hints=to_json(NetworkHints(network=shared.where(), cpus=cpus)),
        resources=Resources(cpus=cpus),
        label=f"{group} task {task}",
        group=group,
    )
    return Model(stage=stage, learner=newest.learner, data=newest.data, rows=newest.rows)


def _statistics(cell: Cell, weighing: Weighing, model: Model, method: Method) -> tuple[Stage, ...]:
    """Sums over shards of the images that a model was trained on last."""
    shared, learner, rows = cell.shared, model.learner, model.rows
    resources, size = shared.spec.resources.extract, shared.spec.features.shard_size
    total = min(weighing.images, len(rows))
    query = shared.kind() if method.facts.query else None
    reads = shared.reads([rows], frozen=query is not None)

    def places(start: int, stop: int) -> dict[str, Any]:
        chosen = np.zeros(len(rows), dtype=bool)
        sample = sampled(rows.index.digests, np.arange(len(rows)), weighing.images)
        chosen[sample[start:stop]] = True
        return sources.together(rows.at(chosen).places())

    shards = [(start, min(start + size, total)) for start in range(0, total, size)]
    about = f"{method.label} order {cell.order} seed {learner.seed}"
    group = f"{weighing.statistics.kind} statistics of {about}"
    return tuple(
        Stage(
            operator="statistics",
            parameters=to_json(
                StatisticsParameters(
                    learner=learner,
                    task=model.data.task,
                    query=query,
                    limit=weighing.images,
                    shard=(start, stop),
                    statistics=weighing.statistics,
                    numerics=shared.numerics(resources.gpus, compile=False),
                )
            ),
            inputs={"model": (model.stage,)},
            reads=reads.stages(),
            hints=Hints(
                shared.reading(stop - start, resources.cpus),
                places=partial(places, start, stop),
                selection=reads.selection,
            ),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"{group} task {learner.task.index + 1} shard {number + 1}/{len(shards)}",
            group=group,
        )
        for number, (start, stop) in enumerate(shards)
    )
