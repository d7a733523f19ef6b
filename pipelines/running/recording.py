"""Records of finished results: their runs in MLflow, and the stages of the report."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from graftwork.cluster.execution.executor import Outcome
from graftwork.cluster.execution.graph import walk
from graftwork.operators.errors import DamagedStage
from graftwork.operators.images.prefetch import prefetch
from graftwork.operators.keys import canonical
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.streams.stream import Stream
from graftwork.operators.tracking.records import (
    MODEL,
    MODEL_FILE,
    TASK,
    TASKS,
    VOTES,
    Artifacts,
)
from graftwork.operators.tracking.tracker import MethodRun
from graftwork.pipelines.planning.plan import Plan, Run
from graftwork.pipelines.reporting.content import Cost, StageResult, TaskResult
from graftwork.pipelines.running import served_model
from graftwork.pipelines.running.finished import Finished

MANIFESTS = 16
"""Manifests read at once: in an object store they wait, they do not compute."""


def method_run(plan: Plan, store: Store, finished: Finished, with_model: bool) -> MethodRun:
    """Content of a result's run in MLflow.

    Args:
        with_model: attach the model, so that `mlflow.pyfunc.load_model` can use it.
    """
    run, summary = finished.run, finished.summary
    stage = run.evaluate
    identity = served_model.model_identity(plan, run)

    def artifacts() -> Artifacts:
        from graftwork.pipelines.reporting import plots

        return {
            **(served_model.model(plan, store, run) if with_model and identity else {}),
            "predictions.parquet": store.read(stage.operator, stage.key, "predictions.parquet"),
            "class_order.json": canonical(run.stream.ids),
            "classes.json": canonical(run.stream.classes),
            "tasks.json": json.dumps(list(map(asdict, task_results(run.stream))), indent=1),
            **_made_of(finished.facts),
            **plots.method_artifacts(summary, range(len(run.stream.classes))),
        }

    return MethodRun(
        key=stage.key,
        name=f"{run.method.label} · order {run.order} · seed {run.seed}",
        params={
            "method": run.method.name,
            "order": str(run.order),
            "seed": run.seed,
            **run.method.hyperparameters,
        },
        metrics={
            **summary.finals(),
            "seconds": finished.seconds,
            "trainable_parameters": finished.facts["trainable_parameters"],
            "state_bytes": finished.facts["state_bytes"],
            "forwards": finished.facts["forwards"],
        },
        curves=summary.curves() | _training_curves(finished.facts["training"]),
        tags={
            "graftwork.backbone": plan.backbone.model,
            "graftwork.label": run.method.label,
            TASK: run.stream.tasks[-1].name,
            TASKS: str(len(run.stream.tasks)),
            **({MODEL: identity} if identity else {}),
            **({VOTES: "true"} if run.method.facts.batch_information_at_test else {}),
            **(
                {"graftwork.exemplars": str(run.method.facts.exemplars)}
                if run.method.facts.exemplars
                else {}
            ),
            # Tag graftwork.key of each of them.
            **(
                {"graftwork.parents": " ".join(parent.evaluate.key for parent in run.parents)}
                if run.parents
                else {}
            ),
        },
        artifacts=artifacts,
        files=["predictions.parquet", *([MODEL_FILE] if with_model and identity else [])],
        dataset=(plan.spec.pipeline, plan.data.digest[:16]),
        cached=finished.cached,
    )


def task_results(stream: Stream) -> list[TaskResult]:
    """The tasks of a stream, for people."""
    found, before = [], 0
    for task in stream.tasks:
        found.append(
            TaskResult(
                name=task.name,
                classes=[stream.classes[number] for number in task.train.classes],
                new=task.seen - before,
                training=len(task.train),
                test=len(task.test),
            )
        )
        before = task.seen
    return found


def _made_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Reports of a run's solves and trainings, as JSON files."""
    return {
        f"{name}.json": json.dumps(facts[name], indent=1)
        for name in ("fit", "training")
        if facts[name]
    }


def _training_curves(training: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Losses by epoch, over all tasks one after the other, and speed by task."""
    if not training:
        return {}
    epochs = [epoch for task in training for epoch in task["epochs"]]
    terms = {f"train_{name}": [epoch[name] for epoch in epochs] for name in epochs[0]}
    return terms | {"images_per_second": [task["images_per_second"] for task in training]}


def pipeline_params(plan: Plan) -> dict[str, Any]:
    """Parameters of the pipeline's run in MLflow."""
    spec, (training, test) = plan.spec, plan.data.counts
    return {
        "backbone": plan.backbone.model,
        "backbone_fingerprint": plan.backbone.fingerprint,
        "precision": spec.backbone.precision,
        "preprocessing": canonical(plan.preprocessing.to_json()),
        "scenario": spec.scenario.words if spec.scenario else "listed tasks",
        "initial": spec.scenario.initial if spec.scenario else None,
        "increment": spec.scenario.increment if spec.scenario else None,
        "methods": ", ".join(dict.fromkeys(run.method.label for run in plan.runs)),
        "training_images": training,
        "test_images": test,
    }


def needed_by(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Key of a stage -> positions of the runs that need it, ascending.

    A merge or an ensemble needs what its parents do not: their trainings are theirs.

    Args:
        runs: all runs of a plan, with the parents of each.
    """
    reached = {run.evaluate.key: {s.key for s in walk([run.evaluate])} for run in runs}
    found: dict[str, list[int]] = defaultdict(list)
    for position, run in enumerate(runs):
        parents = (reached[parent.evaluate.key] for parent in run.parents)
        for key in reached[run.evaluate.key].difference(*parents):
            found[key].append(position)
    return found


def stage_results(plan: Plan, store: Store, outcome: Outcome) -> list[StageResult]:
    """State of each stage, and its cost in this run and when it was computed."""
    # What another run stored meanwhile did not cost this one anything.
    computed = {key: done for key, done in outcome.done.items() if not done.reused}
    stored = [stage for stage in plan.stages if stage.key not in computed]
    costs = prefetch(partial(_recorded, store), stored, workers=MANIFESTS)
    recorded = dict(zip((stage.key for stage in stored), costs, strict=True))
    results = needed_by(plan.runs)
    found: list[StageResult] = []
    for stage in plan.stages:
        done = computed.get(stage.key)
        now = _cost(done.seconds, done.facts) if done else Cost()
        found.append(
            StageResult(
                name=stage.label,
                operator=stage.operator,
                state="computed" if done else "cached",
                now=now,
                ever=now if done else recorded[stage.key],
                results=results[stage.key],
            )
        )
    return found


def _recorded(store: Store, stage: Stage) -> Cost | None:
    """Cost of a stored stage; None if it was cleared away, as its readers are stored."""
    try:
        manifest = store.manifest(stage.operator, stage.key)
    except DamagedStage:
        return None
    return _cost(manifest["seconds"], manifest["facts"])


def _cost(seconds: float, facts: Mapping[str, Any]) -> Cost:
    return Cost(seconds=seconds, images=facts.get("images_forwarded", 0))
