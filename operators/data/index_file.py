"""Storage of a split: Parquet with a strict schema.

Columns: `sample` int64 (position in the split), `digest` (sha256 of the encoded image), `label`
and `domain` int32.

Shapes: N samples.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIGEST = pa.binary(32)
_SAMPLES = pa.schema(
    [("sample", pa.int64()), ("digest", DIGEST), ("label", pa.int32()), ("domain", pa.int32())]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitIndex:
    """A stored split: digests uint8 [N, 32], labels int32 [N], domains int32 [N]."""

    digests: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """sha256 over digests, labels and domains in their order, 64 hex digits."""
        whole = hashlib.sha256(np.ascontiguousarray(self.digests).data)
        whole.update(np.ascontiguousarray(self.labels, dtype="<i4").data)
        whole.update(np.ascontiguousarray(self.domains, dtype="<i4").data)
        return whole.hexdigest()

    @classmethod
    def empty(cls) -> "SplitIndex":
        """A split without images."""
        none = np.zeros(0, dtype=np.int32)
        return cls(digests=np.zeros((0, 32), dtype=np.uint8), labels=none, domains=none)

    def at(self, rows: np.ndarray) -> "SplitIndex":
        """Some of the rows: positions, or a mask."""
        return SplitIndex(
            digests=self.digests[rows], labels=self.labels[rows], domains=self.domains[rows]
        )

    def sample_ids(self) -> np.ndarray:
        """int64 [N]: the first 8 bytes of the images' digests, independent of position."""
        first = np.ascontiguousarray(self.digests[:, :8])
        return first.view("<i8").reshape(-1).astype(np.int64)


def encode_index(index: SplitIndex) -> bytes:
    """A split as Parquet, every page with a checksum."""
    rows = np.arange(len(index.labels))
    columns = [rows, to_arrow(index.digests), index.labels, index.domains]
    buffer = io.BytesIO()
    pq.write_table(
        pa.table([pa.array(c) for c in columns], schema=_SAMPLES),
        buffer,
        use_dictionary=False,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def read_index(data: bytes) -> SplitIndex:
    """The inverse of `encode_index`.

    Raises:
        ValueError: other columns or types, a damaged page, or missing rows.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        # The schema is checked before any data is read: extension types could run code.
        if not file.schema_arrow.equals(_SAMPLES):
            raise ValueError(f"unexpected columns {file.schema_arrow.names}")
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a readable index: {error}") from error
    if not np.array_equal(table["sample"].to_numpy(), np.arange(table.num_rows)):
        raise ValueError("rows are missing or out of order")
    return SplitIndex(
        digests=to_numpy(table["digest"]),
        labels=table["label"].to_numpy(),
        domains=table["domain"].to_numpy(),
    )


def to_arrow(digests: np.ndarray) -> pa.Array:
    """Fixed-size binary array of uint8 [N, 32]."""
    data = pa.py_buffer(np.ascontiguousarray(digests))
    return pa.Array.from_buffers(DIGEST, len(digests), [None, data])


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 [N, 32] of a fixed-size binary column."""
    parts = [
        np.frombuffer(c.buffers()[1], np.uint8, 32 * len(c), 32 * c.offset).reshape(-1, 32)
        for c in column.chunks
        if len(c)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 32), np.uint8)


def numbers(column: pa.ChunkedArray, kind: type[np.integer[Any]]) -> np.ndarray:
    """A column of integers without nulls, without a copy if it is in one piece.

    pyarrow's own way imports pandas, which takes longer than planning over a million rows.
    """
    size = np.dtype(kind).itemsize
    parts = [
        np.frombuffer(c.buffers()[1], kind, len(c), size * c.offset)
        for c in column.chunks
        if len(c)
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, kind)
