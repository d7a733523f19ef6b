"""The main job: plan, compute what is missing, record, report.

Everything that takes long is in the store before it is reported, so a run may be killed at any
moment; the same command then continues.
"""

import json
import time
import uuid
from functools import partial

from graftwork.cluster.execution.executor import Event, Outcome, execute
from graftwork.cluster.indexing import OnCluster
from graftwork.cluster.sessions.lasting import Lasting
from graftwork.cluster.sessions.session import connect
from graftwork.operators.errors import DamagedStage, Interrupted
from graftwork.operators.housekeeping import RUNS
from graftwork.operators.store import Store
from graftwork.operators.tracking import uri as tracking_uri
from graftwork.operators.tracking.tracker import Tracker
from graftwork.pipelines.explaining import explain, sealed
from graftwork.pipelines.planning import sources
from graftwork.pipelines.planning.plan import Plan, Run, make_plan
from graftwork.pipelines.reporting.document import Document, Records, StageCounts
from graftwork.pipelines.running import recording, report_data, served_model
from graftwork.pipelines.running.finished import Finished, read, result
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.running.where import Where
from graftwork.pipelines.spec.loading import Loaded


def run_pipeline(loaded: Loaded, where: Where, display: Display) -> Document:
    """Runs a spec to its end.

    Raises:
        GraftworkError: with the exit status that belongs to it; what was computed is kept.
    """
    with Lasting(partial(connect, where.address, insecure=where.insecure)) as connection:
        return _run(loaded, where, display, connection)


def _run(loaded: Loaded, where: Where, display: Display, connection: Lasting) -> Document:
    """Runs a spec to its end, on Ray where that is needed: to index much, and to compute."""
    started = time.perf_counter()
    uri, pipeline = where.tracking_uri(), loaded.spec.pipeline
    store = Store(where.store)
    store.probe()
    tracker = Tracker(uri, pipeline, where.journal())
    tracker.check()
    with display.indexing():
        plan = make_plan(loaded, store.memo, OnCluster(connection))
    sources.keep(plan.sources, store.memo)
    sources.seal(plan.sources, plan.stages, store.memo)
    for run in plan.runs:
        _set_aside_if_damaged(store, run, display)
    missing = plan.missing(plan.stored(store))
    with loaded.locating():
        sealed.refuse(sealed.gone(plan, missing))
    _write_run_record(plan, store)
    training, test = plan.data.counts
    display.say(
        f"{pipeline}: {training} training and {test} test images, "
        f"{len(plan.data.classes)} classes, {len(plan.runs)} runs, {len(plan.stages)} stages"
    )
    for line in (plan.left_out, *sources.remarks(plan.sources)):
        if line:
            display.say(line)
    tracker.start(
        name=time.strftime("%Y-%m-%d %H:%M:%S"),
        params=recording.pipeline_params(plan),
        tags={"graftwork.pipeline": pipeline},
        artifacts={"spec.yaml": loaded.text},
    )
    status = "FAILED"
    try:
        finished: dict[str, Finished] = {}
        images = sum(map(plan.images, missing))
        outcome = _compute(plan, store, connection, display, tracker, finished, images)
        runs = [finished[run.evaluate.key] for run in plan.runs]
        seconds = time.perf_counter() - started
        images = int(outcome.fact("images_forwarded"))
        report = report_data.report(plan, store, loaded, runs, outcome, seconds, images)
        report_name = f"reports/{pipeline}.html"
        store.blobs.replace(report_name, report.encode())
        tracker.log(
            metrics={
                "seconds": round(seconds, 3),
                "images_forwarded": images,
                "stages_computed": outcome.computed,
                "stages_cached": outcome.cached,
            },
            artifacts={"report.html": report, "graph.mmd": explain.mermaid(plan, store)},
        )
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        # The user who stopped the run is waiting; the next run sends what is not sent now.
        ids = tracker.finish(status, patience=0.5 if status == "KILLED" else 3.0)
    if ids.unsent:
        display.say(
            f"{ids.unsent} records wait for MLflow and are sent by the next run: {ids.problem}"
        )
    display.say(f"report: {store.blobs.root}/{report_name}")
    return Document(
        pipeline=pipeline,
        seconds=seconds,
        stages=StageCounts(total=outcome.total, computed=outcome.computed, cached=outcome.cached),
        images_forwarded=images,
        results=tuple(result(found, ids) for found in runs),
        mlflow=Records(
            tracking_uri=tracking_uri.mask(uri),
            experiment_id=ids.experiment_id,
            run_id=ids.run_id,
        ),
    )


def _write_run_record(plan: Plan, store: Store) -> None:
    """Names the stages of this run, so that `cache gc --unused` keeps them."""
    name = f"{RUNS}/{plan.spec.pipeline}/{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex}.json"
    record = {"created": time.time(), "stages": [stage.key for stage in plan.stages]}
    store.blobs.put(name, json.dumps(record).encode())


def _compute(
    plan: Plan,
    store: Store,
    connection: Lasting,
    display: Display,
    tracker: Tracker,
    finished: dict[str, Finished],
    images: int,
) -> Outcome:
    """Computes what is missing, and hands every result on as soon as it is stored.

    Args:
        images: that go through a network, for people.
    """
    runs = {run.evaluate.key: run for run in plan.runs}
    modelled: set[str] = set()
    reads = {stage.key: run.evaluate.key for run in plan.runs for stage in run.own}

    def on_event(event: Event) -> None:
        display.event(event)
        key = event.stage.key
        if event.kind == "finished":
            owner = key if key in runs else reads.get(key)
            tracker.stage(event.stage.label, event.seconds, event.facts, method=owner)
        if key in runs and event.kind in ("cached", "finished"):
            finished[key] = read(store, runs[key], cached=event.kind == "cached")
            # Seeds that share a fit share its model.
            model = served_model.model_identity(plan, runs[key])
            new = model is not None and model not in modelled
            modelled.add(model or "")
            tracker.method_run(recording.method_run(plan, store, finished[key], with_model=new))

    with display.stages(len(plan.stages), images):
        try:
            return execute(plan.targets, store, connect=connection, on_event=on_event)
        finally:
            connection.close()


def _set_aside_if_damaged(store: Store, run: Run, display: Display) -> None:
    """Reads a stored result whole before it is served: a damaged one is computed again."""
    stage = run.evaluate
    if not store.has(stage.operator, stage.key):
        return
    try:
        store.verify(stage.operator, stage.key)
    except DamagedStage as error:
        display.say(f"damaged: {stage.label}: {error}; set aside and computed again")
        store.quarantine(stage.operator, stage.key)
