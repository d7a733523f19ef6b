"""Scores of fitted methods on cached features."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from graftwork.operators import building
from graftwork.operators.assignment import Assignment
from graftwork.operators.data.scenario import seen_classes, stream_of
from graftwork.operators.formats import features, states
from graftwork.operators.store import Store

CHUNK = 4096
"""Rows scored at once."""


def fitted_scores(
    work: Assignment, store: Store, number: int, rows: np.ndarray[Any, Any], classes: Any
) -> np.ndarray[Any, Any]:
    """Scores [N, C] of a fitted method on test rows after a task; columns as in `classes`."""
    keyed, [model] = work.parameters, work.inputs("model")
    roles = features.roles(work)
    if keyed["separable"]:
        # Each class's scores are the same after every task and in every class order.
        full = _separable_scores(store, model, roles, _frozen(keyed["method"]), keyed["seed"] or 0)
        return full[np.ix_(rows, classes)]
    learned = seen_classes(stream_of(keyed["tasks"]), number)
    state = states.load_states(store, *model)[number]
    matrix = features.matrix(store, roles)[rows]
    scores = _logits(keyed["method"], state, matrix, keyed["seed"] or 0)
    return scores[:, np.argsort(learned)]


@lru_cache(maxsize=8)
def _separable_scores(
    store: Store,
    model: tuple[str, str],
    roles: tuple[tuple[tuple[str, str], ...], ...],
    method: tuple[str, str],
    seed: int,
) -> np.ndarray[Any, Any]:
    [state] = states.load_states(store, *model)
    description = {"name": method[0], "hyperparameters": json.loads(method[1])}
    return _logits(description, state, features.matrix(store, roles), seed)


def _frozen(method: dict[str, Any]) -> tuple[str, str]:
    return method["name"], json.dumps(method["hyperparameters"], sort_keys=True)


def _logits(
    method: dict[str, Any], state: dict[str, torch.Tensor], matrix: Any, seed: int
) -> np.ndarray[Any, Any]:
    learner = building.fitted(method)
    parts = []
    for start in range(0, len(matrix), CHUNK):
        chunk = torch.from_numpy(matrix[start : start + CHUNK].astype(np.float32))
        parts.append(learner.logits(state, chunk, seed).numpy())
    return np.concatenate(parts)
