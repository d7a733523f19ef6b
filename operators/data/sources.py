"""Places of encoded images, and reading them in order.

A source is a Parquet file, a folder with one folder per class, or a built-in data set; files and
folders are local or behind an fsspec URL. Reading streams: one record batch is in memory.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.operators.data import builtin
from graftwork.operators.errors import BadDataError, ConfigError, MissingData
from graftwork.operators.files.access import (
    absolute,
    as_os_errors,
    file_system,
    identity,
    open_file,
    reason,
)
from graftwork.operators.files.kinds import LeftOut
from graftwork.operators.files.listing import MARK, list_folder, mark
from graftwork.operators.files.spelling import matches, spelled
from graftwork.operators.images.prefetch import prefetch
from graftwork.operators.keys import canonical

if TYPE_CHECKING:
    pass

SEVERAL = "several"
"""Kind of hints that consist of others, one after the other."""
_REQUESTS = 16
"""Concurrent reads of small remote files: they wait, they do not compute."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One entry of a data set's `train` or `test`, found.

    Args:
        kind: "parquet", "files" (a folder of class folders) or the name of a built-in data set.
        url: absolute local path, or URL.
        files: names of a folder's images relative to `url`, in order.
        marks: of a folder's images, `MARK` bytes each, that change when the image may have changed.
        sizes: of a folder's images in bytes, int64 [files].
        classes: names of a folder's classes as `Listing` has them.
        left_out: what else lies in a folder.
        identity: JSON value that changes when the content may have changed.
    """

    kind: str
    url: str
    files: tuple[str, ...] = ()
    marks: bytes = b""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    classes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    identity: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Places of the images of a split.

    Args:
        kind: that of the sources; a split has one kind.
        image: name of the image column in Parquet files.
        files: Parquet files or image files; the split's name for built-in data.
        file: int32 [N], which of `files`.
        row: int64 [N], row within the file.
    """

    kind: str
    image: str
    files: tuple[str, ...]
    file: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def at(self, rows: np.ndarray) -> "Places":
        """The places of some of the images."""
        return Places(
            kind=self.kind,
            image=self.image,
            files=self.files,
            file=self.file[rows],
            row=self.row[rows],
        )

    def name(self, position: int) -> str:
        """Name of the place for people: `FILE` or `FILE row 17` (rows count from 0)."""
        file = self.files[self.file[position]]
        return file if self.kind == "files" else f"{file} row {self.row[position]}"

    def hints(self, start: int, stop: int) -> dict[str, Any]:
        """Hints that `read` needs for the images start..stop-1, as a small JSON value."""
        file, row = self.file[start:stop], self.row[start:stop]
        if self.kind == "files":
            return {"kind": "files", "files": [self.files[f] for f in file]}
        used, number = np.unique(file, return_inverse=True)
        breaks = np.flatnonzero((np.diff(number) != 0) | (np.diff(row) != 1)) + 1
        first = np.concatenate([[0], breaks]).astype(np.int64) if len(row) else breaks
        last = np.concatenate([breaks, [len(row)]]).astype(np.int64) - 1
        runs = [
            [int(number[a]), int(row[a]), int(row[b]) + 1]
            for a, b in zip(first, last, strict=False)
        ]
        files = [self.files[f] for f in used]
        return {"kind": self.kind, "image": self.image, "files": files, "runs": runs}


def together(parts: Sequence[Places]) -> dict[str, Any]:
    """Hints that `read` needs for the images of several places, one after the other."""
    hints = [part.hints(0, len(part)) for part in parts]
    return hints[0] if len(hints) == 1 else {"kind": SEVERAL, "parts": hints}


def locate(entries: Iterable[str]) -> list[Source]:
    """Finds files, globs and folders, in the order given; a glob's matches are sorted.

    Raises:
        ConfigError: a URL that may not be used, or whose library is not installed.
        MissingData: nothing is there.
        BadDataError: what is there cannot be used.
    """
    return [source for entry in entries for source in _find(absolute(entry))]


def read(hints: Mapping[str, Any]) -> Iterator[bytes]:
    """The encoded images of `Places.hints`, in order.

    Raises:
        BadDataError: a file or row is gone or cannot be read.
    """
    for number, data in enumerate(read_or_reason(hints)):
        if isinstance(data, bytes):
            yield data
        else:
            raise BadDataError(f"{place_name(hints, number)}: {data or 'no image bytes'}")


def read_or_reason(hints: Mapping[str, Any]) -> Iterator[bytes | str | None]:
    """Reads as `read` does, but yields why an image cannot be read; None is an empty cell."""
    if hints["kind"] == SEVERAL:
        for part in hints["parts"]:
            yield from read_or_reason(part)
    elif hints["kind"] == "files":
        yield from _read_files(hints["files"])
    elif hints["kind"] in builtin.BUILTIN:
        data = builtin.load(hints["kind"])
        for file, start, stop in hints["runs"]:
            yield from data.images(hints["files"][file])[start:stop]
    else:
        from graftwork.operators.data import (
            tables,  # here, so that a folder of images needs no pyarrow
        )

        runs: dict[int, list[tuple[int, int]]] = {}
        previous = None
        for file, start, stop in [*hints["runs"], (None, 0, 0)]:
            if previous is not None and file != previous:
                url = hints["files"][previous]
                yield from tables.read_images(url, hints["image"], runs.pop(previous))
            if file is not None:
                runs.setdefault(file, []).append((start, stop))
            previous = file


def count(hints: Mapping[str, Any]) -> int:
    """Images that `read` yields."""
    if hints["kind"] == SEVERAL:
        return sum(map(count, hints["parts"]))
    if hints["kind"] == "files":
        return len(hints["files"])
    return sum(stop - start for _, start, stop in hints["runs"])


def pick(hints: Mapping[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    """The hints of some of the images, so that `read` opens nothing else.

    Args:
        chosen: ascending positions in what `read` yields.
    """
    if hints["kind"] == SEVERAL:
        ends = np.cumsum([count(part) for part in hints["parts"]])
        own = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        starts = ends - [count(part) for part in hints["parts"]]
        parts = zip(hints["parts"], own, starts, strict=True)
        return {**hints, "parts": [pick(part, rows - start) for part, rows, start in parts]}
    if hints["kind"] == "files":
        return {**hints, "files": [hints["files"][position] for position in chosen.tolist()]}
    runs = hints["runs"]
    lengths = [stop - start for _, start, stop in runs]
    parts = [np.arange(start, stop) for _, start, stop in runs] or [np.arange(0)]
    every = Places(
        kind=hints["kind"],
        image=hints["image"],
        files=tuple(hints["files"]),
        file=np.repeat(np.array([file for file, _, _ in runs], dtype=np.int64), lengths),
        row=np.concatenate(parts),
    )
    return every.at(chosen).hints(0, len(chosen))


def place_name(hints: Mapping[str, Any], position: int) -> str:
    """Name for people of the image that `read` yields at this position."""
    if hints["kind"] == SEVERAL:
        for part in hints["parts"]:
            if position < (size := count(part)):
                return place_name(part, position)
            position -= size
        raise IndexError(position)
    if hints["kind"] == "files":
        return hints["files"][position]
    for file, start, stop in hints["runs"]:
        if position < stop - start:
            return f"{hints['files'][file]} row {start + position}"
        position -= stop - start
    raise IndexError(position)


def _find(url: str) -> list[Source]:
    try:
        if "://" not in url:
            url = spelled(url)
            if os.path.isdir(url):
                return [_folder(url)]
            if not os.path.lexists(url) and any(c in url for c in "*?["):
                return _matches(url, matches(url))
            return [_table(url)]
        with as_os_errors():
            filesystem, path = file_system(url)
            filesystem.invalidate_cache()
            if any(c in path for c in "*?["):
                found = sorted(str(name) for name in filesystem.glob(path))
                return _matches(url, [filesystem.unstrip_protocol(name) for name in found])
            return [_folder(url) if filesystem.isdir(path) else _table(url)]
    except ConfigError as error:
        raise _unusable(error.__cause__)(error.what, value=error.value) from error
    except OSError as error:
        raise _unusable(error)(reason(error), value=url) from error


def _unusable(cause: BaseException | None) -> type[BadDataError]:
    """The error of a place that cannot be used."""
    return MissingData if isinstance(cause, FileNotFoundError) else BadDataError


def _matches(pattern: str, found: list[str]) -> list[Source]:
    if not found:
        raise MissingData("nothing matches", value=pattern)
    # In an object store each one is asked for by itself, and waited for.
    workers = _REQUESTS if "://" in pattern else 1
    return [source for those in prefetch(_find, found, workers=workers) for source in those]


def _table(url: str) -> Source:
    return Source(kind="parquet", url=url, identity=identity(url))


def _folder(url: str) -> Source:
    filesystem, path = file_system(url) if "://" in url else (None, url)
    found = list_folder(url, filesystem, path)
    marks = b"".join(each for _, each, _ in found.files)
    content = hashlib.sha256(canonical(found.classes).encode() + marks).hexdigest()
    return Source(
        kind="files",
        url=url,
        files=tuple(name for name, _, _ in found.files),
        marks=marks,
        sizes=np.array([size for _, _, size in found.files], dtype=np.int64),
        classes=found.classes,
        left_out=found.left_out,
        identity={"url": url, "files": len(found.files), "digest": content},
    )


def marked(identity: Mapping[str, Any]) -> bytes:
    """The mark of a single file, from its identity."""
    return hashlib.sha256(canonical(identity).encode()).digest()[:MARK]


def marks(hints: Mapping[str, Any]) -> bytes:
    """The marks of the files of `Places.hints` as they are now, on this machine.

    Without those of images in an object store, which is the same for every machine; empty if a
    file is not there.
    """
    try:
        if hints["kind"] == "files":
            return b"".join(mark(file) for file in hints["files"] if "://" not in file)
        if hints["kind"] == "parquet":
            return b"".join(marked(identity(url)) for url in hints["files"])
    except (OSError, ConfigError):
        return b""
    return b""


def _read_files(files: list[str]) -> Iterator[bytes | str]:
    if not any("://" in file for file in files):
        yield from map(_read_file, files)
        return
    yield from prefetch(_read_file, files, workers=_REQUESTS)


def _read_file(url: str) -> bytes | str:
    try:
        if "://" not in url:
            with open_file(url) as file:
                return file.read()
        with as_os_errors():
            filesystem, path = file_system(url)
            return filesystem.cat_file(path)
    except OSError as error:
        if os.path.islink(url) and isinstance(error, FileNotFoundError):
            return f"dangling symlink to {os.readlink(url)}"
        return reason(error)


def builtin_source(name: str, split: str) -> Source:
    """A built-in data set, as a source."""
    what = {"builtin": name, "version": builtin.load(name).VERSION, "split": split}
    return Source(kind=name, url=split, identity=what)
