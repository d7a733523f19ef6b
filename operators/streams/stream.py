"""A stream of tasks: each one a set of training rows and a set of test rows.

Classes and domains are numbered by arrival: a class has a number from the first task on that has
training images of it, and no class that comes later changes it. These numbers are the columns of a
learner's scores and the labels of all predictions. The numbers that a data set gives its classes
stay in its index.

A test image belongs to the task that brings it, or, if nothing was trained on its class by then, to
the task after which its class is first known: before, no answer could be right.

Shapes: n rows.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from graftwork.operators import keys
from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.data.exemplars import Block, counts
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.data.sources import Places
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.streams.scenario import StreamTask


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
            return SplitIndex.empty()
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
        return counts(self.index)

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
        ids: places of these classes among those of `Data`.
        untested: names of classes with test images that no task learns -> number of these images.
    """

    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    ids: tuple[int, ...]
    untested: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Rows that arrive together: a task, before anything is numbered.

    Args:
        name: of the task.
        train: where its training rows are.
        rows: these, int64 ascending.
        test: where its test rows are.
        tested: these, int64 ascending.
        classes: names of the classes, by their number in both splits.
        order: such numbers, in the order in which classes of one task are numbered.
        domains: names of the domains, by their number in both splits.
        arrival: the training rows in the order in which they come one by one; None if nobody drew
            one.
    """

    name: str
    train: Split
    rows: np.ndarray
    test: Split
    tested: np.ndarray
    classes: tuple[str, ...]
    order: Sequence[int]
    domains: tuple[str, ...]
    arrival: np.ndarray | None = None


def cut(dataset: Dataset, tasks: Sequence[StreamTask]) -> list[Piece]:
    """The rows of tasks that are classes in domains.

    Args:
        tasks: in order of arrival.
    """
    return [
        Piece(
            name=task.name,
            train=dataset.train,
            rows=_members(dataset.train, task),
            test=dataset.test,
            tested=_members(dataset.test, task),
            classes=dataset.classes,
            order=task.classes,
            domains=dataset.domains,
        )
        for task in tasks
    ]


def first_seen(labels: np.ndarray) -> list[int]:
    """Classes in the order of their first image."""
    ids, first = np.unique(labels, return_index=True)
    return ids[np.argsort(first)].tolist()


def arrange(pieces: Sequence[Piece], catalogue: Sequence[str] | None = None) -> Stream:
    """Numbers what arrives.

    Args:
        pieces: in order of arrival.
        catalogue: names that `Stream.ids` are places of; None for those of the stream.
    """
    classes: dict[str, int] = {}
    domains: dict[str, int] = {}
    waiting: list[tuple[Piece, np.ndarray]] = []
    found: list[Task] = []
    for number, piece in enumerate(pieces):
        present = set(np.unique(piece.train.labels[piece.rows]).tolist())
        for each in piece.order:
            if each in present:
                classes.setdefault(piece.classes[each], len(classes))
        # In a domain a class may be tested that nothing was trained on so far.
        waiting.append((piece, piece.tested))
        known = [(own, rows, _numbers(own.classes, classes)) for own, rows in waiting]
        ready = [(own, rows[t[own.test.labels[rows]] >= 0]) for own, rows, t in known]
        later = [(own, rows[t[own.test.labels[rows]] < 0]) for own, rows, t in known]
        waiting = [(own, rows) for own, rows in later if len(rows)]
        for each in np.unique(piece.train.domains[piece.rows]).tolist():
            domains.setdefault(piece.domains[each], len(domains))
        tested = [_tested(own, rows, classes) for own, rows in ready if len(rows)]
        found.append(
            Task(
                index=number,
                name=piece.name,
                train=_trained(piece, classes, domains),
                test=union(tested),
                seen=len(classes),
            )
        )
    names = tuple(classes)
    place = {name: n for n, name in enumerate(names if catalogue is None else catalogue)}
    untested = Counter(
        own.classes[label] for own, rows in waiting for label in own.test.labels[rows].tolist()
    )
    return Stream(
        tasks=tuple(found),
        classes=names,
        ids=tuple(place[name] for name in names),
        untested=untested,
    )


def _numbers(names: Sequence[str], known: Mapping[str, int]) -> np.ndarray:
    """Numbers int32 by place; -1 for what has none."""
    return np.array([known.get(name, -1) for name in names], dtype=np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """All images of a spec.

    Args:
        sources: its data sets: a single one that is cut into tasks, or one for each task.
        stream: of what is listed task by task; None for what is cut.
        classes: names of all classes; `Stream.ids` are places among them.
    """

    sources: tuple[Dataset, ...]
    stream: Stream | None
    classes: tuple[str, ...]

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Training and test images; one that several listed tasks have counts for each of them."""
        if self.stream is None:
            return len(self.sources[0].train), len(self.sources[0].test)
        tasks = self.stream.tasks
        return sum(len(task.train) for task in tasks), sum(len(task.test) for task in tasks)

    @cached_property
    def digest(self) -> str:
        """Digest of the training images, of all data sets in their order."""
        digests = [source.train.digest for source in self.sources]
        return digests[0] if self.stream is None else keys.digest(digests)


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


def _trained(piece: Piece, classes: Mapping[str, int], domains: Mapping[str, int]) -> Rows:
    split, rows = piece.train, piece.rows
    part = Part(
        split=split,
        rows=rows,
        labels=_numbers(piece.classes, classes)[split.labels[rows]],
        domains=_numbers(piece.domains, domains)[split.domains[rows]],
    )
    return Rows((part,))


def _tested(piece: Piece, rows: np.ndarray, classes: Mapping[str, int]) -> Rows:
    """Test rows; nobody asks for their domain, which need not have a number yet."""
    labels = _numbers(piece.classes, classes)[piece.test.labels[rows]]
    domains = np.zeros(len(rows), dtype=np.int32)
    return Rows((Part(split=piece.test, rows=rows, labels=labels, domains=domains),))
