"""Predictions of a trained method on the test images of all tasks seen, after a task.

One stage per task, each on its own: they run beside the training of the next tasks. The scores are
kept beside the decisions, so that finished runs can be combined without another forward pass.

Shapes: N rows, B batch, C classes seen.
"""

import numpy as np
import torch

from graftwork.methods.contracts.trained import Learner
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
from graftwork.operators.training.rows import FeatureRows, TaskRows
from graftwork.operators.training.settings import Log, Settings


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
    vote = parameters.vote_batch
    scores = _scores(learner.eval(), images, settings, true_task[order], vote, log)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise Diverged(f"{work.label}: scores of {images.name(worst)} are NaN or infinite")
    ordered = np.empty_like(scores)
    ordered[order] = scores
    return Result(
        files=files(every.index, parameters.tasks, true_task, parameters.after, ordered),
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
