"""Blends two branches that trained side by side: fitted on training rows, applied to test rows.

A branch never sees the other one; the stage `score` has its scores on the rows of its training.

Shapes: N rows, C classes seen.
"""

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork.methods.contracts.card import State
from graftwork.operators import building
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.evaluation import decisions
from graftwork.operators.formats import selection
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.training import BlendParameters
from graftwork.operators.store import Store


def run(work: Assignment, store: Store) -> Result:
    """The operator `blend`: what was fitted after a task, and the predictions with it.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a score is NaN or infinite.
    """
    parameters = from_json(BlendParameters, work.parameters)
    hints = from_json(CpuHints, work.hints)
    torch.set_num_threads(max(1, int(hints.cpus)))
    method = building.fused(parameters.method)
    clip, vit = (_scores(work, store, role) for role in ("clip", "vit"))
    assert torch.equal(clip["targets"], vit["targets"]), "branches train on the same rows"
    state = method.fit(clip["scores"], vit["scores"], clip["targets"])
    clip, vit = (_scores(work, store, role) for role in ("clip_test", "vit_test"))
    scores = method.blend(state, clip["scores"], vit["scores"])
    decisions.require_finite(scores, work.label)
    tasks = selection.of(work, store, hints.selection, parameters.tasks)
    index, true_task = selection.joined(tasks).index, selection.numbers(tasks)
    made = decisions.files(index, parameters.tasks, true_task, parameters.after, scores.numpy())
    return Result(
        files={**made, "state.safetensors": save_tensors(state)},
        facts={name: np.round(tensor.tolist(), 6).tolist() for name, tensor in state.items()},
    )


def _scores(work: Assignment, store: Store, role: str) -> State:
    """Scores [N, C] of a branch, with `targets` of training rows."""
    [stage] = work.inputs(role)
    return load_tensors(store.read(*stage, "scores.safetensors"))
