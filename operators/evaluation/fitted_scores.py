"""Scores of fitted methods on cached features.

Shapes: N rows, D width, C classes seen.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from graftwork.operators import building
from graftwork.operators.assignment import Assignment
from graftwork.operators.data.digests import digest_of
from graftwork.operators.formats import selection, states
from graftwork.operators.formats.selection import Chosen
from graftwork.operators.parameters.as_json import from_json, to_json
from graftwork.operators.parameters.combining import Member
from graftwork.operators.parameters.fitting import EvaluateParameters
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.store import Store

CHUNK = 4096
"""Rows scored at once."""


class FittedScores:
    """Scores of a fitted method after each task.

    Args:
        fitted: the method.
        work: whose input is the fit.
        rows: the test rows [N], task by task.
        matrix: their features [N, D].
    """

    def __init__(
        self,
        fitted: EvaluateParameters | Member,
        work: Assignment,
        store: Store,
        rows: Chosen,
        matrix: np.ndarray,
    ) -> None:
        self._fitted, self._store, self._matrix = fitted, store, matrix
        [self._model] = work.inputs("model")
        self._all = None if fitted.columns is None else self._separable(rows)

    def after(self, number: int, count: int, seen: int) -> np.ndarray:
        """Scores [count, seen] of the first rows after a task."""
        if self._all is not None:
            return self._all[:count, :seen]
        state = states.load_states(self._store, *self._model)[number]
        return _logits(self._fitted.method, state, self._matrix[:count], self._fitted.seed)

    def _separable(self, rows: Chosen) -> np.ndarray:
        """Scores [N, C] of all rows: each class's are the same after every task, in every order."""
        order = selection.in_order(rows)
        ordered = _Ordered(digest_of(rows.index.digests[order]), self._matrix[order])
        method = json.dumps(to_json(self._fitted.method), sort_keys=True)
        scores = _ordered_scores(self._store, self._model, method, self._fitted.seed, ordered)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        assert self._fitted.columns is not None
        return scores[place][:, list(self._fitted.columns)]


@dataclass(frozen=True)
class _Ordered:
    """Features in the order of their sources, known by the digest of their images."""

    digest: str
    matrix: np.ndarray = field(compare=False)


@lru_cache(maxsize=8)
def _ordered_scores(
    store: Store, model: tuple[str, str], method: str, seed: int, rows: _Ordered
) -> np.ndarray:
    """Scores that the evaluations of all class orders have in common."""
    [state] = states.load_states(store, *model)
    return _logits(from_json(MethodRef, json.loads(method)), state, rows.matrix, seed)


def _logits(
    method: MethodRef, state: dict[str, torch.Tensor], matrix: np.ndarray, seed: int
) -> np.ndarray:
    learner = building.fitted(method)
    parts = []
    for start in range(0, len(matrix), CHUNK):
        chunk = torch.from_numpy(matrix[start : start + CHUNK].astype(np.float32))
        parts.append(learner.logits(state, chunk, seed).numpy())
    return np.concatenate(parts)
