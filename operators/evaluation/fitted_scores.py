"""Scores of fitted methods on cached features."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from graftwork.operators import building
from graftwork.operators.assignment import Assignment
from graftwork.operators.data.scenario import seen_classes, stream_of
from graftwork.operators.formats import features, states
from graftwork.operators.parameters.as_json import from_json, to_json
from graftwork.operators.parameters.combining import Member
from graftwork.operators.parameters.fitting import EvaluateParameters
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.store import Store

CHUNK = 4096
"""Rows scored at once."""


def fitted_scores(
    fitted: EvaluateParameters | Member,
    tasks: Sequence[TaskData],
    work: Assignment,
    store: Store,
    number: int,
    rows: np.ndarray[Any, Any],
    classes: Any,
) -> np.ndarray[Any, Any]:
    """Scores [N, C] of a fitted method on test rows after a task; columns as in `classes`.

    Args:
        fitted: the method.
        tasks: in learning order.
        work: whose inputs are the fit and the test features.
        number: of the task.
    """
    [model], roles = work.inputs("model"), features.roles(work)
    if fitted.separable:
        # Each class's scores are the same after every task and in every class order.
        method = json.dumps(to_json(fitted.method), sort_keys=True)
        full = _separable_scores(store, model, roles, method, fitted.seed)
        return full[np.ix_(rows, classes)]
    learned = seen_classes(stream_of(tasks), number)
    state = states.load_states(store, *model)[number]
    matrix = features.matrix(store, roles)[rows]
    scores = _logits(fitted.method, state, matrix, fitted.seed)
    return scores[:, np.argsort(learned)]


@lru_cache(maxsize=8)
def _separable_scores(
    store: Store,
    model: tuple[str, str],
    roles: tuple[tuple[tuple[str, str], ...], ...],
    method: str,
    seed: int,
) -> np.ndarray[Any, Any]:
    [state] = states.load_states(store, *model)
    described = from_json(MethodRef, json.loads(method))
    return _logits(described, state, features.matrix(store, roles), seed)


def _logits(
    method: MethodRef, state: dict[str, torch.Tensor], matrix: Any, seed: int
) -> np.ndarray[Any, Any]:
    learner = building.fitted(method)
    parts = []
    for start in range(0, len(matrix), CHUNK):
        chunk = torch.from_numpy(matrix[start : start + CHUNK].astype(np.float32))
        parts.append(learner.logits(state, chunk, seed).numpy())
    return np.concatenate(parts)
