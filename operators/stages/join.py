"""Joins the experts of an independent method, one task after the other.

The experts train side by side; this is what is left to do in order. It trains nothing, so that a
plain worker does it.
"""

import torch

from graftwork.operators import building
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.formats import states
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import ImageHints
from graftwork.operators.parameters.training import JoinParameters
from graftwork.operators.store import Store
from graftwork.operators.training import loop, opening


def run(work: Assignment, store: Store) -> Result:
    """The operator `join`: what predicts after a task, of the task's expert and those before.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        IncompatibleError: the backbone's weights changed since the plan.
    """
    parameters = from_json(JoinParameters, work.parameters)
    hints = from_json(ImageHints, work.hints)
    learner, numerics = parameters.learner, parameters.numerics
    torch.set_num_threads(max(1, int(hints.cpus)))
    previous, [expert] = work.inputs("previous"), work.inputs("expert")
    state, log = loop.join_task(
        building.trained(learner.method),
        opening.backbone(learner.network, hints.network, numerics.device),
        opening.task_of(learner.task),
        opening.task_rows(work, store, learner, parameters.data, hints),
        states.load_state(store, *previous[0]) if previous else None,
        states.load_state(store, *expert),
        opening.settings(learner.seed, numerics, hints.cpus),
    )
    return Result(
        files=states.files_of(state),
        facts={"images_forwarded": log.images_forwarded, "state_bytes": states.bytes_of(state)},
    )
