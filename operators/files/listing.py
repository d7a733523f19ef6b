"""The images of a folder with one folder per class."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftwork.operators.errors import BadDataError, MissingData
from graftwork.operators.files import kinds
from graftwork.operators.files.kinds import LeftOut, Tally
from graftwork.operators.names import normal

MARK = 16
"""Bytes of a file's mark, which changes when the file's content changes."""

Found = tuple[str, bytes, int]
"""A file: its name relative to the folder, its mark, and its bytes."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A folder with one folder per class.

    Args:
        classes: names in NFC, sorted, those of empty folders too. Folders whose names differ in
            their Unicode form alone are one class.
        files: the images, by class, then by name.
        left_out: what else lies there.
    """

    classes: tuple[str, ...]
    files: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]


def mark(path: str) -> bytes:
    """The mark of a local file.

    Raises:
        OSError: nothing is there.
    """
    try:
        return _marked(path, os.stat(path))
    except OSError:  # a dangling link
        return _marked(path, os.lstat(path))


def _marked(path: str, of: os.stat_result) -> bytes:
    return _mark(path, f"{of.st_size},{of.st_mtime_ns},{of.st_ctime_ns},{of.st_ino}")


def _mark(path: str, volatile: str) -> bytes:
    text = f"{path}\0{volatile}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=MARK).digest()


def list_folder(url: str, filesystem: Any, path: str) -> Listing:
    """Lists a folder; no file is opened. Images may lie deeper than the class folder.

    Args:
        url: the folder, for messages.
        filesystem: an fsspec file system, or None for the local one.
        path: the folder as the file system knows it.

    Raises:
        MissingData: no class folders.
        BadDataError: a symbolic link leads back into its own folder, or a class has no name.
        OSError: the folder cannot be listed.
    """
    tally = Tally()
    if filesystem is None:
        classes, found = set[str](), list[Found]()
        for name, is_folder in _top(path, tally):
            if is_folder:
                classes.add(normal(name))
                found += _walk(os.path.join(path, name), name, (os.path.realpath(path),), tally)
    else:
        classes, found = _list_remote(filesystem, path, tally)
    for name in classes:
        if not _is_text(name):
            raise BadDataError(f"{url}: class folder {os.fsencode(name)!r} is no UTF-8; rename it")
    if not classes:
        raise MissingData(
            f"{url}: holds no class folders; give a folder with one folder per class, or Parquet "
            f"files as {url}/*.parquet"
        )
    files = tuple(sorted(found, key=lambda file: _place(file[0])))
    return Listing(classes=tuple(sorted(classes)), files=files, left_out=tally.left_out())


def class_of(name: str) -> str:
    """The class of an image of a folder, from its name relative to the folder."""
    return normal(name.split("/", 1)[0])


def _place(name: str) -> tuple[str, str, str]:
    """Key to sort images by: their order does not depend on the Unicode form of their names."""
    return class_of(name), normal(name), name


def images_below(filesystem: Any, path: str) -> tuple[list[str], tuple[LeftOut, ...]]:
    """Images below a folder at any depth, by their names relative to it, sorted.

    Args:
        filesystem: an fsspec file system, or None for the local one.
        path: the folder as the file system knows it.

    Returns:
        The images, and what else lies there.

    Raises:
        BadDataError: a symbolic link leads back into its own folder.
        OSError: the folder cannot be listed.
    """
    tally = Tally()
    if filesystem is None:
        names = sorted(name for name, _, _ in _walk(path, "", (), tally))
        return names, tally.left_out()
    start = len(path.rstrip("/")) + 1
    names = [full[start:] for full in filesystem.find(path)]
    return sorted(name for name in names if _used(name, tally)), tally.left_out()


def _used(name: str, tally: Tally) -> bool:
    """Tells whether a remote file is an image; what is none is counted."""
    parts = name.split("/")
    system = next((n for n, part in enumerate(parts) if kinds.of_the_system(part)), None)
    if system is not None:
        tally.add(kinds.OF_THE_SYSTEM, "/".join(parts[: system + 1]))
    elif not kinds.is_image(name):
        tally.add(kinds.others(name), name)
    else:
        return True
    return False


def _top(path: str, tally: Tally) -> Iterator[tuple[str, bool]]:
    """Names in a folder, and whether they are folders; what cannot be a class is counted."""
    with os.scandir(path) as entries:
        for entry in entries:
            if kinds.of_the_system(entry.name):
                tally.add(kinds.OF_THE_SYSTEM, entry.name)
                continue
            if entry.is_symlink() and _loops(entry.path):
                raise BadDataError(f"symlink loop at {entry.path}")
            if not (is_folder := entry.is_dir()):
                image = kinds.is_image(entry.name)
                tally.add(kinds.OUTSIDE if image else kinds.others(entry.name), entry.name)
            yield entry.name, is_folder


def _walk(folder: str, relative: str, above: tuple[str, ...], tally: Tally) -> Iterator[Found]:
    real = os.path.realpath(folder)
    if real in above:
        raise BadDataError(f"symlink loop at {folder}")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if kinds.of_the_system(entry.name):
                tally.add(kinds.OF_THE_SYSTEM, name)
                continue
            if entry.is_symlink() and _loops(entry.path):
                raise BadDataError(f"symlink loop at {entry.path}")
            if entry.is_dir():
                yield from _walk(entry.path, name, (*above, real), tally)
            elif not kinds.is_image(entry.name):
                tally.add(kinds.others(entry.name), name)
            elif _is_file(found := _stat(entry)):
                yield name, _marked(entry.path, found), found.st_size
            else:
                tally.add(kinds.SPECIAL, name)


def _is_text(name: str) -> bool:
    """Tells names from bytes that are none, which Python keeps as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_file(found: os.stat_result) -> bool:
    """Tells files, and dangling links, from what would be waited for for ever: a pipe, say."""
    return stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)


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


def _list_remote(filesystem: Any, path: str, tally: Tally) -> tuple[set[str], list[Found]]:
    found = filesystem.find(path, detail=True, withdirs=True)
    start = len(path.rstrip("/")) + 1
    classes, entries, system = set[str](), list[Found](), set[str]()
    for full, info in found.items():
        parts = full.rstrip("/")[start:].split("/")
        if not parts[0]:
            continue
        hidden = next((n for n, part in enumerate(parts) if kinds.of_the_system(part)), None)
        if hidden is not None:
            system.add("/".join(parts[: hidden + 1]))
            continue
        is_folder = info["type"] == "directory"
        if is_folder or len(parts) > 1:
            classes.add(normal(parts[0]))
        name = "/".join(parts)
        if is_folder:
            continue
        if not kinds.is_image(name):
            tally.add(kinds.others(name), name)
        elif len(parts) == 1:
            tally.add(kinds.OUTSIDE, name)
        else:
            volatile = str(sorted((k, str(v)) for k, v in info.items() if k != "name"))
            place = filesystem.unstrip_protocol(full)
            entries.append((name, _mark(place, volatile), info.get("size") or 0))
    for name in system:
        tally.add(kinds.OF_THE_SYSTEM, name)
    return classes, entries
