"""Images that predictions are wanted for: files, folders, globs, Parquet files, URLs.

Nothing is opened here but the footers of Parquet files; what is found is cut into shards, which
any process can read on its own.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from graftwork.operators.data import sources
from graftwork.operators.errors import BadDataError
from graftwork.operators.files import access
from graftwork.operators.files.kinds import FORMATS, LeftOut, is_image, said, together
from graftwork.operators.files.listing import images_below
from graftwork.operators.files.spelling import matches, spelled

TABLES = (".parquet", ".pq")
SHARD = 64
"""Images of one shard: seconds of work, and few enough to keep several in memory."""

Place = tuple[str, int | None]
"""File and row (None for an image file) as the user named them."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some images, in order.

    Args:
        hints: for `sources.read_or_reason`; places are absolute.
        places: what people call each image.
        local: the places are of this machine's disks.
    """

    hints: dict[str, Any]
    places: tuple[Place, ...]
    local: bool

    def read(self) -> Iterator[bytes | str | None]:
        """The encoded images, or why one cannot be read; None is an empty cell of a table."""
        return sources.read_or_reason(self.hints)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A Parquet file with images."""

    shown: str
    url: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images that were found, in the order of the words.

    Args:
        entries: image files as (shown, absolute place), and tables.
        column: of the images in tables.
        left_out: what else lies in the folders.
    """

    entries: tuple[tuple[str, str] | Table, ...]
    column: str
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return sum(e.rows if isinstance(e, Table) else 1 for e in self.entries)

    def shards(self, size: int = SHARD) -> Iterator[Shard]:
        """All images in order, up to `size` of them at a time."""
        files: list[tuple[str, str]] = []
        for entry in self.entries:
            if isinstance(entry, Table):
                yield from _of_files(files)
                files = []
                for start in range(0, entry.rows, size):
                    stop = min(start + size, entry.rows)
                    hints = {
                        "kind": "parquet",
                        "image": self.column,
                        "files": [entry.url],
                        "runs": [[0, start, stop]],
                    }
                    places = tuple((entry.shown, row) for row in range(start, stop))
                    yield Shard(hints=hints, places=places, local="://" not in entry.url)
                continue
            # Local and remote files are read in different ways.
            if files and (len(files) == size or ("://" in files[0][1]) != ("://" in entry[1])):
                yield from _of_files(files)
                files = []
            files.append(entry)
        yield from _of_files(files)


def find(words: Iterable[str], column: str = "image") -> Inputs:
    """Finds images.

    Args:
        words: image files, Parquet files, folders (images at any depth), globs, or URLs of them.
            Of a glob's matches those count that are folders, or images or Parquet files by name.
        column: of the images in Parquet files: binary, or struct {bytes, path}.

    Raises:
        BadDataError: something is not there or holds no image.
        ConfigError: a URL that may not be used.
    """
    entries: list[tuple[str, str] | Table] = []
    left_out: list[tuple[LeftOut, ...]] = []
    for word in words:
        found = list(_find(word, column, left_out))
        if not found:
            raise BadDataError(
                f"{word}: no images found ({', '.join(FORMATS)}; of Parquet files name the files "
                f"or a glob){said(together(left_out))}"
            )
        entries += found
    return Inputs(entries=tuple(entries), column=column, left_out=together(left_out))


def name(place: Place) -> str:
    """`FILE` or `FILE row 17` (rows count from 0)."""
    file, row = place
    return file if row is None else f"{file} row {row}"


def _of_files(files: Sequence[tuple[str, str]]) -> Iterator[Shard]:
    if files:
        yield Shard(
            hints={"kind": "files", "files": [url for _, url in files]},
            places=tuple((shown, None) for shown, _ in files),
            local="://" not in files[0][1],
        )


def _find(
    word: str, column: str, left_out: list[tuple[LeftOut, ...]]
) -> Iterator[tuple[str, str] | Table]:
    url = access.absolute(word)
    try:
        if "://" not in url:
            if url != (there := spelled(url)):
                url = word = there
            if not os.path.lexists(url) and any(c in url for c in "*?["):
                shown = word.removeprefix("file://")
                for match in matches(shown):
                    yield from _entry(match, column, None, left_out, of_glob=True)
                return
            if not os.path.lexists(url):
                raise BadDataError(f"{word}: not found")
            yield from _entry(word.removeprefix("file://"), column, None, left_out)
            return
        with access.as_os_errors():
            filesystem, path = access.file_system(url)
            if any(c in path for c in "*?["):
                for match in sorted(map(str, filesystem.glob(path))):
                    full = filesystem.unstrip_protocol(match)
                    yield from _entry(full, column, filesystem, left_out, of_glob=True)
                return
            yield from _entry(word, column, filesystem, left_out)
    except OSError as error:
        raise BadDataError(f"{word}: {access.reason(error)}") from error


def _entry(
    shown: str,
    column: str,
    filesystem: Any,
    left_out: list[tuple[LeftOut, ...]],
    of_glob: bool = False,
) -> Iterator[tuple[str, str] | Table]:
    """One file, or the images below one folder."""
    url = access.absolute(shown)
    path = access.file_system(url)[1] if filesystem else url
    if filesystem.isdir(path) if filesystem else os.path.isdir(url):
        names, others = images_below(filesystem, path)
        left_out.append(others)
        for name in names:
            yield f"{shown.rstrip('/')}/{name}", f"{url.rstrip('/')}/{name}"
        return
    suffix = PurePosixPath(url).suffix.lower()
    if suffix in TABLES:
        from graftwork.operators.data import tables  # here, so that image files need no pyarrow

        try:
            groups, _ = tables.read_columns(url, column, {})
        except BadDataError as error:
            # A column that is not there, or holds no images; here it is no key of a spec.
            hint = "name another with --image-column" if error.key == "dataset.image" else ""
            raise BadDataError(error.what, value=error.value, advice=hint) from error
        yield Table(shown=shown, url=url, rows=int(groups[:, 0].sum()))
    elif is_image(url) or not of_glob:
        yield shown, url
