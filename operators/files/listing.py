"""The images of a folder with one folder per class."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from graftwork.operators.errors import BadDataError, MissingData

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

MARK = 16
"""Bytes of a file's mark, which changes when the file's content changes."""

Found = tuple[str, bytes, int]
"""A file: its name relative to the folder, its mark, and its bytes."""


def mark(path: str) -> bytes:
    """The mark of a local file.

    Raises:
        OSError: nothing is there.
    """
    try:
        return _marked(path, os.stat(path))
    except OSError:  # a dangling link
        return _marked(path, os.lstat(path))


def _marked(path: str, stat: os.stat_result) -> bytes:
    return _mark(path, f"{stat.st_size},{stat.st_mtime_ns},{stat.st_ctime_ns},{stat.st_ino}")


def _mark(path: str, volatile: str) -> bytes:
    text = f"{path}\0{volatile}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=MARK).digest()


def list_folder(url: str, filesystem: Any, path: str) -> tuple[tuple[str, ...], list[Found]]:
    """Lists a folder; no file is opened.

    Hidden files and folders, and files that are no images by their name, are passed over. Images
    may lie deeper than the class folder.

    Args:
        url: the folder, for messages.
        filesystem: an fsspec file system, or None for the local one.
        path: the folder as the file system knows it.

    Returns:
        Class names, sorted, with those of empty folders; files by class, then by name.

    Raises:
        MissingData: no class folders.
        BadDataError: a symbolic link leads back into its own folder.
        OSError: the folder cannot be listed.
    """
    if filesystem is None:
        classes = sorted(_folders(path))
        entries = [
            item
            for name in classes
            for item in sorted(_walk(os.path.join(path, name), name, (os.path.realpath(path),)))
        ]
    else:
        classes, entries = _list_remote(filesystem, path)
    if not classes:
        raise MissingData(
            f"{url}: holds no class folders; give a folder with one folder per class, or Parquet "
            f"files as {url}/*.parquet"
        )
    return tuple(classes), entries


def images_below(filesystem: Any, path: str) -> list[str]:
    """Images below a folder at any depth, by their names relative to it, sorted.

    Hidden files and folders, and files that are no images by their name, are passed over.

    Args:
        filesystem: an fsspec file system, or None for the local one.
        path: the folder as the file system knows it.

    Raises:
        BadDataError: a symbolic link leads back into its own folder.
        OSError: the folder cannot be listed.
    """
    if filesystem is None:
        return sorted(name.removeprefix("./") for name, _, _ in _walk(path, ".", ()))
    start = len(path.rstrip("/")) + 1
    names = [full[start:] for full in filesystem.find(path)]
    return sorted(
        name
        for name in names
        if name.lower().endswith(EXTENSIONS) and not any(map(_hidden, name.split("/")))
    )


def _folders(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_symlink() and _loops(entry.path):
                raise BadDataError(f"symlink loop at {entry.path}")
            if entry.is_dir():
                yield entry.name


def _walk(folder: str, relative: str, above: tuple[str, ...]) -> Iterator[Found]:
    real = os.path.realpath(folder)
    if real in above:
        raise BadDataError(f"symlink loop at {folder}")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{relative}/{entry.name}"
            if _hidden(entry.name):
                continue
            if entry.is_symlink() and _loops(entry.path):
                raise BadDataError(f"symlink loop at {entry.path}")
            if entry.is_dir():
                yield from _walk(entry.path, name, (*above, real))
            elif entry.name.lower().endswith(EXTENSIONS):
                stat = _stat(entry)
                yield name, _marked(entry.path, stat), stat.st_size


def _loops(link: str) -> bool:
    """Tells whether a symbolic link leads only to links (the operating system gives up on it)."""
    try:
        os.stat(link)
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
    return False


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a dangling link: reading it will name it
        return entry.stat(follow_symlinks=False)


def _list_remote(filesystem: Any, path: str) -> tuple[list[str], list[Found]]:
    found = filesystem.find(path, detail=True, withdirs=True)
    start = len(path.rstrip("/")) + 1
    classes, entries = set(), list[Found]()
    for full, info in found.items():
        parts = full.rstrip("/")[start:].split("/")
        if any(map(_hidden, parts)) or not parts[0]:
            continue
        if info["type"] == "directory" or len(parts) > 1:
            classes.add(parts[0])
        if info["type"] != "directory" and len(parts) > 1 and full.lower().endswith(EXTENSIONS):
            volatile = str(sorted((k, str(v)) for k, v in info.items() if k != "name"))
            place = filesystem.unstrip_protocol(full)
            entries.append(("/".join(parts), _mark(place, volatile), info.get("size") or 0))
    return sorted(classes), sorted(entries, key=lambda e: (e[0].split("/")[0], e[0]))


def _hidden(name: str) -> bool:
    return name.startswith(".")
