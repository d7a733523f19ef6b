"""Tasks of a stream, as keys hold them: classes are numbered by arrival."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from graftwork.operators.parameters.as_json import OPTIONAL, to_json

Budget = Literal["total", "per_class"]
"""Whether a number of exemplars is that of all classes together or of each."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Rows of a task; no name, no place and no other task is part of it.

    Args:
        rows: digest of the images, their classes and domains, in order.
        classes: numbers of the task's classes, ascending.
        seen: of test rows, classes known after the task.
    """

    rows: str
    classes: tuple[int, ...]
    seen: int | None = field(default=None, metadata=OPTIONAL)

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
        count: T, number of tasks of the stream; of a method that needs to know it alone.
        current: columns of this task's classes that have training images now.
        before: columns that existed before this task.
        seen: columns that exist after it.
        names: of the classes of all columns; of methods on CLIP alone.
        templates: texts with one `{}` for a name, likewise.
        mask: "batch" where a training step chooses from the classes of its batch alone.
    """

    index: int
    count: int | None = field(default=None, metadata=OPTIONAL)
    current: tuple[int, ...]
    before: int
    seen: int
    names: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    templates: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    mask: Literal["batch"] | None = field(default=None, metadata=OPTIONAL)
