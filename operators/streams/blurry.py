"""Si-Blurry: some classes come with one task each, images of the others are mixed over all tasks.

Source: Moon et al., Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask
and Visual Prompt Tuning, ICCV 2023, as AnAppleCore/FlyGCL draws it (`utils/onlinesampler.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graftwork.operators.data.dataset import Dataset
from graftwork.operators.errors import ConfigError
from graftwork.operators.streams.draws import Draws
from graftwork.operators.streams.stream import Piece, first_seen


@dataclass(frozen=True, kw_only=True)
class Blurry:
    """Shares of a blurry stream.

    Args:
        tasks: T, how many there are.
        disjoint: percentage of the classes that come with one task alone.
        mixed: percentage of the other classes' images that are dealt over all tasks.
        cuts: whether tasks have equally many classes, or boundaries are drawn (`rnd_NM`).
    """

    tasks: int
    disjoint: int
    mixed: int
    cuts: Literal["even", "drawn"]


def deal(labels: np.ndarray, num_classes: int, shares: Blurry, seed: int) -> list[np.ndarray]:
    """Rows of each task, in the order in which they arrive.

    Args:
        labels: class ids [n].
        seed: of all that is drawn.

    Returns:
        For each task its rows, int64. With `cuts: even` what does not divide by T is in no task,
        as in the source.

    Raises:
        ConfigError: even shares need a number of classes that divides by T.
    """
    count, draws = shares.tasks, Draws(seed)
    disjoint = num_classes * shares.disjoint // 100 // count * count
    blurry = num_classes - disjoint
    if shares.cuts == "even" and blurry % count:
        raise ConfigError(
            f"{blurry} of {num_classes} classes are mixed, which {count} tasks cannot share "
            "evenly; give another number of tasks, or cuts: drawn",
            key="scenario.blurry.tasks",
        )
    order = draws.permutation(num_classes)
    own = [_rows(labels, group) for group in _groups(order[:disjoint], shares, draws)]
    mixed = [_rows(labels, group) for group in _groups(order[disjoint:], shares, draws)]
    give, take = _numbers(mixed, shares, draws)
    pool = np.concatenate([rows[:n] for rows, n in zip(mixed, give, strict=True)])
    pool = pool[draws.permutation(len(pool))]
    starts = np.concatenate([[0], np.cumsum(take)]).astype(np.int64)
    found = []
    for number, (alone, rows) in enumerate(zip(own, mixed, strict=True)):
        dealt = pool[starts[number] : starts[number + 1]]
        task = np.concatenate([alone, rows[give[number] :], dealt])
        found.append(task[draws.permutation(len(task))])
    return found


def pieces(dataset: Dataset, shares: Blurry, seed: int) -> list[Piece]:
    """The tasks of a data set.

    A class is tested from the task on that first shows an image of it; one that none shows stands
    with the last task.

    Raises:
        ConfigError: as `deal`.
    """
    train, test = dataset.train, dataset.test
    dealt = deal(train.labels, len(dataset.classes), shares, seed)
    first = np.full(len(dataset.classes), shares.tasks - 1)
    for number, arrival in reversed(list(enumerate(dealt))):
        first[train.labels[arrival]] = number
    return [
        Piece(
            name=f"task {number + 1}",
            train=train,
            rows=np.sort(arrival),
            test=test,
            tested=np.flatnonzero(first[test.labels] == number),
            classes=dataset.classes,
            order=first_seen(train.labels[arrival]),
            domains=dataset.domains,
            arrival=arrival,
        )
        for number, arrival in enumerate(dealt)
    ]


def _groups(classes: np.ndarray, shares: Blurry, draws: Draws) -> list[np.ndarray]:
    """Classes of each task."""
    if shares.cuts == "even" or not len(classes):
        return np.array_split(classes, shares.tasks)
    return np.split(classes, np.sort(draws.integers(len(classes), shares.tasks - 1)))


def _rows(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isin(labels, classes))


def _numbers(
    mixed: Sequence[np.ndarray], shares: Blurry, draws: Draws
) -> tuple[Sequence[int], Sequence[int]]:
    """Images that each task gives to the pool, and takes from it."""
    if shares.cuts == "even":
        give = [len(rows) * shares.mixed // 100 for rows in mixed]
        return give, [sum(give) // shares.tasks] * shares.tasks
    count = sum(map(len, mixed)) * shares.mixed // 100
    if not count:
        return [0] * shares.tasks, [0] * shares.tasks
    cuts = np.sort(draws.integers(count, shares.tasks - 1))
    numbers = np.diff([0, *cuts.tolist(), count]).tolist()
    # A task with fewer images of mixed classes gives all that it has.
    return [min(n, len(rows)) for n, rows in zip(numbers, mixed, strict=True)], numbers
