"""Two branches that trained side by side: scores on training rows, and the blend made of them.

A branch never sees the other one. `score` stores its scores on the rows that it was trained on;
`run` fits the blend on those of both, and applies it to the scores on test images.

Shapes: N rows, C classes seen.
"""

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork import methods
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fused import Fused
from graftwork.operators import building
from graftwork.operators.assignment import Order, Result
from graftwork.operators.data.scenario import stream_of
from graftwork.operators.errors import Diverged
from graftwork.operators.evaluation import decisions
from graftwork.operators.formats import states
from graftwork.operators.formats.index import load_index
from graftwork.operators.store import Store
from graftwork.operators.training import forward, loop, opening
from graftwork.operators.training.settings import Log


def score(order: Order, store: Store) -> Result:
    """The operator `score`: scores of a branch on a task's training rows, exemplars among them.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    keyed, hints = order.parameters, order.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    [model] = order.inputs("model")
    settings = opening.settings(keyed, hints)
    learner, _ = loop.open_learner(
        building.trained(keyed["method"]),
        opening.backbone(keyed, hints),
        opening.task_of(keyed),
        states.load_state(store, *model),
        settings,
    )
    rows, log = opening.task_rows(order, store), Log()
    scores = forward.forward_plain(learner.eval().logits, learner, rows, settings, log)
    _check(order, scores)
    return Result(
        files={"scores.safetensors": save_tensors({"scores": scores, "targets": rows.targets})},
        facts={"images_forwarded": log.images_forwarded},
    )


def run(order: Order, store: Store) -> Result:
    """The operator `blend`: what was fitted after a task, and the predictions with it.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    keyed = order.parameters
    torch.set_num_threads(max(1, int(order.hints["cpus"])))
    method: Fused = methods.build(keyed["method"]["name"], keyed["method"]["hyperparameters"])
    clip, vit = (_scores(order, store, role) for role in ("clip", "vit"))
    assert torch.equal(clip["targets"], vit["targets"]), "branches train on the same rows"
    state = method.fit(clip["scores"], vit["scores"], clip["targets"])
    clip, vit = (_scores(order, store, role) for role in ("clip_test", "vit_test"))
    assert torch.equal(clip["rows"], vit["rows"]), "branches are tested on the same rows"
    scores = method.blend(state, clip["scores"], vit["scores"])
    _check(order, scores)
    [dataset], stream = order.inputs("dataset"), stream_of(keyed["tasks"])
    index, rows = load_index(store, *dataset), clip["rows"].numpy()
    made = decisions.files(index, stream, keyed["after"], rows, keyed["learned"], scores.numpy())
    return Result(
        files={**made, "state.safetensors": save_tensors(state)},
        facts={name: np.round(tensor.tolist(), 6).tolist() for name, tensor in state.items()},
    )


def _scores(order: Order, store: Store, role: str) -> State:
    """Scores [N, C] of a branch, with `targets` of training rows or `rows` of the test index."""
    [stage] = order.inputs(role)
    return load_tensors(store.read(*stage, "scores.safetensors"))


def _check(order: Order, scores: torch.Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise Diverged(f"{order.label}: a score is NaN or infinite")
