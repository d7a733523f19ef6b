"""Runs pipelines on one machine without Ray: a few processes take what is ready.

    python benchmarks/without_ray.py SPEC [SPEC ...] --store STORE [--processes N] [--set KEY=VALUE]
        [--json FILE] [--seconds N]

For machines with a GPU on which Ray is not installed. Keys, stages and results are those of
`graftwork run`; MLflow and the report are left out, and chains are not fused: every task of a chain
is a stage of its own. Specs run one after the other, in the same processes. A stage that fails ends
its spec, not the others. After `--seconds` nothing more is started; what is finished is printed.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from graftwork.cluster.execution.chain_worker import Progress
from graftwork.cluster.execution.executor import Event, run
from graftwork.cluster.execution.graph import needed
from graftwork.cluster.execution.policy import Failure, Kind, Policy
from graftwork.cluster.execution.schedule import Schedule
from graftwork.cluster.execution.worker import Done, run_stage
from graftwork.operators.errors import GraftworkError
from graftwork.operators.stage import OPERATORS, Stage
from graftwork.operators.store import Store
from graftwork.pipelines.planning.plan import make_plan
from graftwork.pipelines.running import finished
from graftwork.pipelines.spec.loading import load_resolved


class TimeIsUp(Exception):
    """No time is left to start more."""


class Processes:
    """A `cluster.executor.Pool` of processes on this machine."""

    def __init__(self, store: Store, count: int) -> None:
        self.slots = count
        self._store = store
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        self._running: dict[Future[Done], str] = {}

    def submit(self, stage: Stage) -> None:
        future = self._pool.submit(
            run_stage, OPERATORS[stage.operator], stage.assignment(), self._store, threads=1
        )
        self._running[future] = stage.key

    def wait(self, timeout: float) -> Sequence[tuple[str, Done | Failure | Progress]]:
        ended, _ = wait(self._running, timeout, FIRST_COMPLETED)
        return [(self._running.pop(future), self._result(future)) for future in ended]

    def _result(self, future: Future[Done]) -> Done | Failure:
        try:
            return future.result()
        except GraftworkError as error:
            return Failure(Kind.FAILED, str(error), error)

    def cancel(self) -> None:
        for future in self._running:
            future.cancel()
        wait(self._running, 15)
        self._running.clear()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--store", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    store = Store(options.store)
    store.probe()
    pool = Processes(store, options.processes)
    ends = time.monotonic() + options.seconds
    found: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        found.append(result)
        print(line(result), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(found))

    try:
        for spec in options.specs:
            compute(spec, options.set, store, pool, ends, keep)
    finally:
        pool.close()


def compute(
    spec: str,
    changes: list[str],
    store: Store,
    pool: Processes,
    ends: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Hands on the results of a spec as they come, and says what took the time."""
    started = time.monotonic()
    stages: dict[str, list[float]] = {}
    forwarded = 0
    try:
        plan = make_plan(load_resolved(spec, changes), store.memo)
        runs = {r.evaluate.key: r for r in plan.runs}

        def on_event(event: Event) -> None:
            nonlocal forwarded
            if time.monotonic() > ends:
                raise TimeIsUp(f"after {time.monotonic() - started:.0f} s: no time is left")
            if event.kind == "finished":
                stages.setdefault(event.stage.operator, []).append(event.seconds)
                forwarded += event.facts.get("images_forwarded", 0)
            if event.stage.key in runs and event.kind in ("cached", "finished"):
                keep({"pipeline": plan.spec.pipeline, **row(store, runs[event.stage.key])})

        graph = needed(plan.targets, lambda s: store.has(s.operator, s.key))
        for stage in graph.cached:
            on_event(Event(kind="cached", stage=stage))
        run(Schedule(graph), store, pool, Policy(), on_event)
    except (GraftworkError, TimeIsUp) as error:
        print(f"{spec}: {error}", flush=True)
    seconds = time.monotonic() - started
    print(f"{spec}: {seconds:.1f} s, {forwarded} images, {forwarded / seconds:.0f} images/s")
    for operator, times in stages.items():
        print(f"  {operator}: {len(times)} stages, {sum(times) / len(times):.2f} s each")


def row(store: Store, asked: Any) -> dict[str, Any]:
    """What is told of a result."""
    read = finished.read(store, asked, cached=False)
    return {
        "label": asked.method.label,
        "hyperparameters": asked.method.hyperparameters,
        "order": asked.order,
        "seed": asked.seed,
        **read.summary.finals(),
        "seconds": read.seconds,
        "forwards": read.facts["forwards"],
        "trainable_parameters": read.facts["trainable_parameters"],
    }


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['a_last']:6.2f} {found['a_avg']:6.2f} {found['forgetting']:6.2f} "
        f"{found['seconds']:6.1f} s  {found['label']} order {found['order']} seed {found['seed']}"
    )


if __name__ == "__main__":
    main()
