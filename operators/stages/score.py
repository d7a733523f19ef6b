"""Scores a trained branch on the rows that it was trained on, for the blend.

Shapes: N rows, C classes seen.
"""

import torch
from safetensors.torch import save as save_tensors

from graftwork.operators import building
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.evaluation import decisions
from graftwork.operators.formats import states
from graftwork.operators.store import Store
from graftwork.operators.training import forward, loop, opening
from graftwork.operators.training.settings import Log


def run(work: Assignment, store: Store) -> Result:
    """The operator `score`: scores of a branch on a task's training rows, exemplars among them.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    keyed, hints = work.parameters, work.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    [model] = work.inputs("model")
    settings = opening.settings(keyed, hints)
    learner, _ = loop.open_learner(
        building.trained(keyed["method"]),
        opening.backbone(keyed, hints),
        opening.task_of(keyed),
        states.load_state(store, *model),
        settings,
    )
    rows, log = opening.task_rows(work, store), Log()
    scores = forward.forward_plain(learner.eval().logits, learner, rows, settings, log)
    decisions.require_finite(scores, work.label)
    return Result(
        files={"scores.safetensors": save_tensors({"scores": scores, "targets": rows.targets})},
        facts={"images_forwarded": log.images_forwarded},
    )
