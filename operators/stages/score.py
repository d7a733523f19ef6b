"""Scores a trained branch on the rows that it was trained on, for the blend.

Shapes: N rows, C classes seen.
"""

import torch
from safetensors.torch import save as save_tensors

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.evaluation import decisions
from graftwork.operators.formats import states
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import TrainHints
from graftwork.operators.parameters.training import ScoreParameters
from graftwork.operators.store import Store
from graftwork.operators.training import forward, opening
from graftwork.operators.training.settings import Log


def run(work: Assignment, store: Store) -> Result:
    """The operator `score`: scores of a branch on a task's training rows, exemplars among them.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    parameters = from_json(ScoreParameters, work.parameters)
    reading = from_json(TrainHints, work.hints).reading
    torch.set_num_threads(max(1, int(reading.cpus)))
    [model], branch = work.inputs("model"), parameters.learner
    settings = opening.settings(branch.seed, parameters.numerics, reading.cpus)
    state = states.load_state(store, *model)
    learner = opening.learner(branch, reading.network, state, settings)
    rows, log = opening.task_rows(work, store, branch, parameters.data, reading), Log()
    scores = forward.forward_plain(learner.eval().logits, learner, rows, settings, log)
    decisions.require_finite(scores, work.label)
    return Result(
        files={"scores.safetensors": save_tensors({"scores": scores, "targets": rows.targets})},
        facts={"images_forwarded": log.images_forwarded},
    )
