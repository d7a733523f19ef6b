"""Predictions of a trained method on the test images of all tasks seen, after a task.

One stage per task, each on its own: they run beside the training of the next tasks. The scores are
kept beside the decisions, so that finished runs can be combined without another forward pass.

Shapes: N rows, B batch, C classes seen.
"""

import numpy as np
import torch

from graftwork.methods.contracts.trained import Learner
from graftwork.operators import building
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data.labels import columns_of
from graftwork.operators.data.scenario import stream_of, task_of
from graftwork.operators.errors import Diverged
from graftwork.operators.evaluation.decisions import files
from graftwork.operators.formats import states
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.predictions import seen_rows
from graftwork.operators.store import Store
from graftwork.operators.training import forward, loop, opening
from graftwork.operators.training.batches import chunks
from graftwork.operators.training.rows import FeatureRows, TaskRows
from graftwork.operators.training.settings import Log, Settings


def run(work: Assignment, store: Store) -> Result:
    """The operator `predict`: the decisions of one model, after each of the tasks it stands for.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    keyed, hints = work.parameters, work.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    [dataset], [model] = work.inputs("dataset"), work.inputs("model")
    index, stream = load_index(store, *dataset), stream_of(keyed["tasks"])
    true_task = task_of(index.labels, index.domains, stream)
    rows = seen_rows(true_task, max(keyed["after"]))
    settings = opening.settings(keyed, hints)
    learner, _ = loop.open_learner(
        building.trained(keyed["method"]),
        opening.backbone(keyed, hints),
        opening.task_of(keyed),
        states.load_state(store, *model),
        settings,
    )
    learned: list[int] = keyed["learned"]
    targets = torch.from_numpy(columns_of(index.labels[rows], learned))
    images = opening.open_rows(work, index, rows, targets, opening.query_of(work, store, rows))
    log = Log()
    scores = _scores(learner.eval(), images, settings, true_task[rows], keyed["vote_batch"], log)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise Diverged(f"{work.label}: scores of {images.name(worst)} are NaN or infinite")
    return Result(
        files=files(index, stream, keyed["after"], rows, learned, scores),
        facts={"images_forwarded": log.images_forwarded},
    )


def _scores(
    learner: Learner,
    images: TaskRows | FeatureRows,
    settings: Settings,
    true_task: np.ndarray,
    vote: int | None,
    log: Log,
) -> np.ndarray:
    """Scores [N, C].

    Args:
        vote: None, or the batch size of a method that decides by the batch: its reference hands
            over one task after the other, class by class, which this repeats.
    """
    if vote is None:
        return forward.forward_plain(learner.logits, learner, images, settings, log).numpy()
    walk = np.lexsort((images.targets.numpy(), true_task))
    batches = chunks(walk.tolist(), vote)
    found = forward.forward_plain(learner.logits, learner, images, settings, log, batches).numpy()
    scores = np.empty_like(found)
    scores[walk] = found
    return scores
