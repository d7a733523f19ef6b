"""Joins the experts of an independent method, one task after the other.

The experts train side by side; this is what is left to do in order. It trains nothing, so that a
plain worker does it.
"""

import torch

from operators.stage import Order, Result
from operators.stages import train
from operators.store.store import Store
from operators.training import loop


def run(order: Order, store: Store) -> Result:
    """The operator `join`: what predicts after a task, of the task's expert and those before.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        IncompatibleError: the backbone's weights changed since the plan.
    """
    keyed, hints = order.parameters, order.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    previous, [expert] = order.inputs("previous"), order.inputs("expert")
    state, log = loop.join_task(
        train.build(keyed["method"]),
        train.backbone(keyed, hints),
        train.task_of(keyed),
        train.task_rows(order, store),
        train.load_state(store, *previous[0]) if previous else None,
        train.load_state(store, *expert),
        train.settings(keyed, hints),
    )
    return Result(
        files=train.files_of(state),
        facts={"images_forwarded": log.images_forwarded, "state_bytes": train.bytes_of(state)},
    )
