"""Rows of tasks, found in stored indexes, and the features of their images.

A stage's key names the rows that it reads by their digest, its hints say where they are; here both
are brought together, and nothing is read that the key does not name.

Shapes: n rows, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from graftwork.operators.assignment import Assignment
from graftwork.operators.data.digests import digest_of
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import DamagedStage
from graftwork.operators.formats import features
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.packed import unpack
from graftwork.operators.parameters.hints import Numbering, PartHints, Selection
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Rows of one or several indexes, in their order.

    Args:
        index: digests, and labels and domains by arrival.
        source: int64 [n], which of the `dataset` stages that are read.
        position: int64 [n], row of that index.
    """

    index: SplitIndex
    source: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def at(self, rows: np.ndarray) -> "Chosen":
        """Some of the rows: positions, or a mask."""
        return Chosen(
            index=self.index.at(rows), source=self.source[rows], position=self.position[rows]
        )


def rows_of(work: Assignment, store: Store, selection: Selection) -> list[Chosen]:
    """The rows of each task of a selection, not yet compared with a key.

    Raises:
        DamagedStage: an index is damaged, or has no such rows.
    """
    stages = work.inputs("dataset")
    indexes = [load_index(store, *stage) for stage in stages]
    found = []
    for parts in selection.tasks:
        pieces = []
        for part in parts:
            index, numbering = indexes[part.source], selection.sources[part.source]
            if (piece := _part(index, numbering, part)) is None:
                raise DamagedStage(*stages[part.source], "it lacks rows that were planned")
            pieces.append(piece)
        found.append(joined(pieces))
    return found


def _part(index: SplitIndex, numbering: Numbering, part: PartHints) -> Chosen | None:
    """Rows of one index; None if it has no such rows."""
    rows = unpack(part.rows)
    if len(rows) and rows[-1] >= len(index):
        return None
    own = index.at(rows)
    numbered = SplitIndex(
        digests=own.digests,
        labels=np.array(numbering.classes, dtype=np.int32)[own.labels],
        domains=np.array(numbering.domains, dtype=np.int32)[own.domains],
    )
    source = np.full(len(rows), part.source, dtype=np.int64)
    return Chosen(index=numbered, source=source, position=rows)


def of(
    work: Assignment, store: Store, selection: Selection, wanted: Sequence[TaskData]
) -> list[Chosen]:
    """The rows that a key names, task by task.

    Raises:
        DamagedStage: an index is damaged, or its rows are not those of the key.
    """
    found = rows_of(work, store, selection)
    for number, (rows, task) in enumerate(zip(found, wanted, strict=True)):
        require(work, rows, task.rows, f"rows of task {number + 1}")
    return found


def require(work: Assignment, rows: Chosen, digest: str, what: str) -> None:
    """Checks that rows are those that a key names.

    Raises:
        DamagedStage: they are not.
    """
    if rows.index.digest != digest:
        stage = work.inputs("dataset")[int(rows.source[0]) if len(rows) else 0]
        raise DamagedStage(*stage, f"{what} are not those that {work.label} was planned for")


def joined(parts: Sequence[Chosen]) -> Chosen:
    """All rows, one part after the other."""
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Chosen(index=SplitIndex.empty(), source=none, position=none)
    return Chosen(
        index=SplitIndex(
            digests=np.concatenate([part.index.digests for part in parts]),
            labels=np.concatenate([part.index.labels for part in parts]),
            domains=np.concatenate([part.index.domains for part in parts]),
        ),
        source=np.concatenate([part.source for part in parts]),
        position=np.concatenate([part.position for part in parts]),
    )


def numbers(tasks: Sequence[Chosen]) -> np.ndarray:
    """Numbers int64 [n] of the tasks whose rows stand one after the other."""
    return np.repeat(np.arange(len(tasks)), [len(task) for task in tasks])


def in_order(rows: Chosen) -> np.ndarray:
    """Positions int64 [n] that bring rows into the order of their sources."""
    return np.lexsort((rows.position, rows.source))


def matrix(work: Assignment, store: Store, selection: Selection, rows: Chosen) -> np.ndarray | None:
    """Cached features [n, D] of some rows, those of several backbones side by side; None for none.

    Raises:
        DamagedStage: a shard is damaged, or is one of other images.
    """
    roles = features.roles(work)
    parts = [_matrix(work, store, selection, shards, rows) for shards in roles]
    return None if not parts else parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _matrix(
    work: Assignment,
    store: Store,
    selection: Selection,
    shards: Sequence[tuple[str, str]],
    rows: Chosen,
) -> np.ndarray:
    stages = work.inputs("dataset")
    starts = np.array(selection.shards, dtype=np.int64).reshape(-1, 2)
    # Shards stand in the order of their sources and rows.
    keys = starts[:, 0] * _FAR + starts[:, 1]
    number = np.searchsorted(keys, rows.source * _FAR + rows.position, side="right") - 1
    found: np.ndarray | None = None
    for each in map(int, np.unique(number)):
        source, first = (int(value) for value in starts[each])
        shard = features.shard(store, *shards[each])
        if not _holds(store, shards[each], stages[source], first, len(shard)):
            raise DamagedStage(*shards[each], f"not of the images that {work.label} looks for")
        here = np.flatnonzero(number == each)
        inside = rows.position[here] - first
        held = (rows.source[here] == source) & (inside >= 0) & (inside < len(shard))
        if not held.all():
            raise DamagedStage(*shards[each], f"lacks images that {work.label} looks for")
        if found is None:
            found = np.empty((len(rows), shard.shape[1]), dtype=shard.dtype)
        if found.shape[1] != shard.shape[1]:
            raise DamagedStage(*shards[each], "features of another width than the other shards")
        found[here] = shard[inside]
    return np.zeros((0, 0), dtype=np.float32) if found is None else found


@lru_cache(maxsize=4096)
def _holds(
    store: Store, shard: tuple[str, str], dataset: tuple[str, str], first: int, count: int
) -> bool:
    """Tells whether a shard has the features of some rows of an index."""
    images = load_index(store, *dataset).digests[first : first + count]
    return features.images_of(store, *shard) == digest_of(images)


_FAR = 1 << 40
"""More rows than a source has."""
