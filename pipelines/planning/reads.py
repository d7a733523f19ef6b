"""Indexes and features that stages read, of which their keys name the rows alone.

Where rows are is worked out when somebody looks at a stage's hints: a sweep plans ten thousand
stages, of which few are sent to a worker.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from graftwork.operators.data.dataset import Split
from graftwork.operators.formats.packed import pack
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import (
    CpuHints,
    EvaluateHints,
    FitHints,
    ImageHints,
    Numbering,
    PartHints,
    Selection,
    ShardHints,
    TrainHints,
)
from graftwork.operators.stage import Stage
from graftwork.operators.streams.stream import Part, Rows

H = TypeVar("H", CpuHints, EvaluateHints, FitHints, ImageHints, ShardHints, TrainHints)


class Hints(Mapping[str, Any], Generic[H]):
    """Hints of a stage as JSON, some of them worked out when somebody looks.

    Args:
        value: the hints, without `later`.
        later: values by name.
    """

    def __init__(self, value: H, **later: Callable[[], Any]) -> None:
        self.value, self.later = value, later
        self._fixed = to_json(value)
        self._names = tuple(dict.fromkeys([*self._fixed, *later]))

    def __getitem__(self, name: str) -> Any:
        return self.later[name]() if name in self.later else self._fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reads:
    """Rows that a stage reads, task by task.

    Args:
        tasks: the rows of each task.
        shards: splits -> all of their feature shards, by role; empty if no features are read.
        shard_size: rows of a shard.
    """

    tasks: Sequence[Rows]
    shards: Mapping[str, Callable[[Split], tuple[Stage, ...]]]
    shard_size: int

    def stages(self) -> dict[str, tuple[Stage, ...]]:
        """The stages, by role: indexes, and the shards that hold rows."""
        return {
            "dataset": tuple(split.stage() for split, _ in self._held),
            **{
                role: tuple(shards(split)[n] for split, numbers in self._held for n in numbers)
                for role, shards in self.shards.items()
            },
        }

    def selection(self) -> dict[str, Any]:
        """The places of the rows, as JSON."""
        place = {id(split): number for number, (split, _) in enumerate(self._held)}
        chosen = Selection(
            sources=tuple(self._numbering(split) for split, _ in self._held),
            tasks=tuple(
                tuple(
                    PartHints(source=place[id(part.split)], rows=pack(part.rows))
                    for part in rows.parts
                )
                for rows in self.tasks
            ),
            shards=tuple(
                (number, n * self.shard_size)
                for number, (_, numbers) in enumerate(self._held)
                for n in numbers
            )
            if self.shards
            else (),
        )
        return to_json(chosen)

    @cached_property
    def _held(self) -> list[tuple[Split, list[int]]]:
        """The splits, in the order of their first rows, and numbers of shards that hold rows."""
        held: dict[int, tuple[Split, set[int]]] = {}
        for part in self._parts():
            _, numbers = held.setdefault(id(part.split), (part.split, set()))
            numbers |= part.shards(self.shard_size)
        return [(split, sorted(numbers)) for split, numbers in held.values()]

    def _parts(self) -> Iterator[Part]:
        for rows in self.tasks:
            yield from rows.parts

    def _numbering(self, split: Split) -> Numbering:
        classes = np.full(len(split.classes), -1, dtype=np.int64)
        domains = np.full(len(split.domain_names), -1, dtype=np.int64)
        for part in self._parts():
            if part.split is split:
                classes[split.labels[part.rows]] = part.labels
                domains[split.domains[part.rows]] = part.domains
        return Numbering(classes=tuple(classes.tolist()), domains=tuple(domains.tolist()))
