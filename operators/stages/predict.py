"""Predictions of a trained method on the test images of all tasks seen, after a task.

One stage per task, each on its own: they run beside the training of the next tasks. The scores are
kept beside the decisions, so that finished runs can be combined without another forward pass.

Shapes: N rows, B batch, C classes seen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from methods.contracts.trained import Learner
from operators.data.index_file import SplitIndex
from operators.data.scenario import Task, seen_classes, stream_of, task_of
from operators.errors import Diverged
from operators.formats.predictions import decide, encode, join, seen_rows
from operators.stage import Files, Order, Result
from operators.stages import fit, train
from operators.store.store import Store
from operators.training import loop
from operators.training.rows import FeatureRows, TaskRows


def run(order: Order, store: Store) -> Result:
    """The operator `predict`: the decisions of one model, after each of the tasks it stands for.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    keyed, hints = order.parameters, order.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    [dataset], [model] = order.inputs("dataset"), order.inputs("model")
    index, stream = fit.load_index(store, *dataset), stream_of(keyed["tasks"])
    true_task = task_of(index.labels, index.domains, stream)
    rows = seen_rows(true_task, max(keyed["after"]))
    settings = train.settings(keyed, hints)
    learner, _ = loop.open_learner(
        train.build(keyed["method"]),
        train.backbone(keyed, hints),
        train.task_of(keyed),
        train.load_state(store, *model),
        settings,
    )
    learned: list[int] = keyed["learned"]
    targets = train.columns_of(index.labels[rows], learned)
    images = train.open_rows(order, index, rows, targets, train.query_of(order, store, rows))
    log = loop.Log()
    scores = _scores(learner.eval(), images, settings, true_task[rows], keyed["vote_batch"], log)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise Diverged(f"{order.label}: scores of {images.name(worst)} are NaN or infinite")
    return Result(
        files=files(index, stream, keyed["after"], rows, learned, scores),
        facts={"images_forwarded": log.images_forwarded},
    )


def files(
    index: SplitIndex,
    stream: Sequence[Task],
    after: Sequence[int],
    rows: np.ndarray,
    learned: list[int],
    scores: np.ndarray,
) -> Files:
    """What is stored of predictions: the decisions after some tasks, and the scores.

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
        columns = train.columns_of(classes, learned).numpy()
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


def _scores(
    learner: Learner,
    images: TaskRows | FeatureRows,
    settings: loop.Settings,
    true_task: np.ndarray,
    vote: int | None,
    log: loop.Log,
) -> np.ndarray:
    """Scores [N, C].

    Args:
        vote: None, or the batch size of a method that decides by the batch: its reference hands
            over one task after the other, class by class, which this repeats.
    """
    if vote is None:
        return loop.forward_plain(learner.logits, learner, images, settings, log).numpy()
    walk = np.lexsort((images.targets.numpy(), true_task))
    batches = loop.chunks(walk.tolist(), vote)
    found = loop.forward_plain(learner.logits, learner, images, settings, log, batches).numpy()
    scores = np.empty_like(found)
    scores[walk] = found
    return scores
