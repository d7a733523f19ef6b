"""Feature shards: Parquet with a strict schema, read back as one matrix.

Columns: `sample` int64, the row's position within its shard (a shard's bytes depend on its own
images alone, not on where it stands in a data set), and `feature`, a fixed-size list of float16
or float32. Labels come from the dataset stage.

Shapes: N rows, D width.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.operators.assignment import Assignment
from graftwork.operators.errors import DamagedStage
from graftwork.operators.store import Store

ARROW_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


def encode_shard(features: np.ndarray[Any, Any]) -> bytes:
    """Parquet bytes of features [N, D] float16 or float32, every page with a checksum."""
    count, width = features.shape
    flat = pa.array(np.ascontiguousarray(features).reshape(-1), ARROW_TYPES[str(features.dtype)])
    table = pa.table(
        {
            "sample": pa.array(np.arange(count, dtype=np.int64)),
            "feature": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    buffer = io.BytesIO()
    # Features do not compress, and dictionaries only cost time.
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, write_page_checksum=True
    )
    return buffer.getvalue()


def decode_shard(data: bytes) -> np.ndarray[Any, Any]:
    """Features [N, D] of `encode_shard`.

    Raises:
        ValueError: another schema, a damaged page, or missing rows.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        schema = file.schema_arrow
        # The schema is checked before any data is read: extension types could run code.
        if schema.names != ["sample", "feature"] or schema.field("sample").type != pa.int64():
            raise ValueError(f"unexpected columns {schema.names}")
        kind = schema.field("feature").type
        if not pa.types.is_fixed_size_list(kind) or kind.value_type not in ARROW_TYPES.values():
            raise ValueError(f"unexpected type {kind} of column feature")
        table = file.read().combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a readable feature shard: {error}") from error
    if not np.array_equal(table["sample"].to_numpy(), np.arange(table.num_rows)):
        raise ValueError("rows are missing or out of order")
    flat = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(table.num_rows, kind.list_size)


Shards = tuple[tuple[tuple[str, str], ...], ...]


def roles(work: Assignment) -> Shards:
    """The shards of features that are read: of the frozen backbone, an adapted one, or both."""
    given = (tuple(work.inputs(role)) for role in ("features", "adapted"))
    return tuple(shards for shards in given if shards)


# The shards of a training and a test set, frozen and adapted: a sweep reads them again and again.
@lru_cache(maxsize=512)
def shard(store: Store, operator: str, key: str) -> np.ndarray[Any, Any]:
    """Features [N, D] of a stored shard; kept for the process's next stage.

    Raises:
        DamagedStage: it is missing, truncated or altered.
    """
    try:
        return decode_shard(store.read(operator, key, "features.parquet"))
    except ValueError as error:
        raise DamagedStage(operator, key, f"features.parquet: {error}") from error


@lru_cache(maxsize=4096)
def images_of(store: Store, operator: str, key: str) -> str:
    """The digest of the images of a stored shard."""
    return store.manifest(operator, key)["preimage"]["parameters"]["images"]
