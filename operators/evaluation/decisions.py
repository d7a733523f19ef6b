"""Decisions from scores, as files of a stage."""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from graftwork.operators.assignment import Files
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.data.labels import columns_of
from graftwork.operators.data.scenario import StreamTask, seen_classes, task_of
from graftwork.operators.errors import Diverged
from graftwork.operators.formats.predictions import decide, encode, join, seen_rows


def require_finite(scores: torch.Tensor, label: str) -> None:
    """Refuses scores that decide nothing.

    Raises:
        Diverged: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise Diverged(f"{label}: a score is NaN or infinite")


def files(
    index: SplitIndex,
    stream: Sequence[StreamTask],
    after: Sequence[int],
    rows: np.ndarray,
    learned: Sequence[int],
    scores: np.ndarray,
) -> Files:
    """Files that are stored of predictions: the decisions after some tasks, and the scores.

    Args:
        index: of the test images.
        stream: tasks up to the last one of `after`.
        after: the tasks that the scores stand for.
        rows: of the index [N], ascending.
        learned: classes of the columns.
        scores: [N, C].
    """
    true_task = task_of(index.labels, index.domains, stream)
    tables = []
    for number in after:
        classes = np.array(sorted(seen_classes(stream, number)))
        columns = columns_of(classes, learned)
        seen = seen_rows(true_task, number)
        part = scores[np.searchsorted(rows, seen)][:, columns]
        tables.append(decide(index, stream, true_task, number, seen, classes, part))
    return {
        "predictions.parquet": encode(join(tables)),
        # Rows of the test index [N], and their scores [N, C]; columns are the key's `learned`.
        "scores.safetensors": save_tensors(
            {
                "rows": torch.from_numpy(rows.astype(np.int64)),
                "scores": torch.from_numpy(scores).float().contiguous(),
            }
        ),
    }
