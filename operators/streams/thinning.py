"""Streams with few images: of all classes but the first ones, or of more and more classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from graftwork.operators.errors import ConfigError
from graftwork.operators.streams.stream import Piece


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Few training images of each class after the first task.

    Source: Tao et al., Few-Shot Class-Incremental Learning, CVPR 2020.

    Args:
        shots: training images of a class.
        seed: of the ones that are drawn; None takes the first ones in file order.
    """

    shots: int
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class LongTailed:
    """Numbers of training images that fall from class to class by one factor.

    Source: Liu et al., Long-Tailed Class Incremental Learning, ECCV 2022.

    Args:
        imbalance: images of the largest class divided by those of the smallest.
        order: "ordered": classes get rarer in learning order; "shuffled": numbers are shuffled.
        seed: of the shuffling.
        many: classes with more training images are frequent ones.
        few: classes with fewer training images are rare ones.
    """

    imbalance: float
    order: Literal["ordered", "shuffled"]
    seed: int
    many: int
    few: int


def few_shot(pieces: Sequence[Piece], few: FewShot) -> list[Piece]:
    """The tasks with `shots` training images of each class after the first task.

    Raises:
        ConfigError: a class has fewer.
    """
    random = None if few.seed is None else np.random.RandomState(few.seed)
    return [*pieces[:1], *(_shots(piece, few.shots, random) for piece in pieces[1:])]


def _shots(piece: Piece, shots: int, random: np.random.RandomState | None) -> Piece:
    labels, chosen = piece.train.labels[piece.rows], []
    for each in piece.order:
        own = piece.rows[labels == each]
        if len(own) < shots:
            raise ConfigError(
                f'class "{piece.classes[each]}" has {len(own)} training images, fewer than {shots}',
                key="scenario.few_shot.shots",
            )
        chosen.append(own[:shots] if random is None else random.permutation(own)[:shots])
    return replace(piece, rows=np.sort(np.concatenate(chosen)))


def long_tailed(pieces: Sequence[Piece], tail: LongTailed) -> list[Piece]:
    """The tasks with as many training images of each class as its place says, first ones first.

    The class at place i of C keeps floor(n r^(-i / (C - 1))) images, n those of the largest class
    and r the imbalance; never none, and never more than it has.
    """
    sizes = np.sum([_counts(piece) for piece in pieces], axis=0)
    classes = list(dict.fromkeys(each for piece in pieces for each in piece.order))
    largest, last = int(sizes.max()), max(len(classes) - 1, 1)
    # As the source writes it, the power of the inverse; in Python's numbers, since the last bit of
    # NumPy's powers, which decides a whole number, differs between processors.
    numbers = np.array(
        [max(int(largest * (1 / tail.imbalance) ** (i / last)), 1) for i in range(len(classes))]
    )
    if tail.order == "shuffled":
        np.random.RandomState(tail.seed).shuffle(numbers)
    left = dict(zip(classes, numbers.tolist(), strict=True))
    return [_first(piece, left) for piece in pieces]


def _counts(piece: Piece) -> np.ndarray:
    return np.bincount(piece.train.labels[piece.rows], minlength=len(piece.classes))


def _first(piece: Piece, left: dict[int, int]) -> Piece:
    """The first rows of each class, of which so many are left; takes them."""
    labels, chosen = piece.train.labels[piece.rows], []
    for each in piece.order:
        own = piece.rows[labels == each][: left[each]]
        left[each] -= len(own)
        chosen.append(own)
    return replace(piece, rows=np.sort(np.concatenate(chosen)))


def groups(counts: Mapping[int, int], tail: LongTailed) -> dict[str, tuple[int, ...]]:
    """Classes by their number of training images: many, medium and few.

    Source: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, with more
    than 100 and fewer than 20 images.

    Args:
        counts: class -> number of training images.
    """
    return {
        "many": tuple(c for c, n in counts.items() if n > tail.many),
        "medium": tuple(c for c, n in counts.items() if tail.few <= n <= tail.many),
        "few": tuple(c for c, n in counts.items() if n < tail.few),
    }
