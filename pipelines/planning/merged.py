"""Stages of a merge: statistics, merged states, predictions with them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from graftwork.operators.data.holdout import sampled
from graftwork.operators.data.scenario import rows_of
from graftwork.operators.errors import ConfigError
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.combinations import Combined
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Run
from graftwork.pipelines.planning.trained import predicted, served_learner

LEARNER = ("method", "seed", "task", "learned", "architecture", "backbone", "preprocessing")
"""Parameters of a training that say what its state belongs to."""


def merge(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """A merged state after every task, its predictions, and their evaluation."""
    # Of tasks that were trained side by side, what they were joined to.
    kinds = ["join" if run.method.card["independent"] else "train" for run in parents]
    chains = [
        [stage for stage in run.own if stage.operator == kind]
        for run, kind in zip(parents, kinds, strict=True)
    ]
    count = len(chains[0])
    if entry.asked.over == "tasks":
        if count < 2:
            raise ConfigError(
                "the stream has one task; nothing to merge", key=f"{entry.asked.path}.over"
            )
        series = [chains[0][: number + 1] for number in range(count)]
    else:
        series = [[chain[number] for chain in chains] for number in range(count)]
    merged, measured = [], {}
    for number, models in enumerate(series):
        if most := entry.card["most"]:
            models = models[-most:]
        if entry.card["statistics"]:
            for model in models:
                if model.key not in measured:
                    measured[model.key] = _statistics(cell, entry, model, parents[-1].method)
        merged.append(_merge_stage(cell, entry, models, measured, f"{number + 1}/{count}"))
    predictions = predicted(cell, parents[-1].method, merged)
    evaluate = cell.evaluation(
        {"method": entry.operator}, {"predictions": tuple(predictions), "model": tuple(merged)}
    )
    used = [stage for stages in measured.values() for stage in stages]
    votes = cell.method.card["batch_information_at_test"]
    served = None if votes else served_learner(merged[-1])
    return cell.run([*used, *merged, *predictions], merged[-1], evaluate, served, parents)


def _merge_stage(
    cell: Cell,
    entry: Combined,
    models: Sequence[Stage],
    measured: Mapping[str, tuple[Stage, ...]],
    task: str,
) -> Stage:
    shared = cell.shared
    cpus = shared.spec.resources.fit.cpus
    return Stage(
        operator="merge",
        parameters={
            **{name: models[-1].parameters[name] for name in LEARNER},
            "start": models[0].parameters["task"],
            "merge": entry.operator,
            "head": entry.asked.head,
            "over": entry.asked.over,
        },
        inputs={
            "models": tuple(models),
            **(
                {f"statistics {i}": measured[model.key] for i, model in enumerate(models)}
                if measured
                else {}
            ),
        },
        hints={**shared.where(), "cpus": cpus},
        resources=Resources(cpus=cpus),
        label=f"merge {cell.label} task {task}",
    )


def _statistics(cell: Cell, entry: Combined, model: Stage, method: Method) -> tuple[Stage, ...]:
    """Sums over shards of the images that a model was trained on last."""
    shared, split = cell.shared, cell.shared.dataset.train
    given, part = entry.operator["hyperparameters"], model.parameters["images"]
    resources, size = shared.spec.resources.extract, shared.spec.features.shard_size
    total = min(given["images"], int(shared.counts(split, part).sum()))

    def rows(start: int, stop: int) -> Any:
        whole = rows_of(split.labels, split.domains, [part])
        return sampled(split.digests, whole, given["images"])[start:stop]

    shards = [(start, min(start + size, total)) for start in range(0, total, size)]
    about = f"{method.label} order {cell.order} seed {model.parameters['seed']}"
    return tuple(
        Stage(
            operator="statistics",
            parameters={
                **{name: model.parameters[name] for name in LEARNER},
                "images": part,
                "limit": given["images"],
                "shard": [start, stop],
                "statistics": {
                    "kind": entry.card["statistics"],
                    **({"labels": given["labels"]} if "labels" in given else {}),
                },
                "numerics": {**shared.numerics(resources.gpus), "compile": False},
            },
            inputs={
                "model": (model,),
                "dataset": (split.stage(),),
                "features": shared.features(split) if method.card["query"] else (),
            },
            hints=shared.hints(
                split, partial(rows, start, stop), images=stop - start, cpus=resources.cpus
            ),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"{entry.card['statistics']} statistics of {about} task "
            f"{model.parameters['task']['index'] + 1} shard {number + 1}/{len(shards)}",
        )
        for number, (start, stop) in enumerate(shards)
    )
