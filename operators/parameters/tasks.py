"""Tasks of a stream, as keys hold them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from graftwork.operators.parameters.as_json import OPTIONAL, to_json

Budget = Literal["total", "per_class"]
"""Whether a number of exemplars is that of all classes together or of each."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The images that belong to a task: those of some classes in some domains.

    Args:
        classes: class ids, in learning order.
        domains: numbers of the domains, in the data set's numbering.
    """

    classes: tuple[int, ...]
    domains: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The same dictionary every time: a task of a long stream stands in many stages."""
        return self._json

    @cached_property
    def _json(self) -> dict[str, Any]:
        return to_json(self)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Facts that a method may know about a task; see `methods.contracts.trained.Task`.

    Args:
        index: t, from 0.
        count: T, number of tasks of the stream.
        current: columns of this task's classes that have training images now.
        before: columns that existed before this task.
        seen: columns that exist after it.
        names: of the classes of all columns; of methods on CLIP alone.
        templates: texts with one `{}` for a name, likewise.
    """

    index: int
    count: int
    current: tuple[int, ...]
    before: int
    seen: int
    names: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    templates: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The exemplars of a task.

    Args:
        earlier: the tasks before, in learning order.
        exemplars: how many may be kept, of all classes together or of each.
        budget: which of the two.
    """

    earlier: tuple[TaskData, ...]
    exemplars: int
    budget: Budget
