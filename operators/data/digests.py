"""Digests of encoded images, and the check that images are those that were indexed."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from graftwork.operators.errors import BadDataError


def digest_of(digests: "np.ndarray | Iterable[bytes]") -> str:
    """The digest of images in their order.

    Args:
        digests: uint8 [N, 32], or 32 bytes each: sha256 of the encoded images.

    Returns:
        sha256 over all of them, 64 hex digits.
    """
    whole = isinstance(digests, np.ndarray)
    joined = np.ascontiguousarray(digests).data if whole else b"".join(digests)
    return hashlib.sha256(joined).hexdigest()


def check_digests(expected: np.ndarray, found: np.ndarray, name: Callable[[int], str]) -> None:
    """Compares images with what was indexed.

    Args:
        expected: uint8 [N, 32] of the index.
        found: uint8 [N, 32] of what was read now.
        name: what to call the image at a position.

    Raises:
        BadDataError: names the first image that changed.
    """
    same = (expected == found).all(axis=1)
    if not same.all():
        first = name(int(np.flatnonzero(~same)[0]))
        raise BadDataError(f"image {first} changed since it was indexed; run again")
