"""Report about a data set: every image is decoded.

Shapes: N images of a split.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graftwork.operators.data import presence
from graftwork.operators.data.dataset import Dataset, Split
from graftwork.pipelines.describing.looking import (
    CHUNK,
    Found,
    Looks,
    left_out,
    look_at,
    unusable,
)
from graftwork.pipelines.describing.suspicions import warnings


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split.

    Args:
        images: number of images.
        bytes: of all encoded images.
        classes: images per class name, in class order.
        domains: images per domain name; empty without domains.
        sizes: images per (width, height), most frequent first.
        found: how images are stored, which files are left out, which images cannot be used; each
            with what is done about it.
    """

    images: int
    bytes: int
    classes: dict[str, int]
    domains: dict[str, int]
    sizes: list[tuple[int, int, int]]
    found: list[Found] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A data set as it was found.

    Args:
        train: the training images.
        test: the test images.
        warnings: what can be used and is probably not meant.
        problems: images that cannot be used: split, file, row (None for image files), reason.
        skipped: images that `on_bad_image: skip` had left out before.
        gone: of what is not looked at, the files that are not there any more.
    """

    train: SplitReport
    test: SplitReport
    warnings: list[str]
    problems: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    gone: list[str]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value."""
        return asdict(self)


def describe(
    dataset: Dataset,
    *,
    max_pixels: int | None = None,
    threads: int = 2,
    look: bool = True,
    skip: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decodes every image of a data set and looks for what is suspicious.

    Args:
        dataset: an index.
        max_pixels: largest width times height; None for that of the data set's description.
        threads: that decode.
        look: whether images are opened; without, only which files are gone is found out.
        skip: whether images that the index left out are to be left out, or are problems.
        on_progress: called with images done and images in all.

    Raises:
        BadDataError: a source is gone.
    """
    total, done = len(dataset.train) + len(dataset.test), 0
    looks = {"train": Looks(), "test": Looks()}
    problems = [] if skip else [dict(entry) for entry in dataset.bad_images]
    reports = {}
    for split in (dataset.train, dataset.test):
        seen = looks[split.name]
        limit = split.description.get("max_pixels") if max_pixels is None else max_pixels
        for position, image in enumerate(look_at(split, limit, threads) if look else ()):
            seen.take(image, split.where.name(position))
            done += 1
            if on_progress and (done % CHUNK == 0 or done == total):
                on_progress(done, total)
        problems += [
            {"split": split.name, **_place(split, position), "reason": why}
            for position, why in seen.problems
        ]
        reports[split.name] = _report(dataset, split, seen, problems, skip)
    return Report(
        **reports,
        warnings=warnings(dataset, looks),
        problems=problems,
        skipped=[dict(entry) for entry in dataset.bad_images] if skip else [],
        gone=[] if look else _gone(dataset),
    )


def _report(
    dataset: Dataset, split: Split, looks: Looks, problems: list[dict[str, Any]], skip: bool
) -> SplitReport:
    bad = [each for each in problems if each["split"] == split.name]
    skipped = [e for e in dataset.bad_images if skip and e.get("split") == split.name]
    return SplitReport(
        images=len(split),
        bytes=looks.bytes,
        classes=_counts(split.labels, dataset.classes),
        domains=_counts(split.domains, dataset.domains) if dataset.domains != ("",) else {},
        sizes=[(*size, count) for size, count in looks.sizes.most_common()],
        found=[
            *looks.listed(),
            *left_out(dataset.left_out.get(split.name, ())),
            *unusable(skipped, "skipped, as on_bad_image says"),
            *unusable(bad, "ends a run, unless on_bad_image: skip"),
        ],
    )


def _gone(dataset: Dataset) -> list[str]:
    """Files of a data set that are not there, sorted."""
    splits = (dataset.train, dataset.test)
    places = (split.places(0, len(split)) for split in splits)
    return sorted(presence.gone(file for hints in places for file in presence.files_of(hints)))


def _place(split: Split, position: int) -> dict[str, Any]:
    where = split.where
    row = None if where.kind == "files" else int(where.row[position])
    return {"file": where.files[where.file[position]], "row": row}


def _counts(numbers: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))
