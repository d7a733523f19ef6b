"""Description of a data set, and what is suspicious about it: every image is decoded.

Shapes: N images of a split, M images of both splits.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from graftwork.operators.data import presence, sources
from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec as images
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.store import Store
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.spec.loading import Loaded

_CHUNK = 32
_ALL_CLASSES = 16
"""Largest number of classes that are listed in full."""
_ENDS = 5


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split.

    Args:
        images: number of images.
        bytes: of all encoded images.
        classes: images per class name, in class order.
        domains: images per domain name; empty without domains.
        sizes: images per (width, height), most frequent first.
    """

    images: int
    bytes: int
    classes: dict[str, int]
    domains: dict[str, int]
    sizes: list[tuple[int, int, int]]


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
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decodes every image of a data set and looks for duplicates.

    Args:
        dataset: an index.
        max_pixels: largest width times height; None for that of the data set's description.
        threads: that decode.
        look: whether images are opened; without, only which files are gone is found out.
        on_progress: called with images done and images in all.

    Raises:
        BadDataError: a source is gone.
    """
    total, done = len(dataset.train) + len(dataset.test), 0
    reports, problems = {}, []
    for split in (dataset.train, dataset.test):
        limit = split.description.get("max_pixels") if max_pixels is None else max_pixels
        sizes, size_in_bytes = Counter[tuple[int, int]](), 0
        seen = _decoded(split, limit, threads) if look else iter(())
        for position, (size, count, why) in enumerate(seen):
            size_in_bytes += count
            if why:
                problems.append({"split": split.name, **_place(split, position), "reason": why})
            else:
                sizes[size] += 1
            done += 1
            if on_progress and (done % _CHUNK == 0 or done == total):
                on_progress(done, total)
        named = dataset.domains != ("",)
        reports[split.name] = SplitReport(
            images=len(split),
            bytes=size_in_bytes,
            classes=_counts(split.labels, dataset.classes),
            domains=_counts(split.domains, dataset.domains) if named else {},
            sizes=[(*size, count) for size, count in sizes.most_common()],
        )
    return Report(
        **reports,
        warnings=_warnings(dataset),
        problems=problems,
        skipped=[dict(entry) for entry in dataset.bad_images],
        gone=[] if look else _gone(dataset),
    )


def _gone(dataset: Dataset) -> list[str]:
    """Files of a data set that are not there, sorted."""
    splits = (dataset.train, dataset.test)
    places = (split.places(0, len(split)) for split in splits)
    return sorted(presence.gone(file for hints in places for file in presence.files_of(hints)))


def render(report: Report) -> RenderableType:
    """The report for a terminal of 80 columns or more."""
    overview = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "train", "test"):
        overview.add_column(heading, justify="left" if not heading else "right")
    both = (report.train, report.test)
    overview.add_row("images", *(f"{s.images:,}" for s in both))
    overview.add_row("classes", *(str(sum(n > 0 for n in s.classes.values())) for s in both))
    overview.add_row("images per class", *(_span(list(s.classes.values())) for s in both))
    if any(s.sizes for s in both):
        overview.add_row("bytes", *(_bytes(s.bytes) for s in both))
        overview.add_row("width x height", *(_typical(s.sizes) for s in both))
        overview.add_row("width", *(_span([w for w, _, _ in s.sizes]) for s in both))
        overview.add_row("height", *(_span([h for _, h, _ in s.sizes]) for s in both))
    parts: list[RenderableType] = [overview, Text(), _count_table("class", report, "classes")]
    if report.train.domains:
        parts += [Text(), _count_table("domain", report, "domains")]
    if report.skipped:
        parts.append(Text(f"\n{len(report.skipped)} unusable images are skipped", style="yellow"))
    if report.warnings:
        parts.append(Text(f"\n{_number(report.warnings, 'warning')}", style="bold yellow"))
        parts += [Text(f"  {warning}") for warning in report.warnings]
    if report.problems:
        count = _number(report.problems, "unreadable image")
        parts.append(Text(f"\n{count}", style="bold red"))
        parts += [Text(f"  {_called(p['file'], p['row'])}: {p['reason']}") for p in report.problems]
    elif report.gone:
        more = f" and {len(report.gone) - _ENDS} more" if len(report.gone) > _ENDS else ""
        parts.append(Text(f"\n{_number(report.gone, 'file')} gone"))
        parts.append(Text(f"  {', '.join(report.gone[:_ENDS])}{more}"))
    elif not report.warnings:
        parts.append(Text("\nno problems found", style="green"))
    return Group(*parts)


Seen = tuple[tuple[int, int], int, str]
"""Width and height, bytes, and why it cannot be used (empty if it can)."""


def _decoded(split: Split, max_pixels: int | None, threads: int) -> Iterator[Seen]:
    """Findings from decoding each image of a split, in order."""
    if not len(split):
        return
    encoded = zip(sources.read_or_reason(split.places(0, len(split))), split.digests, strict=True)
    look = partial(_decode_all, max_pixels=max_pixels)
    for seen in prefetch(look, batched(encoded, _CHUNK), workers=threads):
        yield from seen


def _decode_all(
    chunk: Sequence[tuple[bytes | str | None, np.ndarray]], max_pixels: int | None
) -> list[Seen]:
    seen: list[Seen] = []
    for data, digest in chunk:
        if isinstance(data, str):
            seen.append(((0, 0), 0, data))
            continue
        try:
            size, why = images.rgb(data, max_pixels).size, ""
            if hashlib.sha256(data or b"").digest() != digest.tobytes():
                why = "changed since it was indexed"
        except BadDataError as error:
            size, why = (0, 0), str(error)
        seen.append((size, len(data or b""), why))
    return seen


def _warnings(dataset: Dataset) -> list[str]:
    """Duplicates, leaks between the splits, and classes that cannot be trained or tested."""
    train, test = dataset.train, dataset.test
    digests = np.concatenate([train.digests, test.digests])
    labels = np.concatenate([train.labels, test.labels])
    keys = np.ascontiguousarray(digests).view("<u8")
    order = np.lexsort(keys.T)  # stable: equal images stay in the order of the data set
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    first, second = order[:-1][same], order[1:][same]
    number = len(train)
    pairs = np.stack([first, second], axis=1)
    # Of every row the first one with its image: a test image may be there several times.
    starts = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))
    origin = np.zeros(len(order), dtype=np.int64)
    origin[order] = order[starts]
    leaked = np.flatnonzero(origin[number:] < number) + number
    found = []
    for what, chosen in (
        ("images in train more than once", pairs[second < number]),
        ("images in test more than once", pairs[first >= number]),
        ("test images that are also in train", np.stack([leaked, origin[leaked]], axis=1)),
        ("images with two labels", pairs[labels[first] != labels[second]]),
    ):
        if len(chosen):
            names = [_sample(dataset, position) for position in min(chosen.tolist())]
            found.append(f"{what}: {len(chosen)}; first: {names[0]}, {names[1]}")
    trained, tested = (np.bincount(s.labels, minlength=len(dataset.classes)) for s in (train, test))
    for what, chosen in (
        ("without images", trained + tested == 0),
        ("without test images", (trained > 0) & (tested == 0)),
    ):
        if len(missing := np.flatnonzero(chosen)):
            names = ", ".join(dataset.classes[i] for i in missing[:_ENDS])
            dots = ", ..." if len(missing) > _ENDS else ""
            found.append(f"classes {what}: {len(missing)}; {names}{dots}")
    if len(dataset.classes) == 1:
        found.append("there is only one class")
    return found


def _sample(dataset: Dataset, position: int) -> str:
    """Place and class of an image, counted through train and test."""
    split = dataset.train
    if position >= len(split):
        split, position = dataset.test, position - len(split)
    return f"{split.where.name(position)} ({dataset.classes[split.labels[position]]})"


def _place(split: Split, position: int) -> dict[str, Any]:
    where = split.where
    row = None if where.kind == "files" else int(where.row[position])
    return {"file": where.files[where.file[position]], "row": row}


def _called(file: str, row: int | None) -> str:
    return file if row is None else f"{file} row {row}"


def _counts(numbers: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _count_table(what: str, report: Report, field: str) -> Table:
    """Images per class or domain; of many the largest and smallest in training."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(what, max_width=48, no_wrap=True, overflow="ellipsis")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    train: Mapping[str, int] = getattr(report.train, field)
    test: Mapping[str, int] = getattr(report.test, field)
    names = list(train)
    if len(names) > _ALL_CLASSES:
        names.sort(key=lambda name: -train[name])  # stable: class order among equals
        names = [*names[:_ENDS], "", *names[-_ENDS:]]
    for name in names:
        if name:
            table.add_row(Text(name), f"{train[name]:,}", f"{test[name]:,}")
        else:
            table.add_row(f"... {len(train) - 2 * _ENDS} more", "", "", style="dim")
    return table


def _number(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _span(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _typical(sizes: Sequence[tuple[int, int, int]]) -> str:
    if not sizes:
        return "-"
    width, height, count = sizes[0]
    share = 100 * count / sum(n for _, _, n in sizes)
    return f"{width}x{height}" + ("" if len(sizes) == 1 else f" ({share:.0f} %)")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def doctor(loaded: Loaded, store: Store, display: Display, as_json: bool) -> None:
    """Describes the data of a spec: every image is decoded once, but for sealed tasks.

    Raises:
        BadDataError: the data cannot be used.
        ConfigError: a sealed task was never recorded.
    """
    from graftwork.pipelines.planning import sources as datasets

    with loaded.locating(), display.indexing():
        found = datasets.find(loaded.spec, store.memo)
    reports: dict[str, Report] = {}
    for source in found:
        with display.counting(f"images decoded {source.task}".rstrip()) as on_progress:
            reports[source.task] = describe(
                source.dataset, look=not source.sealed, on_progress=on_progress
            )
        if not as_json:
            if source.task:
                recorded = ", sealed: as it was recorded" if source.sealed else ""
                Console().print(f'task "{source.task}"{recorded}')
            Console().print(render(reports[source.task]))
    if as_json:
        written = {name: report.to_json() for name, report in reports.items()}
        print(json.dumps({"tasks": written} if loaded.spec.stream else written[""], indent=1))
    if bad := sum(len(report.problems) for report in reports.values()):
        raise BadDataError(
            f"{bad} unusable images; mend them, or leave them out with "
            + ("on_bad_image: skip" if loaded.spec.stream else "dataset.on_bad_image: skip"),
            key="stream" if loaded.spec.stream else "dataset",
        )
