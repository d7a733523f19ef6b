"""What recording in MLflow adds to a run.

    python benchmarks/tracking.py

Fifty class orders of four methods on the digits, each time in a new process with a new store: once
recorded, once with a tracker that drops everything.
"""

import subprocess
import sys
import tempfile
import time
from typing import Any

from graftwork.operators.tracking import tracker
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.running.run import run_pipeline
from graftwork.pipelines.running.where import Where
from graftwork.pipelines.spec.loading import load_resolved

SWEEP = ("methods=[simplecil, slda, fecam, acil]", "scenario.orders={count: 50, first: 0}")


def drop(*_: Any, **__: Any) -> None:
    """Records nothing."""


def no_ids(*_: Any, **__: Any) -> tracker.RunIds:
    """Ids of nothing."""
    return tracker.RunIds(experiment_id=None, run_id=None, methods={}, unsent=0, problem="")


def measure(recorded: bool) -> None:
    """Prints wall-clock seconds of the run and processor seconds of its driver."""
    if not recorded:
        for name in ("start", "log", "method_run", "stage"):
            setattr(tracker.Tracker, name, drop)
        tracker.Tracker.finish = no_ids
    with tempfile.TemporaryDirectory() as store:
        wall, processor = time.perf_counter(), time.process_time()
        run_pipeline(load_resolved("quickstart", SWEEP), Where(store=store), Display(quiet=True))
        print(f"{time.perf_counter() - wall:.1f} {time.process_time() - processor:.1f}")


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1] == "recorded")
        return
    print(
        "| 200 results, MLflow | wall clock, s | processor time of the driver, s |\n|---|---|---|"
    )
    for mode in ("dropped", "recorded"):
        done = subprocess.run(
            [sys.executable, __file__, mode], stdout=subprocess.PIPE, text=True, check=True
        )
        wall, processor = done.stdout.split()
        print(f"| {mode} | {wall} | {processor} |", flush=True)


main()
