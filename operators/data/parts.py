"""Parts of a data set's images, each read and examined by itself: here, or by workers of a cluster.

What is found out about a part is remembered under the part's own identity: its files as they were
found, its rows, and how images are examined. A second look, one after an interruption, and one at
a data set that has grown read only what is new. Where a part ends depends on its own file (or, in
a folder, on its last image) alone, so that what is appended moves no part before it.

Shapes: n images of a part.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from graftwork.operators import live
from graftwork.operators.data import sources
from graftwork.operators.data.sources import MARK, Source
from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.store.memo import Memo

ROWS = 16_384
"""Rows of a Parquet file that make a part, in whole row groups: one at least."""
FILES = 4096
"""Files of a folder in a part, on average."""
BYTES = 256 << 20
"""Bytes of images that make a part before there are so many; of files, on average."""
_CHUNK = 64
_FORMAT = pa.schema([("digests", pa.uint8())])

Findings = tuple[np.ndarray, dict[int, str]]
"""Digests uint8 [n, 32], and position -> reason of the images that cannot be used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Images that are examined together.

    Args:
        hints: places, as `sources.read` takes them.
        images: how many.
        size: bytes of the images, as far as that is known without reading them.
        marks: of the files when they were found, as `sources.marks` gives them.
        identity: what the findings are remembered under.
        max_pixels: largest width times height; None for the program's own limit.
        decode: whether every pixel is decoded, or only the header read.
    """

    hints: Mapping[str, Any]
    images: int
    size: int
    marks: bytes
    identity: Mapping[str, Any]
    max_pixels: int | None
    decode: bool

    @property
    def unchanged(self) -> bool:
        """Tells whether the files are, on this machine and now, those that were found."""
        return sources.marks(self.hints) == self.marks


class Examined(NamedTuple):
    """Findings about a part, and how many of its files could not be read."""

    findings: bytes
    unread: int


Examine = Callable[[Sequence[Part], Memo, int], Iterable[tuple[int, bytes | BadDataError]]]
"""Examines parts somewhere, in any order, with so many threads if it is here, and remembers what it
finds. Yields places in the parts, each with the findings of `examine` or what it raised: of a part
that cannot be read the error is among the results, so that all others are known."""


def here(
    parts: Sequence[Part], memo: Memo, threads: int
) -> Iterator[tuple[int, bytes | BadDataError]]:
    """Examines parts in this process, one after the other, each with all threads."""
    total, before = sum(part.images for part in parts), 0
    for number, part in enumerate(parts):
        try:
            found = examine(part, memo, threads, lambda n, b=before: tell(b + n, total))
            yield number, found.findings
        except BadDataError as error:
            yield number, error
        before += part.images


def tell(examined: int, images: int) -> None:
    """Tells who listens how far the examination is."""
    live.say(examined=examined, images=images)


def examine(
    part: Part, memo: Memo, threads: int = 1, on_images: Callable[[int], None] = lambda count: None
) -> Examined:
    """Reads, hashes and checks the images of a part, and remembers what it found.

    Args:
        threads: that hash and check.
        on_images: called with the number of images that are done.

    Returns:
        The findings, for `decoded`. Where files could not be read they are not remembered: that may
        be the fault of this machine, or pass.

    Raises:
        BadDataError: a file changed while it was read, or cannot be read at all.
    """
    try:
        digests, bad, unread = _look(part, threads, on_images)
    except BadDataError as error:
        if not _still(part):
            raise BadDataError(changed(part.hints["files"][0])) from error
        raise
    if not _still(part):
        raise BadDataError(changed(part.hints["files"][0]))
    findings = encoded(digests, bad)
    if not unread:
        memo.put(part.identity, findings)
    return Examined(findings, unread)


def _still(part: Part) -> bool:
    """Tells whether a Parquet file is what it was; who listed a folder compares it as a whole."""
    return part.hints["kind"] != "parquet" or part.unchanged


def changed(place: str) -> str:
    """Complaint about a file or a folder that is no longer what was found."""
    return f"{place} changed while it was read; run again"


def cuts(source: Source, groups: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Beginnings of the parts of a source, and the end of the last one.

    Args:
        groups: of a Parquet file, as `tables.read_columns` gives them.
        rows: int64 [n], ascending: rows of the file, or numbers of the folder's files.

    Returns:
        int64, ascending, from 0 to n: positions in `rows`.
    """
    if source.kind == "files":
        inner = _after_files(source, rows)
    elif groups is None:
        inner = np.zeros(0, dtype=np.int64)
    else:
        inner = _after_groups(groups, rows)
    return np.unique(np.concatenate([[0], inner, [len(rows)]])).astype(np.int64)


def sizes(source: Source, groups: np.ndarray | None, rows: np.ndarray, at: np.ndarray) -> list[int]:
    """Bytes of the images of each part, from footers and listings; 0 where these say nothing.

    Args:
        at: what `cuts` returned; the rest as there.
    """
    if source.kind == "files":
        total = np.concatenate([[0], np.cumsum(source.sizes[rows])])
    elif groups is None:
        return [0] * (len(at) - 1)
    else:
        ends = np.cumsum(groups[:, 0])
        each = groups[:, 1] / np.maximum(groups[:, 0], 1)
        total = np.concatenate([[0], np.cumsum(each[np.searchsorted(ends, rows, side="right")])])
    return np.diff(total[at]).astype(np.int64).tolist()


def _after_groups(groups: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` behind runs of row groups that are large enough together."""
    bounds = np.searchsorted(rows, np.cumsum(groups[:, 0]))
    ends, images, size = [], 0, 0
    own = np.diff(bounds, prepend=0).tolist()
    for end, count, held in zip(bounds.tolist(), own, groups[:, 1].tolist(), strict=True):
        images, size = images + count, size + (held if count else 0)
        if images >= ROWS or size >= BYTES:
            ends.append(end)
            images = size = 0
    return np.array(ends, dtype=np.int64)


def _after_files(source: Source, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` behind the files whose own mark says so: the more so, the larger."""
    marks = np.frombuffer(source.marks, np.uint8).reshape(-1, MARK)[rows]
    drawn = np.ascontiguousarray(marks[:, :4]).view("<u4").reshape(-1) / 2**32
    return np.flatnonzero(drawn < np.maximum(1 / FILES, source.sizes[rows] / BYTES)) + 1


def _look(
    part: Part, threads: int, on_images: Callable[[int], None]
) -> tuple[np.ndarray, dict[int, str], int]:
    """Findings, and how many files could not be read."""
    found, bad, unread = list[bytes](), dict[int, str](), 0
    look = partial(_look_at, max_pixels=part.max_pixels, decode=part.decode)
    chunks = batched(sources.read_or_reason(part.hints), _CHUNK)
    seen = prefetch(look, chunks, workers=threads)
    for number, (digests, reasons, missing) in enumerate(seen):
        found.append(digests)
        bad |= {number * _CHUNK + position: why for position, why in reasons.items()}
        unread += missing
        on_images(min((number + 1) * _CHUNK, part.images))
    return np.frombuffer(b"".join(found), np.uint8).reshape(part.images, 32), bad, unread


def _look_at(
    chunk: Sequence[bytes | str | None], max_pixels: int | None, decode: bool
) -> tuple[bytes, dict[int, str], int]:
    digests, bad = [], {}
    for position, data in enumerate(chunk):
        digests.append(codec.digest(data if isinstance(data, bytes) else b""))
        try:
            if isinstance(data, str):
                raise BadDataError(data)
            (codec.rgb if decode else codec.check)(data, max_pixels)
        except BadDataError as error:
            bad[position] = str(error)
    return b"".join(digests), bad, sum(isinstance(data, str) for data in chunk)


def encoded(digests: np.ndarray, bad: Mapping[int, str]) -> bytes:
    """Findings as bytes."""
    schema = _FORMAT.with_metadata({"bad": json.dumps(sorted(bad.items()))})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([pa.array(digests.reshape(-1))], schema=schema))
    return sink.getvalue()


def decoded(data: bytes | None, images: int) -> Findings | None:
    """The inverse of `encoded`; None without bytes, or if they are of another format."""
    if data is None:
        return None
    with pa.ipc.open_file(pa.py_buffer(data)) as reader:
        if reader.schema != _FORMAT:
            return None
        flat = reader.read_all()["digests"].to_numpy()
        bad = json.loads((reader.schema.metadata or {})[b"bad"])
    return flat.reshape(images, 32), dict(bad)
