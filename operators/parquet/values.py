"""Values of label and domain columns, of whatever type a program wrote them with.

Integers are class numbers; so are whole floating-point numbers and decimals, which integers become
where a program knew missing values, and booleans (false is 0, true is 1). Strings are names; so are
bytes of UTF-8. Everything else is refused by its value.

Shapes: N rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from graftwork.operators.errors import BadDataError
from graftwork.operators.names import normal

# Functions that pyarrow makes while it is imported, unseen by type checkers.
pc: Any = pyarrow.compute
KINDS = "integers, whole numbers, booleans or strings"


@dataclass(frozen=True, kw_only=True)
class Column:
    """Values of a column of labels or domains.

    Args:
        values: int64 [N]: the values themselves, or positions in `names`.
        names: the strings that occur, in NFC and sorted, for a column of strings; None for one of
            integers.
        null: bool [N], where the column has no value (`values` is then 0).
        claimed: names that the file's metadata gives to the integers 0, 1, 2, ...; empty if none.
    """

    values: np.ndarray
    names: tuple[str, ...] | None
    null: np.ndarray
    claimed: tuple[str, ...] = ()


def empty() -> Column:
    """A column without rows, which goes with integers and with strings."""
    return Column(values=np.zeros(0, dtype=np.int64), names=None, null=np.zeros(0, dtype=np.bool_))


def usable(kind: pa.DataType) -> bool:
    """Tells whether a column of this type may hold labels; its values may still be none."""
    kind = _inner(kind)
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    return whole or _is_real(kind) or _is_text(kind) or _is_bytes(kind)


def column(chunks: pa.ChunkedArray, name: str, claimed: tuple[str, ...] = ()) -> Column:
    """The values of a column.

    Args:
        chunks: of a type that is `usable`.
        name: of the column, for messages.
        claimed: as in `Column`.

    Raises:
        BadDataError: names the first value that is no label, and its row.
    """
    array: Any = chunks.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], chunks.type)
    kind = _inner(array.type)
    if _is_text(kind) or _is_bytes(kind):
        return _strings(array, name)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    null = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_null(kind):
        return Column(values=np.zeros(len(array), np.int64), names=None, null=null)
    if pa.types.is_decimal(kind):
        whole = pc.equal(array, pc.round(array))
        _refuse(~whole.fill_null(True).to_numpy(zero_copy_only=False), array, name)
        array = pc.floor(array).cast(pa.float64())  # exact up to 2**53, more classes than there are
        kind = array.type
    if _is_real(kind):
        return _reals(array, name, null, claimed)
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    values = array.fill_null(0).to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64:  # beyond int64 it stays too large to be a class
        values = np.minimum(values, np.uint64(np.iinfo(np.int64).max))
    return Column(values=values.astype(np.int64), names=None, null=null, claimed=claimed)


def _reals(array: Any, name: str, null: np.ndarray, claimed: tuple[str, ...]) -> Column:
    """Whole numbers of a floating-point column; NaN is a missing value."""
    values = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    null = null | np.isnan(values)
    values = np.where(null, 0, values)
    _refuse(~(np.abs(values) < 2**53) | (np.trunc(values) != values), array, name)
    return Column(values=values.astype(np.int64), names=None, null=null, claimed=claimed)


def _strings(array: Any, name: str) -> Column:
    null = array.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_dictionary(array.type):
        array = array.cast(pa.large_string()) if _is_view(array.type) else array
        array = array.dictionary_encode()
    codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    entries = array.dictionary.to_pylist()
    if None in entries:  # a dictionary may say here that a value is missing
        null = null | np.array([entry is None for entry in entries])[codes]
    # A dictionary may hold strings that no row uses: those are no classes.
    used = np.unique(codes[~null])
    texts = {int(code): _text(entries[code]) for code in used}
    wrong = [code for code, text in texts.items() if text is None or not text.strip()]
    _refuse(np.isin(codes, wrong) & ~null, array, name)
    names = tuple(sorted({text for text in texts.values() if text is not None}))
    place = {text: number for number, text in enumerate(names)}
    table = np.zeros(len(entries) or 1, dtype=np.int64)
    for code, text in texts.items():
        table[code] = place[text or ""]
    return Column(values=np.where(null, 0, table[codes]), names=names, null=null)


def _text(entry: str | bytes) -> str | None:
    """A name in NFC; None for bytes that are no text."""
    try:
        return normal(entry.decode() if isinstance(entry, bytes) else entry)
    except UnicodeDecodeError:
        return None


def _refuse(wrong: np.ndarray, array: Any, name: str) -> None:
    """Refuses the first value that is wrong."""
    if not wrong.any():
        return
    row = int(np.flatnonzero(wrong)[0])
    value, count = array[row].as_py(), int(wrong.sum())
    shown = f"{value!r:.60}" if isinstance(value, (str, bytes)) else str(value)
    more = f" (in all {count} rows)" if count > 1 else ""
    raise BadDataError(f'column "{name}" has {shown}, which is no label{more}', value=f"row {row}")


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_real(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_view(kind)


def _is_view(kind: pa.DataType) -> bool:
    return pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
