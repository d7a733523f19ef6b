"""Parameters of `fit` and `evaluate`."""

from dataclasses import dataclass, field, replace
from typing import Any

from graftwork.operators.parameters.as_json import OPTIONAL
from graftwork.operators.parameters.features import FeatureKind, TextParameters
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.tasks import TaskData


@dataclass(frozen=True, kw_only=True)
class FitParameters:
    """Parameters of `fit`.

    Args:
        method: the closed-form method.
        seed: of what it draws; None where it draws nothing.
        features: those that it reads, side by side.
        texts: of a method on CLIP, the texts of its classes.
        tasks: in learning order; a single one for a separable method.
    """

    method: MethodRef
    seed: int | None
    features: tuple[FeatureKind, ...]
    texts: TextParameters | None = field(default=None, metadata=OPTIONAL)
    tasks: tuple[TaskData, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Classes whose accuracy is wanted by itself.

    Args:
        name: of the group, as in `evaluation.metrics.GROUPS`.
        classes: by arrival, ascending.
    """

    name: str
    classes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures beside those of every run.

    Args:
        groups: classes by themselves.
        online: whether tasks are sections of one sequence: the mean of the curve is an area.
        transfer: whether every model is asked about all tasks, those that come later as well.
    """

    groups: tuple[Group, ...] = ()
    online: bool = False
    transfer: bool | None = field(default=None, metadata=OPTIONAL)

    def first(self, classes: int) -> "Measures":
        """The same of the first classes alone."""
        groups = tuple(
            replace(group, classes=tuple(c for c in group.classes if c < classes))
            for group in self.groups
        )
        return replace(self, groups=groups)


@dataclass(frozen=True, kw_only=True)
class EvaluateParameters:
    """Parameters of `evaluate`.

    Args:
        method: whose predictions they are: a method, a merge or a rule.
        columns: where one fit serves all class orders, its columns of the classes by arrival;
            None elsewhere.
        order: name of the class order.
        seed: of the run.
        tasks: the test rows, in learning order.
        measures: what else is measured; None for nothing.
    """

    method: MethodRef
    columns: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)
    order: Any
    seed: int
    tasks: tuple[TaskData, ...]
    measures: Measures | None = field(default=None, metadata=OPTIONAL)
