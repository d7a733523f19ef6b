"""Parts of the training images that are chosen by the images alone.

A validation part serves to choose hyper-parameters without the test images, a sample to measure
what does not need all of them.

Shapes: N training images.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from graftwork.operators.errors import BadDataError


def held_out(
    digests: np.ndarray,
    labels: np.ndarray,
    domains: np.ndarray,
    share: float,
    name: Callable[[int], str],
) -> np.ndarray:
    """Mask of the training images that are held out, bool [N].

    Of every class in every domain the images with the smallest digests are taken: the choice
    depends on the images alone, not on their order or on a seed. Rows of equal images go together,
    whatever their classes and domains: one on each side would be a leak.

    Args:
        digests: uint8 [N, 32].
        labels: [N].
        domains: [N].
        share: of each class's images, above 0 and below 1; at least one image.
        name: what to call the class and the domain of a row.

    Raises:
        BadDataError: a class has too few images in a domain, or shares them with others in such a
            way that nothing is left to train on, or to hold out.
    """
    image = _numbered(digests)
    order = np.lexsort((image, domains, labels))  # by digest within a group
    groups = np.stack([labels[order], domains[order]], axis=1)
    starts = np.flatnonzero(np.any(groups[1:] != groups[:-1], axis=1)) + 1
    groups = np.split(order, starts)
    wanted = [max(1, round(share * len(rows))) for rows in groups]
    held = np.zeros(len(labels), dtype=bool)
    for rows, count in zip(groups, wanted, strict=True):
        chosen = rows[image[rows] <= image[rows[count - 1]]]
        if len(chosen) == len(rows):
            raise BadDataError(
                f"{share:g} of the {len(rows)} training images of {name(int(rows[0]))} "
                "leaves none to train on",
                key="dataset.holdout",
            )
        held[chosen] = True
    held = np.isin(image, image[held])  # wherever else they stand
    if not any(held[rows].all() for rows in groups):
        return held
    division = _Division([image[rows].tolist() for rows in groups], wanted)
    stuck = division.complete()
    if stuck is not None:
        raise BadDataError(
            f"{name(int(groups[stuck][0]))} shares its training images with other classes or "
            "domains, so that none is left to train on or none to hold out",
            key="dataset.holdout",
        )
    return np.isin(image, division.held())


def _numbered(digests: np.ndarray) -> np.ndarray:
    """Numbers int64 [N], equal for equal digests and in their order."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    order = np.lexsort(words.T[::-1])
    new = np.any(words[order[1:]] != words[order[:-1]], axis=1)
    numbers = np.zeros(len(digests), dtype=np.int64)
    numbers[order[1:]] = np.cumsum(new)
    return numbers


class _Division:
    """Images that stand in several groups, divided so that every group has some on both sides.

    The smallest image of which a group still wants rows is held out, then the next. What follows
    is decided at once: of a group that is on one side but for one image, this one goes to the
    other side. Where that contradicts itself, the image is kept for training instead.

    Args:
        groups: images of each group, one number per row; at least two different ones.
        wanted: rows that each group holds out, if no other group holds out more of its images.
    """

    def __init__(self, groups: Sequence[Sequence[int]], wanted: Sequence[int]) -> None:
        self._groups = [Counter(images) for images in groups]
        self._missing = list(wanted)
        self._where = defaultdict[int, list[int]](list)
        for number, images in enumerate(self._groups):
            for image in images:
                self._where[image].append(number)
        self._held = dict[int, bool]()
        self._open = [len(images) for images in self._groups]
        self._sides = [{True: 0, False: 0} for _ in groups]

    def complete(self) -> int | None:
        """Decides on all images; a group that cannot have images on both sides, or None."""
        for image in sorted(self._where):
            if image in self._held or all(self._missing[g] <= 0 for g in self._where[image]):
                continue
            if self._decide(image, True) is None:
                continue
            if (stuck := self._decide(image, False)) is not None:
                return stuck
        return None

    def held(self) -> list[int]:
        """The images that are held out."""
        return [image for image, held in self._held.items() if held]

    def _decide(self, image: int, held: bool) -> int | None:
        """Decides on an image and on what follows; a group, and nothing decided, if it cannot."""
        following = [(image, held, self._where[image][0])]
        decided = list[int]()
        while following:
            image, held, asking = following.pop()
            if image in self._held:
                if self._held[image] != held:
                    for one in decided:
                        self._count(one, -1)
                        del self._held[one]
                    return asking
                continue
            self._held[image] = held
            self._count(image, 1)
            decided.append(image)
            for number in self._where[image]:
                sides = self._sides[number]
                if self._open[number] == 1 and not all(sides.values()):
                    last = next(i for i in self._groups[number] if i not in self._held)
                    following.append((last, not sides[True], number))
        return None

    def _count(self, image: int, sign: int) -> None:
        """Counts a decision in the image's groups (1), or takes it back (-1)."""
        held = self._held[image]
        for number in self._where[image]:
            self._open[number] -= sign
            self._sides[number][held] += sign
            if held:
                self._missing[number] -= sign * self._groups[number][image]


def sampled(digests: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """The rows of at most `count` images, ascending: those with the smallest digests.

    The choice depends on the images alone, not on their order or on a seed.

    Args:
        digests: uint8 [N, 32] of all images.
        rows: from which to choose.
    """
    first = np.ascontiguousarray(digests[rows, :8]).view(">u8").reshape(-1)
    return np.sort(rows[np.argsort(first, kind="stable")[:count]])
