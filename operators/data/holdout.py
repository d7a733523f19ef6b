"""Parts of the training images that are chosen by the images alone.

A validation part serves to choose hyper-parameters without the test images, a sample to measure
what does not need all of them.

Shapes: N training images.
"""

import numpy as np

from graftwork.operators.errors import BadDataError


def held_out(
    digests: np.ndarray, labels: np.ndarray, domains: np.ndarray, share: float
) -> np.ndarray:
    """Mask of the training images that are held out, bool [N].

    Of every class in every domain the images with the smallest digests are taken: the choice
    depends on the images alone, not on their order or on a seed.

    Args:
        digests: uint8 [N, 32].
        labels: [N].
        domains: [N].
        share: of each class's images, above 0 and below 1; at least one image.

    Raises:
        BadDataError: a class has too few images.
    """
    first = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1)
    order = np.lexsort((first, domains, labels))  # by digest within a group
    groups = np.stack([labels[order], domains[order]], axis=1)
    starts = np.flatnonzero(np.any(groups[1:] != groups[:-1], axis=1)) + 1
    held = np.zeros(len(labels), dtype=bool)
    for rows in np.split(order, starts):
        last = first[rows[max(1, round(share * len(rows))) - 1]]
        # Equal images go together: one on each side would be a leak.
        chosen = rows[first[rows] <= last]
        if len(chosen) == len(rows):
            raise BadDataError(
                f"{share:g} of the {len(rows)} training images of class "
                f"{labels[rows[0]]} leaves none to train on",
                key="dataset.holdout",
            )
        held[chosen] = True
    return held


def sampled(digests: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """The rows of at most `count` images, ascending: those with the smallest digests.

    The choice depends on the images alone, not on their order or on a seed.

    Args:
        digests: uint8 [N, 32] of all images.
        rows: from which to choose.
    """
    first = np.ascontiguousarray(digests[rows, :8]).view(">u8").reshape(-1)
    return np.sort(rows[np.argsort(first, kind="stable")[:count]])
