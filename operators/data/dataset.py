"""The index of a data set: which images there are, in which order, with which labels.

Samples stand in source order: files in the order given (a glob's matches sorted), rows in their
order; of a folder the class folders sorted by name, then the files. Appended images therefore
leave all earlier ones where they are. An image is known by `codec.digest`, the sha256 of its
encoded bytes; no path takes part in any key.

Shapes: N samples of a split.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from graftwork.operators.data import holdout, labels, scan, sources
from graftwork.operators.data.description import SPLITS, locate, resolve
from graftwork.operators.data.digests import digest_of
from graftwork.operators.data.index_file import (
    DIGEST,
    SplitIndex,
    numbers,
    read_index,
    to_arrow,
    to_numpy,
)
from graftwork.operators.data.parts import Examine, here
from graftwork.operators.data.sources import Places
from graftwork.operators.errors import BadDataError, together
from graftwork.operators.files import kinds
from graftwork.operators.files.kinds import LeftOut
from graftwork.operators.keys import digest
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import DatasetParameters
from graftwork.operators.parameters.hints import SourceHints
from graftwork.operators.stage import Stage
from graftwork.operators.store.memo import Memo

__all__ = ["Dataset", "Split", "SplitIndex", "index", "read_index"]

VERSION = 3
"""Raised when the memo's content changes its meaning; the stage has a version of its own."""
ROWS = pa.schema(
    [
        ("digest", DIGEST),
        ("label", pa.int32()),
        ("domain", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
    ]
)
"""Columns of an index that is kept: first the training images, then the test images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The training or the test images.

    Args:
        name: "train" or "test".
        digests: uint8 [N, 32], sha256 of the encoded image.
        labels: int32 [N], class numbers.
        domains: int32 [N], domain numbers; 0 without a domain column.
        where: where each image is.
        classes: class names.
        domain_names: as `Dataset.domains`.
        description: what the data set was indexed from, with absolute places.
        record: name of the record that it was taken from without a look at its images; None for
            what was indexed.
    """

    name: str
    digests: np.ndarray
    labels: np.ndarray
    domains: np.ndarray
    where: Places
    classes: tuple[str, ...]
    domain_names: tuple[str, ...]
    description: Mapping[str, Any]
    record: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """sha256 over digests, labels and domains in their order, 64 hex digits."""
        return self.stored().digest

    def parameters(self) -> DatasetParameters:
        """Parameters that the stage's key holds."""
        return DatasetParameters(
            digest=self.digest, classes=len(self.classes), domains=tuple(self.domain_names)
        )

    def stage(self) -> Stage:
        """The stage that stores this split. Its key holds content only: no place, no class name."""
        return self._stage

    @cached_property
    def _stage(self) -> Stage:
        return Stage(
            operator="dataset",
            parameters=to_json(self.parameters()),
            hints=to_json(
                SourceHints(source=dict(self.description), split=self.name, record=self.record)
            ),
            label=f"dataset {self.name}",
        )

    def places(self, start: int, stop: int) -> dict[str, Any]:
        """Hints that `sources.read` needs for the images start..stop-1; a small JSON value."""
        return self.where.hints(start, stop)

    def stored(self) -> SplitIndex:
        """The part of the split that the stage stores."""
        return SplitIndex(digests=self.digests, labels=self.labels, domains=self.domains)

    def images_digest(self, start: int, stop: int) -> str:
        """The digest of the images start..stop-1 alone, without labels."""
        return digest_of(self.digests[start:stop])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """An indexed data set.

    Args:
        classes: class names; the numbers as text where the data has none.
        domains: domain names, sorted; ("",) without a domain column.
        bad_images: what was skipped: split, file, row (None for image files), reason.
        left_out: by split, what its folders hold and is not used; empty for what was recorded.
        notes: what contradicts itself, for people.
    """

    classes: tuple[str, ...]
    domains: tuple[str, ...]
    train: Split
    test: Split
    bad_images: tuple[dict[str, Any], ...]
    left_out: Mapping[str, tuple[LeftOut, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def index(
    description: Mapping[str, Any],
    memo: Memo,
    threads: int | None = None,
    examine: Examine = here,
) -> Dataset:
    """Finds, checks and numbers all images of a data set.

    Args:
        description: the `dataset` section of a spec: `builtin`, or `train` and `test` (lists of
            files, globs, folders, URLs), `image`, `label`, `domain`, `classes` (names, or a JSON
            file of them), `limit_per_class`, `on_bad_image` ("error" or "skip"), `max_pixels`,
            `part` (whether this is a part of a stream, so that classes may be missing),
            `holdout` (share of the training images that takes the place of the test images).
        memo: makes the next call fast while the sources are unchanged; alters no result.
        threads: that hash and check images, if it is done in this process; None for one per core.
        examine: where images are hashed and checked that the memo does not know.

    Raises:
        ConfigError: the description cannot be used.
        BadDataError: everything that is wrong with labels, else with images, one line each.
    """
    if share := description.get("holdout"):
        return _held_out(index({**description, "holdout": 0}, memo, threads, examine), share)
    description = resolve(description)
    found = {split: locate(description, split) for split in SPLITS}
    identities = {split: [s.identity for s in found[split]] for split in SPLITS}
    preimage = {
        "kind": "dataset",
        "version": VERSION,
        "description": description,
        "sources": digest(identities),
        "images": scan.examination(description["max_pixels"]),
    }
    data = memo.get(preimage)
    if data is not None and (known := _from_memo(data, description, found)) is not None:
        return known
    dataset = _build(description, found, memo, threads, examine)
    memo.put(preimage, _to_memo(dataset))
    return dataset


def _held_out(dataset: Dataset, share: float) -> Dataset:
    """The data set with a part of its training images in the place of the test images."""
    train = dataset.train

    def called(row: int) -> str:
        domain = dataset.domains[train.domains[row]]
        return labels.called(int(train.labels[row]), dataset.classes, domain)

    held = holdout.held_out(train.digests, train.labels, train.domains, share, called)

    def part(name: str, rows: np.ndarray) -> Split:
        return replace(
            train,
            name=name,
            digests=train.digests[rows],
            labels=train.labels[rows],
            domains=train.domains[rows],
            where=train.where.at(rows),
            description={**train.description, "holdout": share},
        )

    return replace(
        dataset,
        train=part("train", np.flatnonzero(~held)),
        test=part("test", np.flatnonzero(held)),
        left_out={"train": dataset.left_out.get("train", ())},
    )


def _build(
    description: Mapping[str, Any],
    found: Mapping[str, list[sources.Source]],
    memo: Memo,
    threads: int | None,
    examine: Examine,
) -> Dataset:
    tables, problems = scan.columns(description, found)
    if problems:
        raise together(problems)
    places = {split: table.places for split, table in tables.items()}
    by_label = {split: table.label for split, table in tables.items()}
    by_domain = {split: table.domain for split, table in tables.items()}
    classes, ids, problems = labels.class_ids(
        by_label, description["classes"], places, description["part"]
    )
    domains, domain_ids, more = labels.domain_ids(by_domain, places)
    if problems or more:
        raise together([BadDataError(what) for what in problems + more])
    limits = description["limit_per_class"]
    kept = {
        split: labels.first_of_each(ids[split], domain_ids[split], limits[split])
        for split in SPLITS
    }
    scans = scan.images(
        tables,
        kept,
        found,
        memo,
        max_pixels=description["max_pixels"],
        decode=description["on_bad_image"] == "skip",
        threads=threads or os.cpu_count() or 1,
        examine=examine,
    )
    bad = [{"split": split, **e} for split in SPLITS for e in scans[split].bad_images()]
    if bad and description["on_bad_image"] != "skip":
        raise together(scan.explain(bad))
    good = {split: scans[split].good() for split in SPLITS}
    rows = {split: kept[split][good[split]] for split in SPLITS}
    chosen = {split: ids[split][rows[split]] for split in SPLITS}
    if problems := labels.lost(ids, chosen, classes):
        more = scan.explain(bad) if bad else []
        raise together([*(BadDataError(what) for what in problems), *more])
    splits = {
        split: Split(
            name=split,
            digests=scans[split].digests[good[split]],
            labels=chosen[split],
            domains=domain_ids[split][rows[split]],
            where=places[split].at(rows[split]),
            classes=classes,
            domain_names=domains,
            description=description,
        )
        for split in SPLITS
    }
    return Dataset(
        classes=classes,
        domains=domains,
        bad_images=tuple(bad),
        left_out=_left_out(found),
        notes=scan.notes(tables, description["classes"]),
        **splits,
    )


def _left_out(found: Mapping[str, list[sources.Source]]) -> dict[str, tuple[LeftOut, ...]]:
    return {
        split: kinds.together(source.left_out for source in its) for split, its in found.items()
    }


def encode_rows(dataset: Dataset, facts: Mapping[str, Any]) -> bytes:
    """The images of both splits as an Arrow file with the columns `ROWS`.

    Args:
        facts: a JSON value that the file has as well, below `facts` in its metadata.
    """
    schema = ROWS.with_metadata({"facts": json.dumps(facts, sort_keys=True)})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        for split in (dataset.train, dataset.test):  # each by itself: both would be a copy
            where = split.where
            columns = (split.labels, split.domains, where.file, where.row)
            cells = [to_arrow(split.digests), *map(pa.array, columns)]
            writer.write_table(pa.table(cells, schema=schema))
    return sink.getvalue()


def split_of(
    rows: pa.Table,
    name: str,
    *,
    kind: str,
    image: str,
    files: tuple[str, ...],
    classes: tuple[str, ...],
    domains: tuple[str, ...],
    description: Mapping[str, Any],
    record: str | None = None,
) -> Split:
    """A split from its part of such a file; the rest as in `Split` and `Places`."""
    return Split(
        name=name,
        digests=to_numpy(rows["digest"]),
        labels=numbers(rows["label"], np.int32),
        domains=numbers(rows["domain"], np.int32),
        where=Places(
            kind=kind,
            image=image,
            files=files,
            file=numbers(rows["file"], np.int32),
            row=numbers(rows["row"], np.int64),
        ),
        classes=classes,
        domain_names=domains,
        description=description,
        record=record,
    )


def _to_memo(dataset: Dataset) -> bytes:
    facts = {
        "train": len(dataset.train),
        "classes": dataset.classes,
        "domains": dataset.domains,
        "bad_images": dataset.bad_images,
        "notes": dataset.notes,
    }
    return encode_rows(dataset, facts)


def _from_memo(
    data: bytes, description: Mapping[str, Any], found: Mapping[str, list[sources.Source]]
) -> Dataset | None:
    """The dataset that was put away, None if the bytes are of another format."""
    with pa.ipc.open_file(pa.py_buffer(data)) as reader:
        if not reader.schema.equals(ROWS):
            return None
        table = reader.read_all()
    facts = json.loads((reader.schema.metadata or {})[b"facts"])
    classes, domains = tuple(facts["classes"]), tuple(facts["domains"])
    splits = {
        split: split_of(
            table.slice(*((0, facts["train"]) if split == "train" else (facts["train"],))),
            split,
            kind=found[split][0].kind,
            image=description.get("image", ""),
            files=scan.file_names(found[split]),
            classes=classes,
            domains=domains,
            description=description,
        )
        for split in SPLITS
    }
    bad = tuple(facts["bad_images"])
    return Dataset(
        classes=classes,
        domains=domains,
        bad_images=bad,
        left_out=_left_out(found),
        notes=tuple(facts["notes"]),
        **splits,
    )
