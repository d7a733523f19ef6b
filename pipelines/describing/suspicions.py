"""Suspicions about what can be used and is hardly meant: duplicates, leaks, odd classes or images.

Shapes: M images of both splits.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from graftwork.operators.data.dataset import Dataset
from graftwork.operators.names import alike, folded
from graftwork.pipelines.describing.looking import LONG, Looks

SHOWN = 5
_MISSING = {"nan", "none", "null", "n/a", "nat"}


def warnings(dataset: Dataset, looks: Mapping[str, Looks]) -> list[str]:
    """Everything that is suspicious, a line each.

    Args:
        looks: by split, what was seen of its images.
    """
    return [
        *dataset.notes,
        *_images_twice(dataset),
        *_classes(dataset),
        *_names(dataset),
        *_levels(dataset),
        *_pixels(looks),
    ]


def _images_twice(dataset: Dataset) -> list[str]:
    """Duplicates, and leaks between the splits."""
    train, test = dataset.train, dataset.test
    digests = np.concatenate([train.digests, test.digests])
    labels = np.concatenate([train.labels, test.labels])
    keys = np.ascontiguousarray(digests).view("<u8")
    order = np.lexsort(keys.T)  # stable: equal images stay in the order of the data set
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    first, second = order[:-1][same], order[1:][same]
    number = len(train)
    pairs = np.stack([first, second], axis=1)
    # Of every row the first one with its image: a test image may be there several times.
    starts = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))
    origin = np.zeros(len(order), dtype=np.int64)
    origin[order] = order[starts]
    leaked = np.flatnonzero(origin[number:] < number) + number
    found = []
    for what, chosen in (
        ("images in train more than once", pairs[second < number]),
        ("images in test more than once", pairs[first >= number]),
        ("test images that are also in train", np.stack([leaked, origin[leaked]], axis=1)),
        ("images with two labels", pairs[labels[first] != labels[second]]),
    ):
        if len(chosen):
            names = [_sample(dataset, position) for position in min(chosen.tolist())]
            found.append(f"{what}: {len(chosen)}; first: {names[0]}, {names[1]}")
    return found


def _classes(dataset: Dataset) -> list[str]:
    """Classes that cannot be trained or tested."""
    found, splits = [], (dataset.train, dataset.test)
    trained, tested = (np.bincount(s.labels, minlength=len(dataset.classes)) for s in splits)
    for what, chosen in (
        ("without images", trained + tested == 0),
        ("without test images", (trained > 0) & (tested == 0)),
    ):
        if len(missing := np.flatnonzero(chosen)):
            names = _listed([dataset.classes[i] for i in missing[: SHOWN + 1]])
            found.append(f"classes {what}: {len(missing)}; {names}")
    if len(dataset.classes) == 1:
        found.append("there is only one class")
    return found


def _names(dataset: Dataset) -> list[str]:
    """Names that are easily mistaken for one another."""
    found = []
    for what, names in (("classes", dataset.classes), ("domains", dataset.domains)):
        if groups := alike(names):
            shown = "; ".join(" and ".join(f'"{n}"' for n in group) for group in groups[:SHOWN])
            more = "; ..." if len(groups) > SHOWN else ""
            why = "differ in case, width, spaces, - or _ alone"
            found.append(f"{what} whose names {why}: {shown}{more}")
    if empty := [name for name in dataset.classes if folded(name) in _MISSING]:
        found.append(f"classes that are called like missing values: {_listed(empty)}")
    if all(map(str.isdecimal, names := dataset.classes)) and names != tuple(sorted(names, key=int)):
        found.append(
            f"classes are numbers in the order of texts ({_listed(names[: SHOWN + 1])}): class ids "
            "in orders and tasks are places in it; dataset.classes gives another order"
        )
    return found


def _levels(dataset: Dataset) -> list[str]:
    """Class folders that hold no image themselves, but folders with images."""
    train = dataset.train
    if train.where.kind != "files" or not len(train):
        return []
    shared = _common([train.where.name(row) for row in range(len(train))])
    direct = np.zeros(len(dataset.classes), dtype=bool)
    nested = np.zeros(len(dataset.classes), dtype=bool)
    for row, label in enumerate(train.labels.tolist()):
        deep = train.where.name(row)[shared:].count("/") > 1
        (nested if deep else direct)[label] = True
    names = [dataset.classes[n] for n in np.flatnonzero(nested & ~direct).tolist()]
    if not names:
        return []
    return [
        f"classes whose images all lie in folders of their folder: {len(names)}; "
        f"{_listed(names[: SHOWN + 1])} (is the data set one level too high?)"
    ]


def _common(names: Sequence[str]) -> int:
    """Length of the folders that all names begin with."""
    low, high = min(names), max(names)
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low.rfind("/", 0, same) + 1


def _pixels(looks: Mapping[str, Looks]) -> list[str]:
    found = []
    if any(look.dark for look in looks.values()):
        highest = max(look.highest or 0 for look in looks.values())
        found.append(
            f"images of 16 bits reach no more than {highest} of 65535, and become nearly black; "
            "scale them to their range"
        )
    if count := sum(look.long for look in looks.values()):
        found.append(
            f"images more than {LONG:g} times as long as wide: {count}; a centre crop sees less "
            f"than a third of them"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _sample(dataset: Dataset, position: int) -> str:
    """Place and class of an image, counted through train and test."""
    split = dataset.train
    if position >= len(split):
        split, position = dataset.test, position - len(split)
    return f"{split.where.name(position)} ({dataset.classes[split.labels[position]]})"
