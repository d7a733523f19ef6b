"""What becomes of a finished result: an entry of the document, an MLflow run, a report's line."""

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.execution.executor import Outcome
from cluster.execution.graph import walk
from operators.data import sources
from operators.errors import DamagedStage
from operators.evaluation.metrics import Summary
from operators.images.prefetch import prefetch
from operators.images.preprocessing import Preprocessing
from operators.keys import canonical
from operators.serving import predictor
from operators.stage import Stage
from operators.store.store import Store, library_versions
from operators.tracking.records import Artifacts
from operators.tracking.tracker import MethodRun, RunIds
from pipelines.planning.plan import Plan, Run
from pipelines.planning.shared import Trunk
from pipelines.reporting import report as reports
from pipelines.spec.loading import Loaded

MANIFESTS = 16
"""Manifests read at once: in an object store they wait, they do not compute."""


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


def result(finished: Finished, ids: RunIds) -> dict[str, Any]:
    """One entry of the document's `results`."""
    run, summary = finished.run, finished.summary
    return {
        "method": run.method.name,
        "label": run.method.label,
        "hyperparameters": run.method.hyperparameters,
        "order": run.order,
        "seed": run.seed,
        "matrix": summary.matrix,
        "curve": summary.curve,
        **summary.finals(),
        "trainable_parameters": finished.facts["trainable_parameters"],
        "forwards": finished.facts["forwards"],
        "batch_information_at_test": run.method.card["batch_information_at_test"],
        "seconds": round(finished.seconds, 3),
        "cached": finished.cached,
        "mlflow_run_id": ids.methods.get(run.evaluate.key),
        "parents": [
            {
                "label": parent.method.label,
                "order": parent.order,
                "seed": parent.seed,
                "mlflow_run_id": ids.methods.get(parent.evaluate.key),
            }
            for parent in run.parents
        ],
    }


def method_run(plan: Plan, store: Store, finished: Finished, with_model: bool) -> MethodRun:
    """What MLflow shows of a result.

    Args:
        with_model: attach the model, so that `mlflow.pyfunc.load_model` can use it.
    """
    run, summary = finished.run, finished.summary
    stage = run.evaluate
    order = [c for task in run.tasks for c in task.classes]
    model = model_identity(plan, run)

    def artifacts() -> Artifacts:
        from pipelines.reporting import plots

        return {
            **(_model(plan, store, run) if with_model and model else {}),
            "predictions.parquet": store.read(stage.operator, stage.key, "predictions.parquet"),
            "class_order.json": canonical(order),
            **_made_of(finished.facts),
            **plots.method_artifacts(summary, list(dict.fromkeys(order))),
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
            **({"graftwork.model": model} if model else {}),
            **(
                {"graftwork.batch_information_at_test": "true"}
                if run.method.card["batch_information_at_test"]
                else {}
            ),
            **(
                {"graftwork.exemplars": str(run.method.card.get("exemplars"))}
                if run.method.card.get("exemplars")
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
        dataset=(plan.spec.pipeline, plan.dataset.train.digest[:16]),
        cached=finished.cached,
    )


def _made_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the solves and the trainings of a run reported."""
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


def model_identity(plan: Plan, run: Run) -> str | None:
    """Digest of what a run predicts with; None if no model is kept of it."""
    kept = plan.spec.tracking.models
    if run.served is None or kept == "none" or (kept == "fitted" and _trains(run)):
        return None
    return predictor.identity(*_description(plan, run))


def _trains(run: Run) -> bool:
    """Whether a network was trained for it, or for what it combines."""
    return run.method.trains or any(_trains(parent) for parent in run.parents)


def _model(plan: Plan, store: Store, run: Run) -> Artifacts:
    """The files of the run's MLflow model; none if the store has dropped a state meanwhile."""
    description, states = _description(plan, run)
    if not all(store.has(operator, key) for operator, key, _ in states.values()):
        return {}
    return predictor.model_files(store, description, states)


def _description(plan: Plan, run: Run) -> tuple[dict[str, Any], dict[str, predictor.Stored]]:
    """`model.json` of a run, and where the states are that it names."""
    assert run.served is not None
    beside = run.served.beside
    description = {
        "predictor": run.served.predictor,
        "columns": run.classes,
        "classes": list(plan.dataset.classes),
        **_network(plan),
        "dtype": plan.spec.features.dtype,
        **({predictor.BESIDE: _network(beside)} if beside else {}),
    }
    states = {
        name: (stage.operator, stage.key, prefix)
        for name, (stage, prefix) in run.served.states.items()
    }
    return description, states


def _network(of: Plan | Trunk) -> dict[str, Any]:
    """A network, and how images are prepared for it."""
    backbone = of.backbone
    fixed = backbone.data_config.get("fixed_input_size", False)
    return {
        "backbone": {
            "model": backbone.model,
            "weights": _place_of(backbone.weights, of.spec.backbone.weights == "builtin"),
            "pooling": backbone.pooling,
            "fingerprint": backbone.fingerprint,
            "image_size": backbone.image_size,
        },
        "preprocessing": of.preprocessing.to_json(),
        "size": backbone.data_config["input_size"][1] if fixed else None,
        "precision": of.spec.backbone.precision,
    }


def _place_of(weights: str, shipped: bool) -> str:
    """The backbone's weights, as any process on this machine can name them."""
    if shipped:
        return "builtin"
    return weights if weights in ("", "random") else sources.absolute(weights)


def pipeline_params(plan: Plan) -> dict[str, Any]:
    """Parameters of the pipeline's run in MLflow."""
    spec = plan.spec
    return {
        "backbone": plan.backbone.model,
        "backbone_fingerprint": plan.backbone.fingerprint,
        "precision": spec.backbone.precision,
        "preprocessing": canonical(plan.preprocessing.to_json()),
        "scenario": spec.scenario.kind,
        "initial": spec.scenario.initial,
        "increment": spec.scenario.increment,
        "methods": ", ".join(dict.fromkeys(run.method.label for run in plan.runs)),
        "training_images": len(plan.dataset.train),
        "test_images": len(plan.dataset.test),
    }


def report(
    plan: Plan,
    store: Store,
    loaded: Loaded,
    runs: Sequence[Finished],
    outcome: Outcome,
    document: Mapping[str, Any],
) -> str:
    """The HTML report of a finished run."""
    spec = plan.spec
    scenario = spec.scenario
    stream = runs[0].run.tasks
    sizes = [len(task.classes) for task in stream]
    facts = {
        "data": f"{len(plan.dataset.train):,} training and {len(plan.dataset.test):,} test images, "
        f"{len(plan.dataset.classes)} classes",
        "scenario": f"{scenario.kind.replace('_', ' ')}, {len(stream)} tasks of "
        + (
            f"{sizes[0]} classes"
            if len(set(sizes)) == 1
            else f"{min(sizes)} to {max(sizes)} classes"
        ),
        "backbone": f"{plan.backbone.model}, {spec.backbone.precision}, "
        f"{plan.backbone.width} features, state {plan.backbone.fingerprint[:12]}",
        "preprocessing": _in_words(plan.preprocessing),
    }
    return reports.render(
        reports.ReportData(
            pipeline=spec.pipeline,
            status=document["status"],
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            seconds=document["seconds"],
            images_forwarded=document["images_forwarded"],
            facts=facts,
            spec=loaded.text,
            results=[_method_result(found) for found in runs],
            stages=_stage_results(plan, store, outcome),
            environment=library_versions()
            | {"platform": platform.platform(), "cpus": str(os.cpu_count())},
        )
    )


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


def _stage_results(plan: Plan, store: Store, outcome: Outcome) -> list[reports.StageResult]:
    """What became of the stages, and what they took in this run and when they were computed."""
    # What another run stored meanwhile did not cost this one anything.
    computed = {key: done for key, done in outcome.done.items() if not done.reused}
    stored = [stage for stage in plan.stages if stage.key not in computed]
    costs = prefetch(partial(_recorded, store), stored, workers=MANIFESTS)
    recorded = dict(zip((stage.key for stage in stored), costs, strict=True))
    results = needed_by(plan.runs)
    found: list[reports.StageResult] = []
    for stage in plan.stages:
        done = computed.get(stage.key)
        now = _cost(done.seconds, done.facts) if done else reports.Cost()
        found.append(
            reports.StageResult(
                name=stage.label,
                operator=stage.operator,
                state="computed" if done else "cached",
                now=now,
                ever=now if done else recorded[stage.key],
                results=results[stage.key],
            )
        )
    return found


def _recorded(store: Store, stage: Stage) -> reports.Cost | None:
    """What a stored stage took; None if it was cleared away, as its readers are stored."""
    try:
        manifest = store.manifest(stage.operator, stage.key)
    except DamagedStage:
        return None
    return _cost(manifest["seconds"], manifest["facts"])


def _cost(seconds: float, facts: Mapping[str, Any]) -> reports.Cost:
    return reports.Cost(seconds=seconds, images=facts.get("images_forwarded", 0))


def _in_words(steps: Preprocessing) -> str:
    """The steps of a preprocessing, for people."""
    words = []
    if steps.resize:
        words.append(f"resize to {steps.resize} ({steps.interpolation})")
    if steps.crop:
        words.append(f"centre crop {steps.crop}")
    if (steps.mean, steps.std) == ((0.0,) * 3, (1.0,) * 3):
        return ", ".join([*words, "not normalised"])
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (steps.mean, steps.std))
    return ", ".join([*words, f"mean {mean}", f"std {std}"])


def _method_result(found: Finished) -> reports.MethodResult:
    run, summary = found.run, found.summary
    return reports.MethodResult(
        method=run.method.name,
        hyperparameters=run.method.hyperparameters,
        order=str(run.order),
        seed=run.seed,
        matrix=summary.matrix,
        curve=summary.curve,
        task_curve=summary.task_curve,
        metrics=summary.finals(),
        trainable_parameters=found.facts["trainable_parameters"],
        seconds=found.seconds,
        cached=found.cached,
    )
