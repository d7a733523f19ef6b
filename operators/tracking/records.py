"""Records of a run, as values, and the journal operations that send them to MLflow."""

import contextlib
import csv
import getpass
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from graftwork.operators.tracking.journal import Operation

MODEL = "graftwork.model"
"""Tag with the digest of what a result predicts with; runs with equal ones share a model."""
VOTES = "graftwork.batch_information_at_test"
MODEL_FILE = "model/MLmodel"
"""File of a run that holds its model."""
TASK = "graftwork.newest_task"
"""Tag with the name of the last task that a result learned."""
TASKS = "graftwork.tasks"
"""Tag with the number of tasks that a result learned."""

Artifacts = Mapping[str, bytes | str | Callable[[Path], None]]
"""Relative file name -> content, or a function that writes the file, for what is large."""

MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_NAME = 800, 100, 6000, 8000, 250
"""MLflow's limits; fewer metrics than its 1,000, so that parameters and tags fit in, too."""


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """Result of one method with one class order and one seed.

    Args:
        key: content key of the evaluate stage; the same result has the same key in every run.
        name: what people see in the list of runs.
        params: method, order, seed and hyper-parameters. Runs that differ in `order` and `seed`
            only are one row of the leaderboard.
        metrics: single numbers; `seconds` is also shown as the run's duration.
        curves: numbers per task, logged with step = task.
        artifacts: files, or a function that makes them, called in the tracker's thread; of a cached
            result only if no run that MLflow knows holds its files.
        files: names of files without which a run does not hold the result.
        dataset: name and digest, shown as the run's input.
        cached: the result was in the store.
        producer_run_id: MLflow id of the run that computed a cached result; looked up by key
            when None.
    """

    key: str
    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Artifacts | Callable[[], Artifacts] = field(default_factory=dict)
    files: Sequence[str] = ()
    dataset: tuple[str, str] | None = None
    cached: bool = False
    producer_run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of the graph.

    Args:
        name: what people see.
        seconds: what it took; 0 when cached.
        facts: numbers become metrics, the rest parameters.
        cached: it was in the store.
        end: milliseconds since 1970.
    """

    name: str
    seconds: float
    facts: Mapping[str, Any]
    cached: bool
    end: int


@dataclass(frozen=True, kw_only=True)
class RunIds:
    """MLflow's ids of the runs; None for what it has not taken yet.

    Args:
        methods: `MethodRun.key` -> run id.
        unsent: operations left in the journal for the next run to send.
        problem: the last error of MLflow, if `unsent`.
    """

    experiment_id: str | None
    run_id: str | None
    methods: Mapping[str, str]
    unsent: int
    problem: str


def now() -> int:
    """Milliseconds since 1970, MLflow's unit of time."""
    return int(time.time() * 1000)


def start(
    run: str, parent: str | None, name: str, tags: Mapping[str, str], time_ms: int
) -> Operation:
    """Makes the run that the journal calls `run`, below the one it calls `parent`."""
    system = {"mlflow.source.name": "graftwork", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # containers often have no such user
        system["mlflow.user"] = getpass.getuser()
    tags = {_name(k): str(v)[:MAX_TAG_LENGTH] for k, v in (system | dict(tags)).items()}
    fields = {"run": run, "parent": parent, "name": name, "tags": tags, "start": time_ms}
    return {"kind": "run", **fields}


def end(run: str, status: str, time_ms: int) -> Operation:
    """Ends a run; `status` is FINISHED, FAILED or KILLED."""
    return {"kind": "end", "run": run, "status": status, "time": time_ms}


def files(run: str, folder: str) -> Operation:
    """Logs what is in a folder of the journal."""
    return {"kind": "files", "run": run, "path": folder}


def data(
    run: str,
    *,
    metrics: Mapping[str, float | None] | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[Operation]:
    """Numbers and texts of a run, in as few operations as MLflow's limits allow."""
    time_ms = now()
    points = [[_name(k), float(v), time_ms, 0] for k, v in (metrics or {}).items() if v is not None]
    for name, values in (curves or {}).items():
        points += [[_name(name), float(v), time_ms, step] for step, v in enumerate(values)]
    # MLflow turns infinity into the largest float, which ruins every plot.
    points = [point for point in points if math.isfinite(point[1])]
    texts = list((params or {}).items())
    marks = [(_name(k), str(v)[:MAX_TAG_LENGTH]) for k, v in (tags or {}).items()]
    operations: list[Operation] = []
    while points or texts or marks:
        batch = {"metrics": points[:MAX_METRICS], "params": dict(texts[:MAX_PARAMS])}
        batch["tags"] = dict(marks[:MAX_PARAMS])
        operations.append({"kind": "batch", "run": run, **batch})
        points, texts = points[MAX_METRICS:], texts[MAX_PARAMS:]
        marks = marks[MAX_PARAMS:]
    return operations


def params(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters as MLflow takes them, and the files that hold those which are too long."""
    short: dict[str, str] = {}
    long: dict[str, str] = {}
    for key, value in values.items():
        name = _name(key)
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if len(text) > MAX_PARAM_LENGTH:
            file = f"params/{name.replace('/', '_')}.txt"
            long[file] = text
            text = f"{text[:200]} ... (all of it in {file})"
        short[name] = text
    return short, long


def method(run: str, record: MethodRun) -> tuple[list[Operation], dict[str, str]]:
    """A method run below the pipeline run, and files with parameters too long for MLflow."""
    tags = {
        "graftwork.kind": "method",
        "graftwork.key": record.key,
        "cache": "hit" if record.cached else "miss",
    }
    if record.producer_run_id:
        tags["producer_run_id"] = record.producer_run_id
    time_ms = now()
    seconds = 0.0 if record.cached else record.metrics.get("seconds") or 0.0
    begin = time_ms - int(1000 * seconds)
    first = start(run, "pipeline", record.name, {**record.tags, **tags}, begin)
    if record.cached and not record.producer_run_id:
        first |= {"produced_by": record.key, "files": list(record.files)}
    short, long = params(record.params)
    operations = [first]
    # A cached run points to the one that has it all; it repeats what tables and plots compare.
    curves = {k: v for k, v in record.curves.items() if k == "accuracy" or not record.cached}
    operations += data(run, metrics=record.metrics, curves=curves, params=short)
    if record.dataset and not record.cached:
        name, digest = record.dataset
        # 36 characters are all that MLflow keeps of a digest.
        about = {"name": name, "digest": digest[:36], "source": "{}", "context": "training"}
        operations.append({"kind": "input", "run": run, **about})
    return [*operations, end(run, "FINISHED", time_ms)], long


def stage(run: str, parent: str, record: StageRun) -> tuple[list[Operation], dict[str, str]]:
    """A stage as a run below `parent`, and files with facts too long for MLflow."""
    facts = {k: v for k, v in record.facts.items() if v is not None}
    numbers = {k: v for k, v in facts.items() if isinstance(v, int | float)}
    short, long = params({k: v for k, v in facts.items() if k not in numbers})
    begin = record.end - int(1000 * record.seconds)
    operations = [start(run, parent, record.name, {"graftwork.kind": "stage"}, begin)]
    operations += data(run, metrics=numbers | {"seconds": record.seconds}, params=short)
    return [*operations, end(run, "FINISHED", record.end)], long


def stages_csv(stages: Sequence[StageRun]) -> str:
    """All stages as a table: name, state, seconds, facts as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stage", "state", "seconds", "facts"])
    for record in stages:
        state = "cached" if record.cached else "computed"
        facts = json.dumps(dict(record.facts), default=str)
        writer.writerow([record.name, state, f"{record.seconds:.3f}", facts])
    return text.getvalue()


def check_file_names(artifacts: Artifacts) -> None:
    """Refuses names that would leave the run's folder.

    Raises:
        ValueError: a name is absolute, empty or has `..` in it.
    """
    for name in artifacts:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"artifact name must be a relative path, got {name!r}")


def _name(name: str) -> str:
    """A key with the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:MAX_NAME]
