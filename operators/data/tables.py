"""Parquet files with encoded images: labels at once, images as a stream.

A file's schema comes from its footer and is checked before any data is read; extension types are
refused, because reading one can run code that another library registered for it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graftwork.operators.errors import BadDataError, together
from graftwork.operators.files import access
from graftwork.operators.names import normal
from graftwork.operators.parquet import values
from graftwork.operators.parquet.names import claimed
from graftwork.operators.parquet.values import KINDS, Column


def read_columns(
    url: str, image: str, columns: Mapping[str, str]
) -> tuple[np.ndarray, list[Column]]:
    """Reads small columns, and checks that there is a column with images.

    Args:
        url: a Parquet file.
        image: name of the image column.
        columns: names of columns of labels, by their key under `dataset` in a spec.

    Returns:
        Rows, and bytes of images, of every row group, int64 [groups, 2]; and the columns.

    Raises:
        BadDataError: not a Parquet file; all columns that are missing, occur twice or have another
            type; or a value that is no label.
    """
    problems: list[BadDataError] = []

    def wrong(key: str, what: str) -> None:
        problems.append(BadDataError(what, key=f"dataset.{key}", value=url))

    with _opened(url) as file:
        schema = file.schema_arrow
        rows = file.metadata.num_rows
        for key, wanted in {"image": image, **columns}.items():
            name = spelled(schema, wanted)
            if (count := schema.names.count(name)) != 1:
                missing = f'no column "{name}"; there are: {_names(name, schema)}'
                twice = f'column "{name}" occurs {count} times; rename all but one'
                wrong(key, twice if count else missing)
                continue
            kind = schema.field(name).type
            if not rows:  # an empty file may have columns of any type
                continue
            if key == "image" and _leaf(schema, image) is None:
                wrong(
                    key, f'column "{name}" is {kind}; images are binary, or struct {{bytes, path}}'
                )
            elif key != "image" and name == spelled(schema, image):
                wrong(key, f'column "{name}" holds the images; name another')
            elif key != "image" and not values.usable(kind):
                wrong(key, f'column "{name}" is {kind}; {KINDS} are needed')
        if problems:
            raise together(problems)
        names = [spelled(schema, name) for name in columns.values()]
        if not rows:
            return np.zeros((0, 2), dtype=np.int64), [values.empty() for _ in names]
        table = file.read(columns=names)
        groups = _groups(file, image)
    found = []
    for key, name in zip(columns, names, strict=True):
        try:
            found.append(values.column(table[name], name, claimed(schema.metadata, name)))
        except BadDataError as error:
            where = f"{url} {error.value}"
            problems.append(BadDataError(error.what, key=f"dataset.{key}", value=where))
    if problems:
        raise together(problems)
    return groups, found


def spelled(schema: pa.Schema, name: str) -> str:
    """The name of a column as the file spells it, if only its Unicode form differs."""
    same = [own for own in schema.names if normal(own) == normal(name)]
    return name if name in schema.names or len(set(same)) != 1 else same[0]


def _groups(file: pq.ParquetFile, image: str) -> np.ndarray:
    metadata, leaf = file.metadata, _leaf(file.schema_arrow, image)
    paths = [file.schema.column(n).path for n in range(metadata.num_columns)]
    number = paths.index(leaf)
    found = map(metadata.row_group, range(metadata.num_row_groups))
    sizes = [(each.num_rows, each.column(number).total_compressed_size) for each in found]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _names(missing: str, schema: pa.Schema) -> str:
    """The columns that there are, those of a similar name first."""
    near = difflib.get_close_matches(missing, schema.names)
    shown = list(dict.fromkeys((*near, *schema.names)))
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def read_images(url: str, image: str, runs: Sequence[tuple[int, int]]) -> Iterator[bytes | None]:
    """The encoded images of some rows; None where a cell is empty.

    Args:
        url: a Parquet file.
        image: name of the image column.
        runs: ascending (first row, row after the last) pairs that do not overlap.

    Raises:
        BadDataError: the file cannot be read, or has fewer rows.
    """
    with _opened(url) as file:
        leaf = _leaf(file.schema_arrow, image)
        if leaf is None:
            raise BadDataError(f'{url}: no image column "{image}"')
        if runs and runs[-1][1] > file.metadata.num_rows:
            raise BadDataError(f"{url}: has {file.metadata.num_rows} rows, fewer than indexed")
        wanted = np.concatenate([np.arange(a, b) for a, b in runs] or [np.arange(0)])
        start = 0
        for group in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            rows = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
            if len(rows):
                yield from _group(file, group, leaf, rows - start)
            start = stop


def _group(file: Any, group: int, leaf: str, rows: np.ndarray) -> Iterator[bytes | None]:
    """The rows (ascending, within the group) of one row group."""
    start = 0
    for batch in file.iter_batches(
        access.ROWS_IN_MEMORY, row_groups=[group], columns=[leaf], use_threads=False
    ):
        stop = start + batch.num_rows
        chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        if len(chosen):
            cells = batch.column(0)
            if pa.types.is_struct(cells.type):
                cells = pc.struct_field(cells, "bytes")  # type: ignore[attr-defined]
            if len(chosen) != len(cells):
                cells = cells.take(pa.array(chosen))
            yield from cells.to_pylist()  # a column of bytes, by the schema checked above
        start = stop
        if start > rows[-1]:
            return


@contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    try:
        with access.open_file(url) as handle:
            # A buffered stream: a column of a row group may be larger than the memory.
            yield pq.ParquetFile(
                handle, buffer_size=4 << 20, pre_buffer=False, page_checksum_verification=True
            )
    except pa.ArrowException as error:
        what = " ".join(str(error).split())[:200]
        raise BadDataError(f"{url}: not a readable Parquet file: {what}") from error
    except OSError as error:
        raise BadDataError(f"{url}: {access.reason(error)}") from error


def _leaf(schema: pa.Schema, image: str) -> str | None:
    """The Parquet column with the bytes of the images; None if there is no such column."""
    image = spelled(schema, image)
    if schema.names.count(image) != 1:
        return None
    kind = schema.field(image).type
    if _binary(kind):
        return image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes" if _binary(kind.field("bytes").type) else None
    return None


def _binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
