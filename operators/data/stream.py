"""A stream of tasks: each one a set of training rows and a set of test rows.

Classes and domains are numbered by arrival: a class has a number from the first task on that has
training images of it, and no class that comes later changes it. These numbers are the columns of a
learner's scores and the labels of all predictions. The numbers that a data set gives its classes
stay in its index.

A test image belongs to the task that brings it, or, if nothing was trained on its class by then, to
the task after which its class is first known: before, no answer could be right.

Shapes: n rows.
"""

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.data.scenario import StreamTask
from graftwork.operators.data.sources import Places
from graftwork.operators.parameters.tasks import TaskData

Block = tuple[int, int]
"""Numbers of a class and a domain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some rows of one split.

    Args:
        split: the split.
        rows: int64 [n], ascending.
        labels: int32 [n], classes by arrival.
        domains: int32 [n], domains by arrival.
    """

    split: Split
    rows: np.ndarray
    labels: np.ndarray
    domains: np.ndarray
    _shards: dict[int, frozenset[int]] = field(default_factory=dict)

    def shards(self, size: int) -> frozenset[int]:
        """Numbers of the shards of so many rows that hold these."""
        if size not in self._shards:
            self._shards[size] = frozenset(np.unique(self.rows // size).tolist())
        return self._shards[size]

    def at(self, chosen: np.ndarray) -> "Part":
        """Some of the rows: ascending positions, or a mask."""
        return Part(
            split=self.split,
            rows=self.rows[chosen],
            labels=self.labels[chosen],
            domains=self.domains[chosen],
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Images that are read together, in this order: split by split, in each one ascending."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @cached_property
    def index(self) -> SplitIndex:
        """Digests, and labels and domains by arrival."""
        if not self.parts:
            none = np.zeros(0, dtype=np.int32)
            return SplitIndex(digests=np.zeros((0, 32), np.uint8), labels=none, domains=none)
        return SplitIndex(
            digests=np.concatenate([part.split.digests[part.rows] for part in self.parts]),
            labels=np.concatenate([part.labels for part in self.parts]),
            domains=np.concatenate([part.domains for part in self.parts]),
        )

    @cached_property
    def digest(self) -> str:
        """Identity of the rows in keys: 64 hex digits of their images, classes and domains."""
        return self.index.digest

    @cached_property
    def blocks(self) -> dict[Block, int]:
        """Images of each class in each domain, ascending; blocks without images are left out."""
        pairs = np.stack([self.index.labels, self.index.domains], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        return {
            (int(label), int(domain)): int(count)
            for (label, domain), count in zip(found.tolist(), counts.tolist(), strict=True)
        }

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Numbers of the classes that have images here, ascending."""
        return tuple(np.unique(self.index.labels).tolist())

    def of(self, block: Block) -> "Rows":
        """The rows of one class in one domain."""
        label, domain = block
        parts = (p.at((p.labels == label) & (p.domains == domain)) for p in self.parts)
        return Rows(tuple(part for part in parts if len(part.rows)))

    def at(self, chosen: np.ndarray) -> "Rows":
        """Some of the rows: a mask [n]."""
        stops = np.cumsum([len(part.rows) for part in self.parts])[:-1]
        parts = zip(self.parts, np.split(chosen, stops), strict=True)
        return Rows(tuple(part.at(mask) for part, mask in parts if mask.any()))

    def places(self) -> list[Places]:
        """Places of the images, split by split."""
        return [part.split.where.at(part.rows) for part in self.parts]


def union(several: Iterable[Rows]) -> Rows:
    """All rows, each once: split by split in the order in which these appear."""
    parts: dict[int, list[Part]] = {}
    for rows in several:
        for part in rows.parts:
            parts.setdefault(id(part.split), []).append(part)
    return Rows(tuple(map(_sorted, parts.values())))


def _sorted(parts: Sequence[Part]) -> Part:
    rows = np.concatenate([part.rows for part in parts])
    rows, first = np.unique(rows, return_index=True)
    return Part(
        split=parts[0].split,
        rows=rows,
        labels=np.concatenate([part.labels for part in parts])[first],
        domains=np.concatenate([part.domains for part in parts])[first],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A task of a stream.

    Args:
        index: its place, from 0.
        name: what people call it.
        train: rows to learn from.
        test: rows to be tested on.
        seen: classes known after it.
    """

    index: int
    name: str
    train: Rows
    test: Rows
    seen: int

    @cached_property
    def learned(self) -> TaskData:
        """The training rows as keys hold them."""
        return described(self.train)

    @cached_property
    def tested(self) -> TaskData:
        """The test rows as keys hold them, with all classes of the task."""
        classes = sorted({*self.train.classes, *self.test.classes})
        return TaskData(rows=self.test.digest, classes=tuple(classes), seen=self.seen)


def described(rows: Rows) -> TaskData:
    """Training rows as keys hold them."""
    return TaskData(rows=rows.digest, classes=rows.classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Tasks in order of arrival.

    Args:
        tasks: the tasks.
        classes: names of the classes, by number.
        ids: the data set's own numbers of these classes.
        untested: names of classes with test images that no task learns -> number of these images.
    """

    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    ids: tuple[int, ...]
    untested: dict[str, int]


def cut(dataset: Dataset, tasks: Sequence[StreamTask]) -> Stream:
    """The stream of a data set whose tasks are classes in domains.

    Args:
        tasks: in order of arrival.
    """
    train, test = dataset.train, dataset.test
    classes = np.full(len(dataset.classes), -1, dtype=np.int32)
    domains = np.full(len(dataset.domains), -1, dtype=np.int32)
    waiting = np.zeros(0, dtype=np.int64)
    found: list[Task] = []
    for number, task in enumerate(tasks):
        rows = _members(train, task)
        present = set(np.unique(train.labels[rows]).tolist())
        _arrive(classes, [c for c in task.classes if c in present])
        tested = np.union1d(waiting, _members(test, task))
        # In a domain a class may be tested that nothing was trained on so far.
        known = classes[test.labels[tested]] >= 0
        tested, waiting = tested[known], tested[~known]
        here = {*np.unique(train.domains[rows]), *np.unique(test.domains[tested])}
        _arrive(domains, [d for d in task.domains if d in here])
        found.append(
            Task(
                index=number,
                name=task.name,
                train=_rows(train, rows, classes, domains),
                test=_rows(test, tested, classes, domains),
                seen=int(classes.max()) + 1,
            )
        )
    ids = np.argsort(classes)[np.count_nonzero(classes < 0) :]
    names, counts = np.unique(test.labels[waiting], return_counts=True)
    return Stream(
        tasks=tuple(found),
        classes=tuple(dataset.classes[i] for i in ids.tolist()),
        ids=tuple(ids.tolist()),
        untested={
            dataset.classes[i]: n for i, n in zip(names.tolist(), counts.tolist(), strict=True)
        },
    )


def whole(split: Split) -> tuple[Rows, tuple[int, ...]]:
    """All rows of a split, in one order whatever the stream.

    Returns:
        The rows, and the data set's own numbers of their classes: ascending, by label.
    """
    ids, labels = np.unique(split.labels, return_inverse=True)
    part = Part(
        split=split,
        rows=np.arange(len(split)),
        labels=labels.astype(np.int32),
        domains=split.domains,
    )
    return Rows((part,)), tuple(ids.tolist())


def _members(split: Split, task: StreamTask) -> np.ndarray:
    """Rows int64, ascending, of a task's classes in its domains."""
    member = np.isin(split.labels, task.classes) & np.isin(split.domains, task.domains)
    return np.flatnonzero(member)


def _arrive(numbers: np.ndarray, ids: Iterable[int]) -> None:
    """Gives the next numbers to those that have none."""
    for each in ids:
        if numbers[each] < 0:
            numbers[each] = numbers.max() + 1


def _rows(split: Split, rows: np.ndarray, classes: np.ndarray, domains: np.ndarray) -> Rows:
    part = Part(
        split=split,
        rows=rows,
        labels=classes[split.labels[rows]],
        domains=domains[split.domains[rows]],
    )
    return Rows((part,))


def pack(rows: np.ndarray) -> str:
    """Ascending rows int64 as a short text."""
    steps = np.diff(rows, prepend=0).astype("<i4")
    return base64.b64encode(zlib.compress(steps.tobytes())).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """The inverse of `pack`."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4")
    return np.cumsum(steps, dtype=np.int64)
