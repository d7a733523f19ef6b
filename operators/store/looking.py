"""The files of a store for commands that only look: they need none that can be written.

What such a command finds out is kept in the memo, so that a run need not find it out again. Where
the store is not there, or refuses to be written, it is kept in memory instead, for the command.
"""

import errno
import os
from pathlib import Path
from typing import BinaryIO

from graftwork.operators.errors import StorageError
from graftwork.operators.store.blobs import Blobs


class Looking:
    """Files of a store, and those that could not be written to it.

    Args:
        blobs: the store's own.

    Raises:
        StorageError: a file stands where the store's folder belongs.
    """

    def __init__(self, blobs: Blobs) -> None:
        self.root = blobs.root
        self._blobs = blobs
        self._aside: dict[str, bytes] = {}
        place = blobs.path("")
        if place is not None and place.exists() and not place.is_dir():
            raise StorageError(f"store {self.root}: {os.strerror(errno.ENOTDIR)}")
        self._closed = place is not None and not place.is_dir()
        """Whether nothing is written to the store: there is none, or it refused."""

    def path(self, name: str) -> Path | None:
        return self._blobs.path(name)

    def put(self, name: str, data: bytes | bytearray) -> None:
        self.replace(name, bytes(data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.get(name) is not None:
            return False
        self.replace(name, data)
        return True

    def replace(self, name: str, data: bytes) -> None:
        if not self._closed:
            try:
                self._blobs.replace(name, data)
                return
            except StorageError:
                self._closed = True
        self._aside[name] = data

    def get(self, name: str) -> bytes | None:
        return self._aside[name] if name in self._aside else self._blobs.get(name)

    def open(self, name: str) -> BinaryIO | None:
        return self._blobs.open(name)

    def folders(self, name: str) -> list[str]:
        return self._blobs.folders(name)

    def files(self, name: str) -> dict[str, tuple[int, float]]:
        return self._blobs.files(name)

    def modified(self, name: str) -> float | None:
        return self._blobs.modified(name)

    def exists(self, names: list[str]) -> set[str]:
        return self._blobs.exists(names) | (self._aside.keys() & set(names))

    def remove(self, name: str) -> None:
        self._blobs.remove(name)

    def move(self, name: str, new_name: str) -> None:
        self._blobs.move(name, new_name)
