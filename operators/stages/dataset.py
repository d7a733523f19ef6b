"""The operator `dataset`: stores the index of a split."""

from typing import Any

import numpy as np

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data.dataset import Dataset, Split, index
from graftwork.operators.data.index_file import (
    encode_index,
)
from graftwork.operators.data.records import Records
from graftwork.operators.errors import BadDataError
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import DatasetParameters
from graftwork.operators.parameters.hints import SourceHints


def run(work: Assignment, store: Any) -> Result:
    """The operator `dataset`: indexes a split anew, or takes it from its record, and stores it.

    Raises:
        BadDataError: the data is not what it was when the run was planned.
        StorageError: the record is damaged.
    """
    hints = from_json(SourceHints, work.hints)
    dataset = _dataset(hints, store)
    split: Split = getattr(dataset, hints.split)
    if split.parameters() != from_json(DatasetParameters, work.parameters):
        raise BadDataError(f"{work.label}: the data changed since the run was planned; run again")
    counts = np.bincount(split.labels, minlength=len(dataset.classes)).tolist()
    per_domain = np.bincount(split.domains, minlength=len(dataset.domains)).tolist()
    return Result(
        files={"index.parquet": encode_index(split.stored())},
        facts={
            "samples": len(split),
            "classes": dict(zip(dataset.classes, counts, strict=True)),
            "domains": dict(zip(dataset.domains, per_domain, strict=True)),
            "bad_images": len(dataset.bad_images),
        },
    )


def _dataset(hints: SourceHints, store: Any) -> Dataset:
    if hints.record is None:
        return index(hints.source, store.memo)
    found = Records(store.blobs).find(hints.record)
    if found is None:
        raise BadDataError(f"record {hints.record[:12]} went since the run was planned; run again")
    return found
