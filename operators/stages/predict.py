"""Predictions of a trained method on the test images of all tasks seen, after a task.

One stage per task, each on its own: they run beside the training of the next tasks. The scores are
kept beside the decisions, so that finished runs can be combined without another forward pass.

Shapes: N rows, B batch, C classes seen.
"""

import numpy as np
import torch

from graftwork.methods.contracts.batches import Neighbours
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import Diverged
from graftwork.operators.evaluation.decisions import files
from graftwork.operators.formats import selection, states
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import ImageHints
from graftwork.operators.parameters.training import PredictParameters
from graftwork.operators.store import Store
from graftwork.operators.training import forward, opening
from graftwork.operators.training.batches import chunks
from graftwork.operators.training.settings import Log


def run(work: Assignment, store: Store) -> Result:
    """The operator `predict`: the decisions of one model, after each of the tasks it stands for.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    parameters = from_json(PredictParameters, work.parameters)
    hints, model_of = from_json(ImageHints, work.hints), parameters.learner
    torch.set_num_threads(max(1, int(hints.cpus)))
    [model] = work.inputs("model")
    tasks = selection.of(work, store, hints.selection, parameters.tasks)
    every, true_task = selection.joined(tasks), selection.numbers(tasks)
    # Read in the order of the sources, stored task by task.
    order = selection.in_order(every)
    rows = every.at(order)
    settings = opening.settings(model_of.seed, parameters.numerics, hints.cpus)
    state = states.load_state(store, *model)
    learner = opening.learner(model_of, hints.network, state, settings)
    query = opening.query_of(work, store, hints.selection, rows, parameters.query)
    images, log = opening.open_rows(model_of, hints, rows, query), Log()
    batches = None
    if parameters.vote_batch is not None:
        assert parameters.walk is not None, "batches come with the walk that they are cut from"
        together = Neighbours(size=parameters.vote_batch, walk=parameters.walk)
        batches = batches_of(together, images.targets.numpy(), true_task[order])
    scores = forward.forward_plain(
        learner.eval().logits, learner, images, settings, log, batches
    ).numpy()
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise Diverged(f"{work.label}: scores of {images.name(worst)} are NaN or infinite")
    ordered = np.empty_like(scores)
    ordered[order] = scores
    return Result(
        files=files(every.index, parameters.tasks, true_task, parameters.after, ordered),
        facts={"images_forwarded": log.images_forwarded},
    )


def batches_of(together: Neighbours, columns: np.ndarray, true_task: np.ndarray) -> list[list[int]]:
    """Rows of every batch of a method that decides by them.

    Args:
        columns: of the rows' classes [N].
        true_task: of the rows [N].
    """
    if together.walk == "stream":
        return chunks(np.lexsort((columns, true_task)).tolist(), together.size)
    # As a loader for every task has them: the last batch of a task may be smaller.
    return [
        batch
        for task in np.unique(true_task)
        for batch in chunks(np.flatnonzero(true_task == task).tolist(), together.size)
    ]
