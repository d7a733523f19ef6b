"""Metrics of continual learning, all of them group-bys on one table of predictions.

Shapes: R rows, T tasks, K classes. Accuracies and what is derived from them are in percent and
never rounded: toolboxes that round each accuracy to two decimals before averaging differ from
these numbers by up to 0.01.

What each of them means, and where it is from, is in `definitions.py`. Write `R[i, j]` for the
accuracy on task j's test images after training task i, predicting among all classes seen so far.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftwork.operators.errors import BadDataError

COLUMNS = ("task_trained", "sample", "label", "predicted", "predicted_in_task", "true_task")
"""Columns of the table, one row per test image of a seen task and task trained."""

Matrix = Sequence[Sequence[float | None]]
"""Row i holds R[i, 0..i]; None for a task without test images of its own."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Every metric of one run (a method with one class order and one seed), in percent.

    Args:
        matrix: row i holds R[i, 0..i]; None for a task without test images of its own.
        curve: micro accuracy after each task, [T].
        curve_macro_task: mean of row i of `matrix`, [T].
        curve_macro_class: mean accuracy of the classes seen after each task, [T].
        task_matrix, task_curve, task_a_avg, task_a_last: the same as without `task_`, with
            predictions restricted to the classes of the image's own task.
        per_class: accuracy of each class after the last task, [K]; None without test images.
        confusion: counts after the last task, [K, K] int64, row = true, column = predicted.
        groups: name -> accuracy after each task on the test images of some classes, [T]; None as
            long as there are none.
        a_auc: of an online stream, mean of `curve`; None elsewhere.
        ahead: `transfer` and the like, of methods that are asked about later tasks.
    """

    matrix: Matrix
    curve: list[float]
    curve_macro_task: list[float]
    curve_macro_class: list[float]
    a_avg: float
    a_last: float
    a_avg_macro_task: float
    a_last_macro_task: float
    a_avg_macro_class: float
    a_last_macro_class: float
    forgetting: float
    forgetting_chaudhry: float
    forgetting_avalanche: float
    bwt: float
    task_matrix: Matrix
    task_curve: list[float]
    task_a_avg: float
    task_a_last: float
    per_class: list[float | None]
    confusion: NDArray[np.int64]
    groups: Mapping[str, list[float | None]] = field(default_factory=dict)
    a_auc: float | None = None
    ahead: Mapping[str, float] = field(default_factory=dict)

    def finals(self) -> dict[str, float]:
        """The single numbers, by name."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, float)}
        last = {name: curve[-1] for name, curve in self.groups.items()}
        known = {name: value for name, value in last.items() if value is not None}
        return numbers | known | dict(self.ahead)

    def curves(self) -> dict[str, list[float]]:
        """The numbers per task, by name; `accuracy` is the micro curve."""
        return {
            "accuracy": self.curve,
            "accuracy_macro_task": self.curve_macro_task,
            "accuracy_macro_class": self.curve_macro_class,
            "accuracy_task_incremental": self.task_curve,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `confusion` as its non-zero cells [true, predicted, count]."""
        true, predicted = np.nonzero(self.confusion)
        counts = self.confusion[true, predicted]
        cells = np.stack([true, predicted, counts], axis=1).tolist()
        value = asdict(self) | {"confusion": cells}
        absent = [name for name in ("groups", "a_auc", "ahead") if not value[name]]
        return {name: part for name, part in value.items() if name not in absent}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """The inverse of `to_json`."""
        classes = len(value["per_class"])
        confusion = np.zeros((classes, classes), dtype=np.int64)
        for true, predicted, count in value["confusion"]:
            confusion[true, predicted] = count
        return cls(**{**value, "confusion": confusion})


def forgetting(matrix: Matrix) -> float:
    """Mean over tasks j < T-1 of (max over l = 0 .. T-1 of R[l,j] - R[T-1,j]).

    Rows before task j count as 0 and the last row is in the maximum, so it is never negative.
    Source: LAMDA-PILOT (`trainer.py`) and mammoth (`forgetting`). 0 for a single task.
    """
    return _mean_over_old(matrix, lambda column: max(column) - column[-1])


def forgetting_chaudhry(matrix: Matrix) -> float:
    """Mean over tasks j < T-1 of (max over l = j .. T-2 of R[l,j] - R[T-1,j]).

    Negative when the last task helped. Source: Chaudhry et al., Riemannian Walk, ECCV 2018.
    """
    return _mean_over_old(matrix, lambda column: max(column[:-1]) - column[-1])


def backward_transfer(matrix: Matrix) -> float:
    """Mean over tasks j < T-1 of (R[T-1,j] - R[j,j]); its negative is Avalanche's forgetting.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017. 0 for a single task.
    """
    return _mean_over_old(matrix, lambda column: column[-1] - column[0])


def summarise(
    columns: Mapping[str, Any],
    num_tasks: int,
    num_classes: int,
    groups: Mapping[str, Sequence[int]] = MappingProxyType({}),
    online: bool = False,
    untested: Collection[int] = (),
) -> Summary:
    """All metrics of one run.

    Args:
        columns: the `COLUMNS`, each an integer array [R]. After task i the table must hold every
            test image of tasks 0 .. i once.
        num_tasks: T.
        num_classes: K; labels and predictions are below it.
        groups: name -> classes whose accuracy is wanted by itself; of `base` and `novel` their
            harmonic mean as well.
        online: whether tasks are sections of one sequence.
        untested: tasks without test images of their own.

    Raises:
        BadDataError: the table is not such a table; the message names the tasks.
    """
    table = {name: np.asarray(columns[name], dtype=np.int64) for name in COLUMNS}
    counts = _counts(table, num_tasks, num_classes, untested)
    trained, label = table["task_trained"], table["label"]
    correct = label == table["predicted"]
    matrix, curve = _accuracies(trained, table["true_task"], correct, counts)
    in_task = label == table["predicted_in_task"]
    task_matrix, task_curve = _accuracies(trained, table["true_task"], in_task, counts)

    size = num_tasks * num_classes
    cell = trained * num_classes + label
    seen = np.bincount(cell, minlength=size).reshape(num_tasks, num_classes)
    hits = np.bincount(cell[correct], minlength=size).reshape(num_tasks, num_classes)
    per_class = np.full(seen.shape, np.nan)
    np.divide(100.0 * hits, seen, out=per_class, where=seen > 0)

    macro_task = [float(np.mean([v for v in row if v is not None])) for row in matrix]
    macro_class = [float(v) for v in np.nanmean(per_class, axis=1)]
    last = trained == num_tasks - 1
    pairs = label[last] * num_classes + table["predicted"][last]
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    bwt = backward_transfer(matrix)
    return Summary(
        matrix=matrix,
        curve=curve,
        curve_macro_task=macro_task,
        curve_macro_class=macro_class,
        a_avg=float(np.mean(curve)),
        a_last=curve[-1],
        a_avg_macro_task=float(np.mean(macro_task)),
        a_last_macro_task=macro_task[-1],
        a_avg_macro_class=float(np.mean(macro_class)),
        a_last_macro_class=macro_class[-1],
        forgetting=forgetting(matrix),
        forgetting_chaudhry=forgetting_chaudhry(matrix),
        forgetting_avalanche=0.0 - bwt,
        bwt=bwt,
        task_matrix=task_matrix,
        task_curve=task_curve,
        task_a_avg=float(np.mean(task_curve)),
        task_a_last=task_curve[-1],
        per_class=[None if np.isnan(v) else float(v) for v in per_class[-1]],
        confusion=confusion.astype(np.int64),
        groups=_of_groups(hits, seen, groups),
        a_auc=float(np.mean(curve)) if online else None,
    )


def _of_groups(
    hits: NDArray[np.int64], seen: NDArray[np.int64], groups: Mapping[str, Sequence[int]]
) -> dict[str, list[float | None]]:
    """Accuracy of groups of classes after each task.

    Args:
        hits, seen: correct test images and all of them, by task trained and class [T, K].
    """
    found: dict[str, list[float | None]] = {}
    for name, classes in groups.items():
        right, count = (part[:, list(classes)].sum(axis=1).tolist() for part in (hits, seen))
        found[name] = [100.0 * r / n if n else None for r, n in zip(right, count, strict=True)]
    if "base" in found and "novel" in found:
        pairs = zip(found["base"], found["novel"], strict=True)
        found["harmonic"] = [_harmonic(base, novel) for base, novel in pairs]
    return found


def ahead(tables: Sequence[Mapping[str, Any]], num_tasks: int) -> dict[str, float]:
    """Accuracies on all tasks, learned or not, after each task.

    Args:
        tables: for each task trained, the columns `label`, `predicted`, `predicted_in_task` and
            `true_task` of the test images of all tasks.
        num_tasks: T.
    """
    found: dict[str, float] = {}
    for column, ending in (("predicted_in_task", ""), ("predicted", "_union")):
        matrix = np.array([_by_task(table, column, num_tasks) for table in tables])
        # Tasks without test images of their own do not count.
        matrix = matrix[:, ~np.isnan(matrix).any(axis=0)]
        before = [matrix[:i, i].mean() for i in range(1, matrix.shape[1])]
        if before:
            found[f"transfer{ending}"] = float(np.mean(before))
        found[f"average{ending}"] = float(matrix.mean())
        found[f"last{ending}"] = float(matrix[-1].mean())
    return found


def _by_task(table: Mapping[str, Any], column: str, num_tasks: int) -> NDArray[np.float64]:
    """Accuracy on every task [T]; NaN where it has no test images."""
    right = np.asarray(table["label"]) == np.asarray(table[column])
    tasks = np.asarray(table["true_task"], dtype=np.int64)
    counts = np.bincount(tasks, minlength=num_tasks).astype(float)
    hits = np.bincount(tasks[right], minlength=num_tasks)
    return 100.0 * np.divide(hits, counts, out=np.full(num_tasks, np.nan), where=counts > 0)


def _harmonic(base: float | None, novel: float | None) -> float | None:
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base and novel else 0.0


def _mean_over_old(matrix: Matrix, drop: Callable[[list[float]], float]) -> float:
    """Mean over j < T-1 of `drop([R[j,j], ..., R[T-1,j]])`; 0 if there is no such task.

    Tasks without test images of their own do not count.
    """
    tasks = len(matrix)
    columns = [[matrix[i][j] for i in range(j, tasks)] for j in range(tasks - 1)]
    known = [[v for v in column if v is not None] for column in columns]
    return float(np.mean([drop(column) for column in known if column] or [0.0]))


def _accuracies(
    trained: NDArray[np.int64],
    true_task: NDArray[np.int64],
    correct: NDArray[np.bool_],
    counts: NDArray[np.int64],
) -> tuple[Matrix, list[float]]:
    """Accuracy per task pair (lower triangle) and over all seen tasks, from counts [T, T]."""
    tasks = len(counts)
    cell = (trained * tasks + true_task)[correct]
    hits = np.bincount(cell, minlength=tasks * tasks).reshape(tasks, tasks)
    percent = (100.0 * hits / np.maximum(counts, 1)).tolist()
    held = (counts[-1] > 0).tolist()
    matrix: Matrix = [
        [percent[i][j] if held[j] else None for j in range(i + 1)] for i in range(tasks)
    ]
    return matrix, (100.0 * hits.sum(axis=1) / counts.sum(axis=1)).tolist()


def _counts(
    table: dict[str, NDArray[np.int64]], tasks: int, classes: int, untested: Collection[int]
) -> NDArray[np.int64]:
    """Rows per (task trained, true task), [T, T], after checking that the table is complete."""
    if len({len(column) for column in table.values()}) != 1:
        lengths = {name: len(column) for name, column in table.items()}
        raise BadDataError(f"predictions: columns differ in length: {lengths}")
    ranges = {"task_trained": tasks, "true_task": tasks, "label": classes, "predicted": classes}
    for name, limit in (ranges | {"predicted_in_task": classes}).items():
        column = table[name]
        if column.size and not 0 <= column.min() <= column.max() < limit:
            found = f"{column.min()}..{column.max()}"
            raise BadDataError(f"predictions: {name} must be in 0..{limit - 1}, found {found}")
    cell = table["task_trained"] * tasks + table["true_task"]
    counts = np.bincount(cell, minlength=tasks * tasks).reshape(tasks, tasks)
    missing = [task for task in np.flatnonzero(counts[-1] == 0) if task not in untested or not task]
    if missing:
        raise BadDataError(f"predictions: no rows of task {missing[0]} after task {tasks - 1}")
    wanted = np.tril(np.ones((tasks, 1), dtype=np.int64) * counts[-1])
    wrong = np.argwhere(counts != wanted)
    if wrong.size:
        i, j = wrong[0]
        raise BadDataError(
            f"predictions: {counts[i, j]} rows of task {j} after task {i}; expected {wanted[i, j]}"
        )
    return counts
