"""Looks into the sources of a data set: first at labels, then at the chosen images.

Shapes: N rows of a split.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from graftwork.operators.data import builtin, labels, parts, sources, tables
from graftwork.operators.data.parts import Examine, Part
from graftwork.operators.data.sources import MARK, Places, Source
from graftwork.operators.errors import BadDataError, together
from graftwork.operators.files.listing import class_of
from graftwork.operators.images import codec
from graftwork.operators.images.prefetch import prefetch
from graftwork.operators.keys import digest
from graftwork.operators.parquet.names import disagreement
from graftwork.operators.parquet.values import Column
from graftwork.operators.store.memo import Memo

VERSION = 2
_LISTED = 20
_AT_ONCE = 8
"""Footers of files, and entries of the memo, that are read at once: mostly they are waited for."""

_Columns = tuple[np.ndarray | None, Column, Column]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of a split, before anything is looked at but their labels.

    Args:
        places: of the N rows.
        source: int32 [N], ascending: which of the split's sources.
        row: int64 [N], row within the source; of a folder, number of the file.
        groups: of each source, the row groups of a Parquet file as `tables.read_columns` gives
            them; None for another.
        label: label column.
        domain: domain column; a single empty name where there is none.
        claims: of each file that names its integers, its place and these names.
    """

    places: Places
    source: np.ndarray
    row: np.ndarray
    groups: tuple[np.ndarray | None, ...]
    label: Column
    domain: Column
    claims: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """Findings about the images of a split.

    Args:
        places: of the N images.
        digests: uint8 [N, 32], `codec.digest` of each.
        bad: position -> reason, for images that cannot be used.
    """

    places: Places
    digests: np.ndarray
    bad: dict[int, str]

    def good(self) -> np.ndarray | slice:
        """The images that can be used: bool [N], or a slice, which copies nothing, if all can."""
        if not self.bad:
            return slice(None)
        usable = np.ones(len(self.digests), dtype=bool)
        usable[list(self.bad)] = False
        return usable

    def bad_images(self) -> list[dict[str, Any]]:
        """File, row (None for image files) and reason of each image that cannot be used."""
        places = self.places
        return [
            {
                "file": places.files[places.file[position]],
                "row": None if places.kind == "files" else int(places.row[position]),
                "reason": why,
            }
            for position, why in sorted(self.bad.items())
        ]


def explain(bad: Sequence[Mapping[str, Any]]) -> list[BadDataError]:
    """Images that cannot be used, the first twenty of them, and what to do."""
    found = [
        BadDataError(
            b["reason"], value=b["file"] + ("" if b["row"] is None else f" row {b['row']}")
        )
        for b in bad[:_LISTED]
    ]
    if len(bad) > _LISTED:
        found.append(BadDataError(f"... and {len(bad) - _LISTED} more images"))
    what = f"{len(bad)} unusable images; on_bad_image: skip leaves them out"
    return [*found, BadDataError(what)]


def file_names(found: Sequence[Source]) -> tuple[str, ...]:
    """The files of a split's sources, numbered as in `Places.file`."""
    return tuple(
        name
        for source in found
        for name in (
            [f"{source.url.rstrip('/')}/{f}" for f in source.files]
            if source.kind == "files"
            else [source.url]
        )
    )


def columns(
    description: Mapping[str, Any], found: Mapping[str, Sequence[Source]]
) -> tuple[dict[str, Table], list[BadDataError]]:
    """Labels and domains of all rows; no image is read.

    Returns:
        One table per split, and problems (with any, tables are missing).
    """
    result, problems = {}, list[BadDataError]()
    for split, its_sources in found.items():
        read = partial(_columns_or_problem, description=description)
        columns = list[_Columns]()
        for each in prefetch(read, its_sources, workers=_AT_ONCE):
            columns.append(each) if isinstance(each, tuple) else problems.append(each)
        if len(columns) < len(its_sources):
            continue
        groups, by_label, by_domain = zip(*columns, strict=True)
        label, domain = labels.join(by_label), labels.join(by_domain)
        if label is None or domain is None:
            what, mixed = ("labels", by_label) if label is None else ("domains", by_domain)
            problems.append(_mixed(what, split, mixed, its_sources))
            continue
        sizes = [len(column.values) for column in by_label]
        number = np.repeat(np.arange(len(columns), dtype=np.int32), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        folder = its_sources[0].kind == "files"
        places = Places(
            kind=its_sources[0].kind,
            image=description.get("image", ""),
            files=file_names(its_sources),
            file=np.arange(len(rows), dtype=np.int32) if folder else number,
            row=np.zeros_like(rows) if folder else rows,
        )
        result[split] = Table(
            places=places,
            source=number,
            row=rows,
            groups=groups,
            label=label,
            domain=domain,
            claims=tuple(
                (source.url, own.claimed)
                for source, own in zip(its_sources, by_label, strict=True)
                if own.claimed
            ),
        )
    return result, problems


def _mixed(
    what: str, split: str, columns: Sequence[Column], its_sources: Sequence[Source]
) -> BadDataError:
    """Complaint about files of which some hold integers and others strings, naming two."""
    first = {
        column.names is None: source.url
        for column, source in reversed(list(zip(columns, its_sources, strict=True)))
        if len(column.values)
    }
    where = f"integers in {first[True]}, strings in {first[False]}"
    return BadDataError(f"{what} are {where}", key=f"dataset.{split}")


def notes(splits: Mapping[str, Table], given: Sequence[str] | None) -> tuple[str, ...]:
    """Contradictions between the names that files and the spec give to integer labels."""
    claims = [claim for table in splits.values() for claim in table.claims]
    if given:
        claims.append(("dataset.classes", tuple(given)))
    found = disagreement(claims)
    return (found,) if found else ()


def _columns_or_problem(source: Source, description: Mapping[str, Any]) -> _Columns | BadDataError:
    try:
        return _columns(source, description)
    except BadDataError as error:
        return error


def _columns(source: Source, description: Mapping[str, Any]) -> _Columns:
    """Row groups of a source, label and domain of each row."""
    name = description.get("domain")
    if source.kind == "parquet":
        wanted = {"label": description["label"], **({"domain": name} if name else {})}
        groups, found = tables.read_columns(source.url, description["image"], wanted)
        return groups, found[0], found[1] if name else _constant(len(found[0].values))
    if name:
        raise BadDataError(
            f'"{name}" needs Parquet files, which have columns',
            key="dataset.domain",
            value=source.url,
        )
    if source.kind in builtin.BUILTIN:
        values = builtin.load(source.kind).labels(source.url)
        null = np.zeros(len(values), dtype=bool)
        return None, Column(values=values, names=None, null=null), _constant(len(values))
    number = {name: i for i, name in enumerate(source.classes)}
    values = np.array([number[class_of(file)] for file in source.files], dtype=np.int64)
    null = np.zeros(len(values), dtype=bool)
    label = Column(values=values, names=source.classes, null=null)
    return None, label, _constant(len(values))


def _constant(count: int) -> Column:
    zeros = np.zeros(count, dtype=np.int64)
    return Column(values=zeros, names=("",), null=zeros.astype(bool))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Wanted:
    """A part whose findings are wanted.

    Args:
        part: the part.
        source: where it comes from.
        scans: findings to be filled in, and the position of the part's first image there.
    """

    part: Part
    source: Source
    scans: list[tuple[Scan, int]]

    def take(self, found: parts.Findings) -> None:
        """Fills in what was found."""
        digests, bad = found
        for scan, start in self.scans:
            scan.digests[start : start + len(digests)] = digests
            scan.bad.update({start + position: why for position, why in bad.items()})


def images(
    splits: Mapping[str, Table],
    kept: Mapping[str, np.ndarray],
    found: Mapping[str, Sequence[Source]],
    memo: Memo,
    *,
    max_pixels: int | None,
    decode: bool,
    threads: int,
    examine: Examine,
) -> dict[str, Scan]:
    """Hashes and checks images part by part, parts of unchanged files from the memo.

    Args:
        splits: their rows.
        kept: by split, ascending, the rows whose images are wanted.
        found: by split, its sources.
        max_pixels: largest width times height.
        decode: whether every pixel is decoded, or only the header read.
        threads: that hash and check, if it is done here.
        examine: where the parts are examined that the memo does not know.

    Raises:
        BadDataError: sources changed while they were read, or cannot be read at all.
    """
    scans: dict[str, Scan] = {}
    wanted: dict[str, _Wanted] = {}
    for split, table in splits.items():
        places, source = table.places.at(kept[split]), table.source[kept[split]]
        digests = np.zeros((len(places), 32), dtype=np.uint8)
        scans[split] = Scan(places=places, digests=digests, bad={})
        rows = table.row[kept[split]]
        bounds = np.searchsorted(source, np.arange(len(found[split]) + 1))
        for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
            own, groups = found[split][number], table.groups[number]
            cut = _parts(own, groups, rows[start:stop], places, start, max_pixels, decode)
            for position, part in cut:
                each = _Wanted(part=part, source=own, scans=[])
                # The same images may be in both splits: they are read once.
                name = digest(part.identity)
                wanted.setdefault(name, each).scans.append((scans[split], position))
    missing = _take_known(list(wanted.values()), memo)
    problems: dict[int, BadDataError] = {}
    for number, result in examine([each.part for each in missing], memo, threads):
        if isinstance(result, BadDataError):
            problems[number] = result
            continue
        findings = parts.decoded(result, missing[number].part.images)
        assert findings is not None, "what was encoded just now"
        missing[number].take(findings)
    if problems:
        raise together([problems[number] for number in sorted(problems)])
    _check_folders(list({id(each.source): each.source for each in missing}.values()))
    return scans


def _take_known(wanted: Sequence[_Wanted], memo: Memo) -> list[_Wanted]:
    """Fills in what the memo knows; the rest."""
    missing = []
    entries = prefetch(lambda each: memo.get(each.part.identity), wanted, workers=_AT_ONCE)
    for each, data in zip(wanted, entries, strict=True):
        if (findings := parts.decoded(data, each.part.images)) is None:
            missing.append(each)
        else:
            each.take(findings)
    return missing


def _parts(
    source: Source,
    groups: np.ndarray | None,
    rows: np.ndarray,
    places: Places,
    start: int,
    max_pixels: int | None,
    decode: bool,
) -> Iterator[tuple[int, Part]]:
    """The parts of a source, each with the position of its first image.

    Args:
        rows: int64 [n], ascending: rows of the source, of a folder the numbers of its files.
        places: of the split's images.
        start: position of the source's first image.
    """
    at = parts.cuts(source, groups, rows)
    sizes = parts.sizes(source, groups, rows, at)
    for (a, b), size in zip(pairwise(at.tolist()), sizes, strict=True):
        marks, content = _content(source, places.image, rows[a:b])
        yield (
            start + a,
            Part(
                hints=places.hints(start + a, start + b),
                images=b - a,
                size=size,
                marks=marks,
                identity={
                    "kind": "part",
                    "content": content,
                    "decode": decode,
                    **examination(max_pixels),
                },
                max_pixels=max_pixels,
                decode=decode,
            ),
        )


def _content(source: Source, image: str, rows: np.ndarray) -> tuple[bytes, Any]:
    """Marks to be compared where the part is read, and what its images are known by."""
    if source.kind != "files":
        marks = sources.marked(source.identity) if source.kind == "parquet" else b""
        chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        return marks, {"source": dict(source.identity), "image": image, "rows": chosen}
    marks = np.frombuffer(source.marks, f"V{MARK}")[rows].tobytes()
    known = hashlib.sha256(marks).hexdigest()
    return b"" if "://" in source.url else marks, {"files": known}


def _check_folders(read: Sequence[Source]) -> None:
    """Compares folders that were read with what was found; a Parquet file's parts did so."""
    changed = [
        BadDataError(parts.changed(source.url))
        for source in read
        if source.kind == "files" and sources.locate([source.url])[0].identity != source.identity
    ]
    if changed:
        raise together(changed)


def examination(max_pixels: int | None) -> dict[str, Any]:
    """Settings, besides its bytes, that the verdict on an image depends on, for the memo.

    Args:
        max_pixels: largest width times height; None for the program's own limit.
    """
    return {
        "version": VERSION,
        "max_pixels": codec.MAX_PIXELS if max_pixels is None else max_pixels,
        "pillow": version("pillow"),
    }
