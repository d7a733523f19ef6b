"""Predictions of a fitted method on the test images of all tasks seen, after every task.

One row per prediction; every metric is derived from these rows. The label space after a task is
exactly the classes seen so far; neither the task's identity nor the batch is known to the method.

Shapes: N rows, C classes seen.
"""

import io
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from operators import features, fit, metrics
from operators.errors import DamagedStage
from operators.keys import canonical
from operators.scenario import Task, task_of
from operators.stage import Order, Result
from operators.store import Store

SCHEMA = pa.schema(
    [
        ("order", pa.dictionary(pa.int8(), pa.string())),
        ("seed", pa.int64()),
        ("task_trained", pa.int16()),
        ("sample", pa.int64()),
        ("label", pa.int32()),
        ("predicted", pa.int32()),
        ("predicted_in_task", pa.int32()),
        ("true_task", pa.int16()),
    ]
)
CHUNK = 4096
"""Rows scored at once."""


def run(order: Order, store: Store) -> Result:
    """The operator `evaluate`: predictions and the summary of their metrics.

    Raises:
        DamagedStage: an input is damaged.
    """
    keyed = order.parameters
    torch.set_num_threads(max(1, int(order.hints["cpus"])))
    tasks = keyed["tasks"]
    [dataset] = order.inputs("dataset")
    index = fit.load_index(store, *dataset)
    stream = [
        Task(index=i, classes=tuple(t["classes"]), domains=tuple(t["domains"]))
        for i, t in enumerate(tasks)
    ]
    true_task = task_of(index.labels, index.domains, stream)
    own_classes = _membership(tasks, keyed["num_classes"])
    columns: dict[str, list[np.ndarray[Any, Any]]] = {
        name: [] for name in ("task_trained", "sample", *metrics.COLUMNS[2:])
    }
    seen: set[int] = set()
    for number, task in enumerate(tasks):
        seen |= set(task["classes"])
        rows = np.flatnonzero((true_task >= 0) & (true_task <= number))
        # Columns in ascending class ids: a tie goes to the lowest, in any class order.
        classes = np.array(sorted(seen))
        scores = _scores(order, store, number, rows, classes)
        masked = np.where(own_classes[true_task[rows]][:, classes], scores, -np.inf)
        for name, values in (
            ("task_trained", np.full(len(rows), number)),
            ("sample", rows),
            ("label", index.labels[rows]),
            ("predicted", classes[scores.argmax(axis=1)]),
            ("predicted_in_task", classes[masked.argmax(axis=1)]),
            ("true_task", true_task[rows]),
        ):
            columns[name].append(values)
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    [(operator, key)] = order.inputs("model")
    model = store.manifest(operator, key)
    summary = metrics.summarise(table, len(tasks), keyed["num_classes"])
    return Result(
        files={
            "predictions.parquet": _encode(table, canonical(keyed["order"]), keyed["seed"]),
            "summary.json": canonical(summary.to_json()).encode(),
        },
        facts={
            **summary.finals(),
            "seconds_fitting": model["seconds"],
            "state_bytes": model["facts"]["state_bytes"],
            "trainable_parameters": model["facts"]["trainable_parameters"],
            "fit": model["facts"]["tasks"],
        },
    )


def read_predictions(store: Store, operator: str, key: str) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of the stored predictions, by name.

    Raises:
        DamagedStage: the file is damaged or has another schema.
    """
    data = store.read(operator, key, "predictions.parquet")
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        if file.schema_arrow.names != SCHEMA.names:
            raise ValueError(f"unexpected columns {file.schema_arrow.names}")
        table = file.read(columns=[f.name for f in SCHEMA if f.name not in ("order", "seed")])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedStage(operator, key, f"predictions.parquet: {error}") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def _scores(
    order: Order, store: Store, number: int, rows: np.ndarray[Any, Any], classes: Any
) -> np.ndarray[Any, Any]:
    """Scores [N, C] of the given test rows after a task; columns as in `classes`."""
    keyed, [model] = order.parameters, order.inputs("model")
    shards = tuple(order.inputs("features"))
    if keyed["separable"]:
        # Each class's scores are the same after every task and in every class order.
        full = _separable_scores(store, model, shards, _frozen(keyed["method"]), keyed["seed"])
        return full[np.ix_(rows, classes)]
    learned: list[int] = []
    for task in keyed["tasks"][: number + 1]:
        learned += [c for c in task["classes"] if c not in learned]
    state = fit.load_states(store, *model)[number]
    matrix = features.load(store, list(shards))[rows]
    scores = _logits(keyed["method"], state, matrix, keyed["seed"])
    return scores[:, np.argsort(learned)]


@lru_cache(maxsize=8)
def _separable_scores(
    store: Store,
    model: tuple[str, str],
    shards: tuple[tuple[str, str], ...],
    method: tuple[str, str],
    seed: int,
) -> np.ndarray[Any, Any]:
    [state] = fit.load_states(store, *model)
    description = {"name": method[0], "hyperparameters": json.loads(method[1])}
    return _logits(description, state, features.load(store, list(shards)), seed)


def _frozen(method: dict[str, Any]) -> tuple[str, str]:
    return method["name"], json.dumps(method["hyperparameters"], sort_keys=True)


def _logits(
    method: dict[str, Any], state: dict[str, torch.Tensor], matrix: Any, seed: int
) -> np.ndarray[Any, Any]:
    learner = fit.build(method)
    parts = []
    for start in range(0, len(matrix), CHUNK):
        chunk = torch.from_numpy(matrix[start : start + CHUNK].astype(np.float32))
        parts.append(learner.logits(state, chunk, seed).numpy())
    return np.concatenate(parts)


def _membership(tasks: list[dict[str, Any]], num_classes: int) -> Any:
    """[tasks, classes] whether a task has a class."""
    table = np.zeros((len(tasks), num_classes), dtype=bool)
    for number, task in enumerate(tasks):
        table[number, task["classes"]] = True
    return table


def _encode(table: dict[str, Any], order: str, seed: int) -> bytes:
    count = len(table["sample"])
    arrays = {
        "order": pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(count, dtype=np.int8)), pa.array([order])
        ),
        "seed": pa.array(np.full(count, seed, dtype=np.int64)),
    }
    for field in SCHEMA:
        if field.name not in arrays:
            arrays[field.name] = pa.array(table[field.name]).cast(field.type)
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(arrays, schema=SCHEMA), buffer, compression="zstd", write_page_checksum=True
    )
    return buffer.getvalue()
