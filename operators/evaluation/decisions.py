"""Decisions from scores, as files of a stage."""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from graftwork.operators.assignment import Files
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import Diverged
from graftwork.operators.formats.predictions import decide, encode, join, shown
from graftwork.operators.parameters.tasks import TaskData


def require_finite(scores: torch.Tensor, label: str) -> None:
    """Refuses scores that decide nothing.

    Raises:
        Diverged: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise Diverged(f"{label}: a score is NaN or infinite")


def files(
    index: SplitIndex,
    tasks: Sequence[TaskData],
    true_task: np.ndarray,
    after: Sequence[int],
    scores: np.ndarray,
) -> Files:
    """Files that are stored of predictions: the decisions after some tasks, and the scores.

    Args:
        index: of the test rows [N], task by task.
        tasks: up to the last one of `after`.
        true_task: [N], of each row.
        after: the tasks that the scores stand for.
        scores: [N, C].
    """
    tables = [
        decide(
            index,
            tasks,
            true_task,
            number,
            scores[: shown(true_task, number), : tasks[number].seen],
        )
        for number in after
    ]
    return {
        "predictions.parquet": encode(join(tables)),
        "scores.safetensors": save_tensors(
            {"scores": torch.from_numpy(scores).float().contiguous()}
        ),
    }
