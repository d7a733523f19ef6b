"""Exemplars: which images of earlier tasks a later task may train on again.

The training images of each class in each domain of a task (a block) are ranked once, whatever the
class order, the seed and the method; a later task then takes the first ranks of the blocks of
earlier tasks, as many as its method's budget allows. Test images are never ranked.

Shapes: N rows of a task or of a block, D width of the frozen features.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.parameters.tasks import Budget
from graftwork.operators.seeds import derive

Block = tuple[int, int]
"""A class and a domain."""

PICKS = 1000
"""Steps of `barycenter`, as in continuum."""

TIE = 1e-12
"""Scores that differ by less are equal: rounding must not choose between equal images."""


def herd(features: np.ndarray) -> np.ndarray:
    """Rows [N] in the order in which they bring the mean of those so far nearest to that of all.

    iCaRL's herding (Rebuffi et al., https://arxiv.org/abs/1611.07725, algorithm 4): features at
    unit length, their mean as it comes, one row after the other so that the mean of the first k is
    nearest to it. Of equal rows the lower number comes first.

    Args:
        features: [N, D].
    """
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    gram = rows @ rows.T
    towards, square = gram.mean(axis=1), np.diag(gram)
    # |k m - s - x|^2 up to what all rows have in common; s is the sum of the rows so far.
    so_far = np.zeros(len(rows))
    left = np.ones(len(rows), dtype=bool)
    order = np.empty(len(rows), dtype=np.int64)
    for number in range(len(rows)):
        distance = square - 2 * ((number + 1) * towards - so_far)
        distance[~left] = np.inf
        near = distance <= distance.min() + TIE * (number + 1)
        order[number] = np.flatnonzero(near)[0]
        left[order[number]] = False
        so_far += gram[order[number]]
    return order


def barycenter(features: np.ndarray) -> np.ndarray:
    """Rows [N] in the order of continuum's herding of this name, which PromptFusion uses.

    The row of the largest product with w, which starts as the mean m of the features at unit length
    and becomes w + m - row. A row may be found again, which changes w and finds nothing; rows that
    were not found in `PICKS` steps follow in their order. The first k are continuum's k exemplars.
    On features with few dimensions many of them are others than those of `herd`, where no row is
    taken twice.

    Args:
        features: [N, D].
    """
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8
    gram = rows @ rows.T
    towards = gram.mean(axis=1)
    product, found = towards.copy(), dict[int, None]()
    for _ in range(PICKS):
        if len(found) == len(rows):
            break
        row = int(np.flatnonzero(product >= product.max() - TIE)[0])
        found[row] = None
        product += towards - gram[row]
    found |= dict.fromkeys(range(len(rows)))
    return np.array(list(found), dtype=np.int64)


def shuffle(digests: np.ndarray, seed: int) -> np.ndarray:
    """Rows [N] in an order that follows from the seed and each image's bytes alone.

    Args:
        digests: uint8 [N, 32], sha256 of the encoded images.
    """
    drawn = [derive(seed, "exemplar", digest.tobytes().hex()) for digest in digests]
    return np.argsort(np.array(drawn, dtype=np.int64), kind="stable")


def shares(
    earlier: Sequence[Mapping[Block, int]], budget: int, kind: Budget
) -> dict[tuple[int, Block], int]:
    """Number of images that are kept of each block of earlier tasks.

    A class may keep `budget // classes so far` images (`total`) or `budget` (`per_class`). Where
    it stands in several blocks they share that evenly, the earlier ones have what is left over. A
    block with fewer images keeps them all.

    Args:
        earlier: images of each block, for each of the tasks before, in learning order.

    Returns:
        (place of the task, block) -> images.
    """
    of: dict[int, list[tuple[int, Block]]] = {}
    for number, counts in enumerate(earlier):
        for block in sorted(counts):
            of.setdefault(block[0], []).append((number, block))
    quota = budget // max(1, len(of)) if kind == "total" else budget
    return {
        (number, block): min(
            earlier[number][block], quota // len(blocks) + (place < quota % len(blocks))
        )
        for blocks in of.values()
        for place, (number, block) in enumerate(blocks)
    }


def blocks(labels: np.ndarray, domains: np.ndarray) -> Iterator[tuple[Block, np.ndarray]]:
    """Every (class, domain) that has rows, ascending, with its rows, ascending."""
    order = np.lexsort((domains, labels))  # stable: rows stay ascending in a block
    pairs = np.stack([labels[order], domains[order]], axis=1)
    starts = np.flatnonzero(np.any(pairs[1:] != pairs[:-1], axis=1)) + 1
    for rows in np.split(order, starts):
        if len(rows):
            yield (int(labels[rows[0]]), int(domains[rows[0]])), rows


def counts(index: SplitIndex) -> dict[Block, int]:
    """Images of each block that has some, ascending."""
    return {block: len(rows) for block, rows in blocks(index.labels, index.domains)}


def chosen(index: SplitIndex, ranks: Sequence[np.ndarray], most: Mapping[Block, int]) -> np.ndarray:
    """Mask of the exemplars among the rows of one earlier task, bool [N].

    Args:
        index: of the task.
        ranks: of each of its blocks, the place of each row.
        most: images that are kept of each block.
    """
    kept = np.zeros(len(index), dtype=bool)
    own = blocks(index.labels, index.domains)
    for (block, rows), places in zip(own, ranks, strict=True):
        kept[rows[places < most[block]]] = True
    return kept
