"""Files that say which images each task of a stream has: the same split on any machine.

A row for every image of a task, in the order in which they arrive: `task` (name), `split` ("train"
or "test"), `image` (sha256 of the encoded image, 64 hex digits), `place` (end of its path), `class`
and `domain`. Of a file that was written elsewhere `task`, `split` and one of `image` and `place`
are enough; the other columns are compared where they are there.
"""

import io
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.errors import BadDataError
from graftwork.operators.files import access
from graftwork.operators.names import normal
from graftwork.operators.streams.stream import Piece, first_seen

REQUIRED, IDENTITIES, COMPARED = ("task", "split"), ("image", "place"), ("class", "domain")
COLUMNS = (*REQUIRED, *IDENTITIES, *COMPARED, "order")
# Functions that pyarrow makes while it is imported, unseen by type checkers.
pc: Any = pyarrow.compute
_KEY = "scenario.manifest"


def write(pieces: Iterable[Piece], order: str, parquet: bool) -> bytes:
    """The file of a stream's tasks.

    Args:
        pieces: the tasks.
        order: name of their order, for people.
        parquet: Parquet, or comma-separated values.
    """
    parts = [
        _rows(piece, split, rows, order)
        for piece in pieces
        for split, rows in (
            (piece.train, piece.rows if piece.arrival is None else piece.arrival),
            (piece.test, piece.tested),
        )
    ]
    table, sink = pa.concat_tables(parts), io.BytesIO()
    if parquet:
        pq.write_table(table, sink, compression="zstd")
    else:
        pcsv.write_csv(table, sink)
    return sink.getvalue()


def _rows(piece: Piece, split: Split, rows: np.ndarray, order: str) -> pa.Table:
    where = split.where.at(rows)
    hexes = split.digests[rows].tobytes().hex()
    values = {
        "task": [piece.name] * len(rows),
        "split": [split.name] * len(rows),
        "image": [hexes[start : start + 64] for start in range(0, len(hexes), 64)],
        "place": [_end(where.name(number)) for number in range(len(rows))],
        "class": [piece.classes[label] for label in split.labels[rows].tolist()],
        "domain": [piece.domains[domain] for domain in split.domains[rows].tolist()],
        "order": [order] * len(rows),
    }
    return pa.table({name: pa.array(values[name], pa.string()) for name in COLUMNS})


def _end(place: str) -> str:
    """The last two names of a path, by which a machine with other folders finds it."""
    return "/".join(place.rsplit("/", 2)[-2:])


def pieces(url: str, dataset: Dataset) -> list[Piece]:
    """The tasks of a file, in the order of their first rows.

    Raises:
        BadDataError: the file is none; images that the data set lacks, or has as another class.
    """
    table = _read(url)
    called = table["task"].to_pylist()
    names = list(dict.fromkeys(called))
    place = {name: number for number, name in enumerate(names)}
    numbers = np.array([place[name] for name in called], dtype=np.int64)
    splits = np.array(table["split"].to_pylist())
    if strange := sorted(set(splits.tolist()) - {"train", "test"}):
        raise BadDataError(f'column split: must be train or test, got "{strange[0]}"', key=_KEY)
    found = {
        split.name: _found(table, numbers, splits == split.name, split, names)
        for split in (dataset.train, dataset.test)
    }
    tested = np.concatenate(list(found["test"].values())) if names else np.zeros(0)
    if len(np.unique(tested)) < len(tested):
        raise BadDataError("lists a test image in two tasks; keep the first", key=_KEY)
    return [
        Piece(
            name=name,
            train=dataset.train,
            rows=np.unique(found["train"][number]),
            test=dataset.test,
            tested=np.sort(found["test"][number]),
            classes=dataset.classes,
            order=first_seen(dataset.train.labels[found["train"][number]]),
            domains=dataset.domains,
            arrival=found["train"][number],
        )
        for number, name in enumerate(names)
    ]


def _read(url: str) -> pa.Table:
    """The file's columns as text.

    Raises:
        BadDataError: it cannot be read, or lacks columns.
    """
    place = access.absolute(url)
    try:
        with access.open_file(place) as file:
            data = file.read()
        if data[:4] == b"PAR1":
            table = pq.read_table(io.BytesIO(data))
        else:
            kinds = pcsv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()))
            table = pcsv.read_csv(io.BytesIO(data), convert_options=kinds)
    except OSError as error:
        raise BadDataError(f"{place}: {access.reason(error)}", key=_KEY) from error
    except pa.ArrowException as error:
        # Its message may hold what is in the file.
        what = f"{place}: neither Parquet nor comma-separated values with a header"
        raise BadDataError(what, key=_KEY) from error
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing or not any(name in table.column_names for name in IDENTITIES):
        raise BadDataError(
            f"{place}: needs the columns task, split and image or place, has "
            f"{', '.join(table.column_names)}",
            key=_KEY,
        )
    kept = [name for name in COLUMNS if name in table.column_names]
    texts = table.select(kept).cast(pa.schema([(name, pa.string()) for name in kept]))
    # Names are kept in this form; paths are compared in it.
    return pa.table({name: _normal(texts[name]) for name in kept})


def _normal(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts in NFC; not by Arrow, whose NFC takes characters apart."""
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return texts
    whole = [text if text is None else normal(text) for text in texts.to_pylist()]
    return pa.chunked_array([whole], pa.string())


def _found(
    table: pa.Table, tasks: np.ndarray, chosen: np.ndarray, split: Split, names: Sequence[str]
) -> dict[int, np.ndarray]:
    """Rows of a split that a file names, task by task.

    Raises:
        BadDataError: it lacks some, or has them as another class or in another domain.
    """
    own, numbers = table.filter(pa.array(chosen)), tasks[chosen]
    identity = next(name for name in IDENTITIES if name in own.column_names)
    columns = [identity, *(name for name in COMPARED if name in own.column_names)]
    wanted: list[list[str | None]] = [own[name].to_pylist() for name in columns]
    depth = max((value.count("/") for value in wanted[0] if value), default=0)
    known = {
        "image": lambda: pa.array([digest.tobytes().hex() for digest in split.digests]),
        "place": lambda: _ends(split, depth),
        "class": lambda: pa.array([split.classes[label] for label in split.labels.tolist()]),
        "domain": lambda: pa.array([split.domain_names[d] for d in split.domains.tolist()]),
    }
    here = _keys([known[name]() for name in columns], np.zeros(len(split), dtype=np.int64))
    there = _keys([pa.array(values, pa.string()) for values in wanted], numbers)
    place: Any = pc.index_in(there, value_set=here)
    if place.null_count:
        first = pc.index(pc.is_null(place), True).as_py()
        said = ", ".join(f'{n} "{w[first]}"' for n, w in zip(columns, wanted, strict=True))
        raise BadDataError(
            f"the data set lacks {place.null_count} of {len(there)} {split.name} images; the first "
            f'one is of task "{names[int(numbers[first])]}": {said}',
            key=_KEY,
        )
    rows = place.to_numpy().astype(np.int64)
    return {number: rows[numbers == number] for number in range(len(names))}


def _ends(split: Split, depth: int) -> pa.Array:
    """The last names of every image's path, as many as a file gives."""
    ends = (
        normal("/".join(split.where.name(row).split(posixpath.sep)[-1 - depth :]))
        for row in range(len(split))
    )
    return pa.array(list(ends), pa.string())


def _keys(columns: Sequence[pa.Array], tasks: np.ndarray) -> pa.Array:
    """Text that names each row: its columns, and which of equal ones within a task it is."""
    text = pc.binary_join_element_wise(*[pc.fill_null(c, "") for c in columns], "\n")
    codes = text.dictionary_encode().indices.to_numpy().astype(np.int64)
    codes = codes * (int(tasks.max(initial=0)) + 1) + tasks
    order = np.argsort(codes, kind="stable")
    sorted_codes = codes[order]
    first = np.flatnonzero(np.r_[True, sorted_codes[1:] != sorted_codes[:-1]])
    sizes = np.diff(np.r_[first, len(codes)])
    number = np.empty(len(codes), dtype=np.int64)
    number[order] = np.arange(len(codes)) - np.repeat(first, sizes)
    return pc.binary_join_element_wise(text, pa.array(number).cast(pa.string()), "\n")
