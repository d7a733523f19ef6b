"""Metrics of continual learning, all of them group-bys on one table of predictions.

Shapes: R rows, T tasks, K classes. Accuracies and what is derived from them are in percent and
never rounded: toolboxes that round each accuracy to two decimals before averaging differ from
these numbers by up to 0.01.

Write `R[i, j]` for the accuracy on task j's test images after training task i, predicting among
all classes seen so far, `c[i, j]` for the number of correct ones and `q[j]` for their number.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftwork.operators.errors import BadDataError

COLUMNS = ("task_trained", "sample", "label", "predicted", "predicted_in_task", "true_task")
"""Columns of the table, one row per test image of a seen task and task trained."""

DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "curve": (
        "Accuracy after task i",
        "A_i = 100 · Σ_{j≤i} c[i,j] / Σ_{j≤i} q[j], over all test images of the classes seen so "
        "far, predicting among all of them without knowing the task (micro average)",
        "LAMDA-PILOT, SLCA, EASE, MOS",
    ),
    "a_avg": (
        "Average incremental accuracy",
        "A_avg = mean over i = 0 .. T-1 of A_i, the first task included",
        "Rebuffi et al., iCaRL, CVPR 2017",
    ),
    "a_last": ("Last accuracy", "A_last = A_{T-1}", "LAMDA-PILOT"),
    "macro_task": (
        "Macro-task accuracy",
        "mean over tasks j ≤ i of R[i,j]; equals A_i when all tasks have equally many test images",
        "RanPAC, mammoth, L2P",
    ),
    "macro_class": (
        "Macro-class accuracy",
        "mean over the classes seen so far of the accuracy of each class",
        "LayUP",
    ),
    "forgetting": (
        "Forgetting",
        "F = mean over j < T-1 of (max over l = 0 .. T-1 of R[l,j] - R[T-1,j]); the last row is "
        "in the maximum, so F ≥ 0",
        "LAMDA-PILOT, mammoth",
    ),
    "forgetting_chaudhry": (
        "Forgetting (Chaudhry)",
        "mean over j < T-1 of (max over l = j .. T-2 of R[l,j] - R[T-1,j]); negative when the "
        "last task helped",
        "Chaudhry et al., Riemannian Walk, ECCV 2018",
    ),
    "forgetting_avalanche": (
        "Forgetting (Avalanche)",
        "mean over j < T-1 of (R[j,j] - R[T-1,j]) = -BWT",
        "ContinualAI Avalanche",
    ),
    "bwt": (
        "Backward transfer",
        "BWT = mean over j < T-1 of (R[T-1,j] - R[j,j])",
        "Lopez-Paz and Ranzato, GEM, NeurIPS 2017",
    ),
    "task_a_avg": (
        "Task-incremental accuracy",
        "as A_avg, with each prediction restricted to the classes of the image's own task: what "
        "the method would reach if the task were known at test time",
        "van de Ven et al., Three types of incremental learning, 2022",
    ),
}
"""Name -> (title, formula, source), as the report prints them."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Every metric of one run (a method with one class order and one seed), in percent.

    Args:
        matrix: row i holds R[i, 0..i].
        curve: micro accuracy after each task, [T].
        curve_macro_task: mean of row i of `matrix`, [T].
        curve_macro_class: mean accuracy of the classes seen after each task, [T].
        task_matrix, task_curve, task_a_avg, task_a_last: the same as without `task_`, with
            predictions restricted to the classes of the image's own task.
        per_class: accuracy of each class after the last task, [K]; None without test images.
        confusion: counts after the last task, [K, K] int64, row = true, column = predicted.
    """

    matrix: list[list[float]]
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
    task_matrix: list[list[float]]
    task_curve: list[float]
    task_a_avg: float
    task_a_last: float
    per_class: list[float | None]
    confusion: NDArray[np.int64]

    def finals(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, float)}

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
        return asdict(self) | {"confusion": cells}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """The inverse of `to_json`."""
        classes = len(value["per_class"])
        confusion = np.zeros((classes, classes), dtype=np.int64)
        for true, predicted, count in value["confusion"]:
            confusion[true, predicted] = count
        return cls(**{**value, "confusion": confusion})


def forgetting(matrix: list[list[float]]) -> float:
    """Mean over tasks j < T-1 of (max over l = 0 .. T-1 of R[l,j] - R[T-1,j]).

    Rows before task j count as 0 and the last row is in the maximum, so it is never negative.
    Source: LAMDA-PILOT (`trainer.py`) and mammoth (`forgetting`). 0 for a single task.
    """
    return _mean_over_old(matrix, lambda column: max(column) - column[-1])


def forgetting_chaudhry(matrix: list[list[float]]) -> float:
    """Mean over tasks j < T-1 of (max over l = j .. T-2 of R[l,j] - R[T-1,j]).

    Negative when the last task helped. Source: Chaudhry et al., Riemannian Walk, ECCV 2018.
    """
    return _mean_over_old(matrix, lambda column: max(column[:-1]) - column[-1])


def backward_transfer(matrix: list[list[float]]) -> float:
    """Mean over tasks j < T-1 of (R[T-1,j] - R[j,j]); its negative is Avalanche's forgetting.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017. 0 for a single task.
    """
    return _mean_over_old(matrix, lambda column: column[-1] - column[0])


def summarise(columns: Mapping[str, Any], num_tasks: int, num_classes: int) -> Summary:
    """All metrics of one run.

    Args:
        columns: the `COLUMNS`, each an integer array [R]. After task i the table must hold every
            test image of tasks 0 .. i once.
        num_tasks: T.
        num_classes: K; labels and predictions are below it.

    Raises:
        BadDataError: the table is not such a table; the message names the tasks.
    """
    table = {name: np.asarray(columns[name], dtype=np.int64) for name in COLUMNS}
    counts = _counts(table, num_tasks, num_classes)
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

    macro_task = [float(np.mean(row)) for row in matrix]
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
    )


def _mean_over_old(matrix: list[list[float]], drop: Any) -> float:
    """Mean over j < T-1 of `drop([R[j,j], ..., R[T-1,j]])`; 0 for a single task."""
    tasks = len(matrix)
    if tasks < 2:
        return 0.0
    columns = ([matrix[i][j] for i in range(j, tasks)] for j in range(tasks - 1))
    return float(np.mean([drop(column) for column in columns]))


def _accuracies(
    trained: NDArray[np.int64],
    true_task: NDArray[np.int64],
    correct: NDArray[np.bool_],
    counts: NDArray[np.int64],
) -> tuple[list[list[float]], list[float]]:
    """Accuracy per task pair (lower triangle) and over all seen tasks, from counts [T, T]."""
    tasks = len(counts)
    cell = (trained * tasks + true_task)[correct]
    hits = np.bincount(cell, minlength=tasks * tasks).reshape(tasks, tasks)
    percent = 100.0 * hits / np.maximum(counts, 1)
    matrix = [percent[i, : i + 1].tolist() for i in range(tasks)]
    return matrix, (100.0 * hits.sum(axis=1) / counts.sum(axis=1)).tolist()


def _counts(table: dict[str, NDArray[np.int64]], tasks: int, classes: int) -> NDArray[np.int64]:
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
    missing = np.flatnonzero(counts[-1] == 0)
    if missing.size:
        raise BadDataError(f"predictions: no rows of task {missing[0]} after task {tasks - 1}")
    wanted = np.tril(np.ones((tasks, 1), dtype=np.int64) * counts[-1])
    wrong = np.argwhere(counts != wanted)
    if wrong.size:
        i, j = wrong[0]
        raise BadDataError(
            f"predictions: {counts[i, j]} rows of task {j} after task {i}; expected {wanted[i, j]}"
        )
    return counts
