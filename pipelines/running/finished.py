"""A finished run as the store holds it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.operators.evaluation.metrics import Summary
from graftwork.operators.store import Store
from graftwork.operators.tracking.tracker import RunIds
from graftwork.pipelines.planning.plan import Run
from graftwork.pipelines.reporting.document import Parent, Result


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A result that is stored.

    Args:
        run: what was asked for.
        summary: its metrics.
        seconds: time of its fit and its evaluation, whenever they were computed.
        facts: facts of the evaluation.
        cached: it was stored before this run began.
    """

    run: Run
    summary: Summary
    seconds: float
    facts: Mapping[str, Any]
    cached: bool


def read(store: Store, run: Run, cached: bool) -> Finished:
    """A stored result.

    Raises:
        DamagedStage: it is damaged.
    """
    stage = run.evaluate
    manifest = store.manifest(stage.operator, stage.key)
    summary = json.loads(store.read(stage.operator, stage.key, "summary.json", manifest))
    return Finished(
        run=run,
        summary=Summary.from_json(summary),
        seconds=manifest["seconds"] + manifest["facts"]["seconds_fitting"],
        facts=manifest["facts"],
        cached=cached,
    )


def result(finished: Finished, ids: RunIds) -> Result:
    """A stored result as a run returns it."""
    run = finished.run
    return Result(
        method=run.method.name,
        label=run.method.label,
        hyperparameters=run.method.hyperparameters,
        order=run.order,
        seed=run.seed,
        summary=finished.summary,
        trainable_parameters=finished.facts["trainable_parameters"],
        forwards=finished.facts["forwards"],
        batch_information_at_test=run.method.facts.batch_information_at_test,
        seconds=finished.seconds,
        cached=finished.cached,
        mlflow_run_id=ids.methods.get(run.evaluate.key),
        parents=tuple(
            Parent(
                label=parent.method.label,
                order=parent.order,
                seed=parent.seed,
                mlflow_run_id=ids.methods.get(parent.evaluate.key),
            )
            for parent in run.parents
        ),
    )
