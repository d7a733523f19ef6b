"""What the executor costs: no-op stages against as many plain Ray tasks, in one run.

    python benchmarks/executor.py [COUNT]

Both parts run on the same local Ray and warm workers, so that only their ratio and difference
matter. Committing a stage to a store (fsync) costs more than all the rest: the table shows the
executor without it, and the commit alone.
"""

import json
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from graftwork.cluster.execution.executor import execute
from graftwork.cluster.execution.worker import run_stage
from graftwork.cluster.sessions.session import connect
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.stage import OPERATORS, Operator, Stage
from graftwork.operators.store import Store

NOOP = Operator(version=1, function="executor:noop")


def noop(work: Assignment, store: Store) -> Result:
    """An operator that does nothing."""
    return Result(files={})


def nothing() -> None:
    """What a plain task does."""


class Forgetful(Store):
    """Stores nothing: what remains is the executor."""

    def has(self, operator: str, key: str) -> bool:
        return False

    def commit(self, work: Assignment, result: Result, seconds: float) -> dict[str, Any]:
        return {"key": work.key, "seconds": seconds, "files": {}, "facts": {}}


def stages(count: int, first: int) -> list[Stage]:
    OPERATORS["noop"] = NOOP
    return [
        Stage(operator="noop", parameters={"n": n}, label=f"noop {n}")
        for n in range(first, first + count)
    ]


def main(count: int) -> None:
    """Prints a table, and the same as one line of JSON."""
    folder = Path(__file__).resolve().parent
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root,
        connect(None, python_path=[str(folder)]) as session,
    ):
        import ray

        store = Store(root)
        same = partial(nullcontext, session)
        execute(stages(64, first=10**9), store, connect=same)  # warm

        task = ray.remote(num_cpus=1, max_retries=0)(nothing)
        ray.get([task.remote() for _ in range(64)])
        start = time.perf_counter()
        ray.get([task.remote() for _ in range(count)])
        plain = time.perf_counter() - start

        graph = stages(count, first=0)
        start = time.perf_counter()
        execute(graph, store, connect=same)
        ours = time.perf_counter() - start
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        start = time.perf_counter()
        execute(graph, Forgetful(f"{root}/none"), connect=same)
        bare = time.perf_counter() - start

        alone = stages(500, first=2 * 10**9)
        start = time.perf_counter()
        for stage in alone:
            run_stage(NOOP, stage.assignment(), store)
        commit = (time.perf_counter() - start) / len(alone)

        start = time.perf_counter()
        execute(graph, store, connect=same)
        cached = time.perf_counter() - start

    ms = 1000 / count
    rows = [
        ("plain Ray tasks", plain, plain * ms),
        ("stages, nothing committed", bare, bare * ms),
        ("  more than plain tasks", bare - plain, (bare - plain) * ms),
        ("stages, committed", ours, ours * ms),
        ("  more than plain tasks", ours - plain, (ours - plain) * ms),
        ("commit of an empty stage, no Ray", commit * count, commit * 1000),
        ("the same graph, stored", cached, cached * ms),
    ]
    print(f"{count} no-op stages, {session.cpus:g} CPUs, driver's peak RSS {rss:.0f} MB")
    for name, seconds, each in rows:
        print(f"{name:34}{seconds:9.2f} s{each:9.3f} ms each")
    own = {"ms_plain": plain * ms, "ms_bare": bare * ms, "ms_committed": ours * ms}
    print(json.dumps({"count": count, "rss_mb": rss} | own))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
