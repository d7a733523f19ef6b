"""Parameters of `fit` and `evaluate`."""

from dataclasses import dataclass, field
from typing import Any

from graftwork.operators.parameters.as_json import OPTIONAL
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.tasks import TaskData


@dataclass(frozen=True, kw_only=True)
class FitParameters:
    """Parameters of `fit`.

    Args:
        method: the closed-form method.
        seed: of what it draws; None where it draws nothing.
        num_classes: K.
        tasks: in learning order; a single one for a separable method.
    """

    method: MethodRef
    seed: int | None
    num_classes: int
    tasks: tuple[TaskData, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluateParameters:
    """Parameters of `evaluate`.

    Args:
        method: whose predictions they are: a method, a merge or a rule.
        separable: whether one fit on all classes predicts; None of what was not fitted.
        order: name of the class order.
        seed: of the run.
        num_classes: K.
        tasks: in learning order.
    """

    method: MethodRef
    separable: bool | None = field(default=None, metadata=OPTIONAL)
    order: Any
    seed: int
    num_classes: int
    tasks: tuple[TaskData, ...]
