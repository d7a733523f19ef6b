"""The k entries of largest magnitude, exactly k, also of vectors that no memory holds.

The bits of a magnitude, read as an integer, have the order of the numbers: counting how often each
value of 16 of them occurs finds the k-th largest in two passes (four in float64).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT = 16
_BITS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


@dataclass(frozen=True)
class Cut:
    """The part of a vector that stays.

    Args:
        threshold: larger magnitudes stay.
        equal: so many of those that equal it stay too, the first ones.
    """

    threshold: float
    equal: int


def kept_count(density: float, size: int) -> int:
    """k: the share of a vector's entries that stays, rounded down, but at least one of any."""
    # As in mergekit. The authors of TIES keep one more: all that are not below the k-th smallest.
    return min(size, max(1, int(density * size)))


def cut(parts: Callable[[], Iterator[Tensor]], count: int) -> Cut:
    """Cut of a vector at which `count` entries stay.

    Args:
        parts: the vector in pieces of any shape, float32 or float64; asked for several times.
        count: at most its length; 0 only of a vector that is empty.
    """
    if not count:
        return Cut(0.0, 0)
    prefix, left, shift, kind = 0, count, 0, torch.float32
    passes = 1
    while passes:
        bins = None
        for part in parts():
            if bins is None:
                kind = part.dtype
                shift = shift or _BITS[kind][1]
                bins = torch.zeros(2**DIGIT, dtype=torch.int64)
            bits = part.abs().view(_BITS[kind][0]).flatten()
            if shift < _BITS[kind][1]:
                bits = bits[(bits >> shift) == prefix]
            digits = (bits >> (shift - DIGIT)) & (2**DIGIT - 1)
            bins += torch.bincount(digits, minlength=2**DIGIT)
        assert bins is not None, "a vector without pieces"
        above = bins.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, left))  # of the k-th largest, from the top
        left -= int(above[place] - bins[2**DIGIT - 1 - place])
        prefix = (prefix << DIGIT) | (2**DIGIT - 1 - place)
        shift -= DIGIT
        passes = shift
    threshold = torch.tensor([prefix], dtype=_BITS[kind][0]).view(kind)
    return Cut(float(threshold), left)


def trimmed(vector: Tensor, at: Cut) -> Tensor:
    """The vector with zeros where nothing stays; NaN stays NaN."""
    magnitude = vector.abs()
    keep = ~(magnitude <= at.threshold)
    if at.equal and at.threshold:  # zeros that stay are zeros
        equal = (magnitude == at.threshold).flatten().nonzero().flatten()[: at.equal]
        keep.view(-1)[equal] = True
    return vector * keep


def equal_count(vector: Tensor, at: Cut) -> int:
    """Number of entries that equal the threshold."""
    return int((vector.abs() == at.threshold).sum())
