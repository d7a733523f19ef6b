"""Parquet files with encoded images: labels at once, images as a stream.

A file's schema comes from its footer and is checked before any data is read; extension types are
refused, because reading one can run code that another library registered for it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graftwork.operators.errors import BadDataError, together
from graftwork.operators.files import access


@dataclass(frozen=True, kw_only=True)
class Column:
    """Values of a column of labels or domains.

    Args:
        values: int64 [N]: the values themselves, or positions in `names`.
        names: the strings that occur, for a column of strings; None for one of integers.
        null: bool [N], where the column has no value (`values` is then 0).
    """

    values: np.ndarray
    names: tuple[str, ...] | None
    null: np.ndarray


def read_columns(
    url: str, image: str, columns: Mapping[str, str]
) -> tuple[np.ndarray, list[Column]]:
    """Reads small columns, and checks that there is a column with images.

    Args:
        url: a Parquet file.
        image: name of the image column.
        columns: names of columns of integers or strings, by their key under `dataset` in a spec.

    Returns:
        Rows, and bytes of images, of every row group, int64 [groups, 2]; and the columns.

    Raises:
        BadDataError: not a Parquet file, or all columns that are missing or have another type.
    """
    problems: list[BadDataError] = []

    def wrong(key: str, what: str) -> None:
        problems.append(BadDataError(what, key=f"dataset.{key}", value=url))

    with _opened(url) as file:
        schema = file.schema_arrow
        for key, name in {"image": image, **columns}.items():
            if name not in schema.names:
                wrong(key, f'no column "{name}"; there are: {_names(name, schema)}')
            elif key == "image" and _leaf(schema, image) is None:
                kind = schema.field(image).type
                wrong(
                    key, f'column "{name}" is {kind}; images are binary, or struct {{bytes, path}}'
                )
            elif key != "image" and not _countable(schema.field(name).type):
                kind = schema.field(name).type
                wrong(key, f'column "{name}" is {kind}; integers or strings are needed')
        if problems:
            raise together(problems)
        names = list(columns.values())
        table = file.read(columns=names)
        groups = _groups(file, image)
    return groups, [_column(table[name]) for name in names]


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
    if image not in schema.names:
        return None
    kind = schema.field(image).type
    if _binary(kind):
        return image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes" if _binary(kind.field("bytes").type) else None
    return None


def _binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _countable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _column(chunks: pa.ChunkedArray) -> Column:
    kind = chunks.type
    array: Any = chunks.combine_chunks()
    null = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_integer(kind):
        values = array.fill_null(0).to_numpy(zero_copy_only=False)
        if values.dtype == np.uint64:  # beyond int64 it stays too large to be a class
            values = np.minimum(values, np.uint64(np.iinfo(np.int64).max))
        return Column(values=values.astype(np.int64), names=None, null=null)
    if not pa.types.is_dictionary(kind):
        array = array.dictionary_encode()
    codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    # A dictionary may hold strings that no row uses: those are no classes.
    used = np.unique(codes[~null])
    names = tuple(map(str, array.dictionary.take(pa.array(used)).to_pylist()))
    values = np.where(null, 0, np.searchsorted(used, codes))
    return Column(values=values, names=names, null=null)
