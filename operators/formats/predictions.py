"""Predictions as a table: one row per test image and task trained, from which all metrics come.

The label space after a task is exactly the classes seen so far, numbered by arrival. Rows stand
task by task, so that those of the tasks seen are the first ones; `sample` is the place in that row.

Shapes: N rows, C classes seen.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import DamagedStage
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.store import Store

RUN = [("order", pa.dictionary(pa.int8(), pa.string())), ("seed", pa.int64())]
"""Of which run: in the table of a whole run."""
COLUMNS = [
    ("task_trained", pa.int16()),
    ("sample", pa.int64()),
    ("label", pa.int32()),
    ("predicted", pa.int32()),
    ("predicted_in_task", pa.int32()),
    ("true_task", pa.int16()),
]
Table = dict[str, np.ndarray[Any, Any]]


def decide(
    index: SplitIndex,
    tasks: Sequence[TaskData],
    true_task: np.ndarray,
    number: int,
    scores: np.ndarray,
) -> Table:
    """The predictions after a task.

    Args:
        index: of the test rows, task by task; those of later tasks may follow.
        tasks: of the rows.
        true_task: of each row.
        number: the task trained last.
        scores: [N, C] of the rows up to it; of equal scores the class that came first wins.
    """
    count, seen = len(scores), scores.shape[1]
    own = np.zeros((number + 1, seen), dtype=bool)
    for place, task in enumerate(tasks[: number + 1]):
        own[place, [label for label in task.classes if label < seen]] = True
    masked = np.where(own[true_task[:count]], scores, -np.inf)
    return {
        "task_trained": np.full(count, number),
        "sample": np.arange(count),
        "label": index.labels[:count],
        "predicted": scores.argmax(axis=1),
        "predicted_in_task": masked.argmax(axis=1),
        "true_task": true_task[:count],
    }


def shown(true_task: np.ndarray, number: int) -> int:
    """Rows, from the first on, of the tasks up to one."""
    return int(np.searchsorted(true_task, number, side="right"))


def join(tables: Iterable[Table]) -> Table:
    """The rows of several tables, one after the other."""
    parts = list(tables)
    return {name: np.concatenate([part[name] for part in parts]) for name, _ in COLUMNS}


def encode(table: Table, order: str | None = None, seed: int = 0) -> bytes:
    """A table as Parquet, every page with a checksum.

    Args:
        order: class order of the run, with its seed in front of the other columns.
    """
    count = len(table["sample"])
    fields = [*([] if order is None else RUN), *COLUMNS]
    arrays: list[Any] = [pa.array(table[name]).cast(kind) for name, kind in COLUMNS]
    if order is not None:
        codes = pa.array(np.zeros(count, dtype=np.int8))
        arrays = [
            pa.DictionaryArray.from_arrays(codes, pa.array([order])),
            pa.array(np.full(count, seed, dtype=np.int64)),
            *arrays,
        ]
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(arrays, schema=pa.schema(fields)),
        buffer,
        compression="zstd",
        write_page_checksum=True,
    )
    return buffer.getvalue()


def read(store: Store, operator: str, key: str) -> Table:
    """Columns of stored predictions, by name.

    Raises:
        DamagedStage: the file is damaged or has another schema.
    """
    data = store.read(operator, key, "predictions.parquet")
    names = [name for name, _ in COLUMNS]
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        found = file.schema_arrow.names
        if found not in (names, [name for name, _ in RUN] + names):
            raise ValueError(f"unexpected columns {found}")
        table = file.read(columns=names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedStage(operator, key, f"predictions.parquet: {error}") from error
    return {name: table[name].to_numpy() for name in table.column_names}
