"""Content of the report on finished runs."""

import os
import platform
import time
from collections.abc import Sequence

from graftwork.cluster.execution.executor import Outcome
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.store import Store
from graftwork.operators.versions import library_versions
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.reporting.content import MethodResult, ReportData
from graftwork.pipelines.reporting.report import render
from graftwork.pipelines.running.finished import Finished
from graftwork.pipelines.running.recording import stage_results, task_results
from graftwork.pipelines.spec.loading import Loaded


def report(
    plan: Plan,
    store: Store,
    loaded: Loaded,
    runs: Sequence[Finished],
    outcome: Outcome,
    seconds: float,
    images_forwarded: int,
) -> str:
    """The HTML report of a finished run, which took `seconds`."""
    spec = plan.spec
    cut = spec.scenario.words if spec.scenario else "listed"
    training, test = plan.data.counts
    stream = runs[0].run.stream.tasks
    sizes = [len(task.train.classes) for task in stream]
    facts = {
        "data": f"{training:,} training and {test:,} test images, {len(plan.data.classes)} classes",
        "scenario": f"{cut}, {len(stream)} tasks of "
        + (
            f"{sizes[0]} classes"
            if len(set(sizes)) == 1
            else f"{min(sizes)} to {max(sizes)} classes"
        ),
        "backbone": f"{plan.backbone.model}, {spec.backbone.precision}, "
        f"{plan.backbone.width} features, state {plan.backbone.fingerprint[:12]}",
        "preprocessing": _in_words(plan.preprocessing),
    }
    return render(
        ReportData(
            pipeline=spec.pipeline,
            status="succeeded",
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            seconds=round(seconds, 3),
            images_forwarded=images_forwarded,
            facts=facts,
            spec=loaded.text,
            results=[_method_result(found) for found in runs],
            stages=stage_results(plan, store, outcome),
            environment=library_versions()
            | {"platform": platform.platform(), "cpus": str(os.cpu_count())},
            tasks=task_results(runs[0].run.stream),
        )
    )


def _in_words(steps: Preprocessing) -> str:
    """The steps of a preprocessing, for people."""
    words = []
    if steps.resize:
        edges = f"{steps.resize}x{steps.resize}" if steps.stretch else steps.resize
        words.append(f"resize to {edges} ({steps.interpolation})")
    if steps.crop:
        words.append(f"centre crop {steps.crop}")
    if (steps.mean, steps.std) == ((0.0,) * 3, (1.0,) * 3):
        return ", ".join([*words, "not normalised"])
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (steps.mean, steps.std))
    return ", ".join([*words, f"mean {mean}", f"std {std}"])


def _method_result(found: Finished) -> MethodResult:
    run, summary = found.run, found.summary
    return MethodResult(
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
