"""The built-in data set: scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes.

Every fifth image (number 0, 5, 10, ... in scikit-learn's order) is a test image: 360 of 1,797.
An image is a greyscale PNG whose bytes do not depend on any library's compression, so that its
digest is the same everywhere.
"""

import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VERSION = 1
"""Raised when the bytes, the order or the split change."""


def labels(split: str) -> np.ndarray:
    """int64 [N] labels of the train or test images."""
    return _load(split)[1]


def images(split: str) -> tuple[bytes, ...]:
    """The encoded train or test images."""
    return _load(split)[0]


@lru_cache(maxsize=2)
def _load(split: str) -> tuple[tuple[bytes, ...], np.ndarray]:
    from sklearn.datasets import load_digits  # a second to import, and nothing else needs it

    data: Any = load_digits()
    chosen = (np.arange(len(data["target"])) % 5 == 0) == (split == "test")
    # Values are whole numbers 0..16.
    pixels = np.rint(data["images"][chosen] * (255 / 16)).astype(np.uint8)
    return tuple(encode(image) for image in pixels), data["target"][chosen].astype(np.int64)


def encode(pixels: np.ndarray) -> bytes:
    """PNG of greyscale pixels uint8 [height, width], stored without compression."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + _chunk(b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows)))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum
