"""Looks into the sources of a data set: first at labels, then at the chosen images.

Shapes: N rows of a split.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from graftwork.operators.data import builtin, labels, sources, tables
from graftwork.operators.data.sources import Places, Source
from graftwork.operators.data.tables import Column
from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.store.memo import Memo

VERSION = 1
_CHUNK = 64
_LISTED = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """All rows of a split, before anything is left out.

    Args:
        places: of the N rows.
        source: int32 [N], which of the split's sources.
        label: label column.
        domain: domain column; a single empty name where there is none.
    """

    places: Places
    source: np.ndarray
    label: Column
    domain: Column


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """Findings about the images of a split.

    Args:
        places: of the N images.
        digests: uint8 [N, 32], sha256 of the encoded bytes.
        bad: position -> reason, for images that cannot be used.
    """

    places: Places
    digests: np.ndarray
    bad: Mapping[int, str]

    def good(self) -> np.ndarray:
        """bool [N], which images can be used."""
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
        parts = []
        for source in its_sources:
            try:
                parts.append(_columns(source, description))
            except BadDataError as error:
                problems.append(error)
        if len(parts) < len(its_sources):
            continue
        label = labels.join([part[0] for part in parts])
        domain = labels.join([part[1] for part in parts])
        if label is None or domain is None:
            what = "labels" if label is None else "domains"
            what += " are integers in one file, strings in another"
            problems.append(BadDataError(what, key=f"dataset.{split}"))
            continue
        sizes = [len(part[0].values) for part in parts]
        number = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        folder = its_sources[0].kind == "files"
        places = Places(
            kind=its_sources[0].kind,
            image=description.get("image", ""),
            files=file_names(its_sources),
            file=np.arange(len(rows), dtype=np.int32) if folder else number,
            row=np.zeros_like(rows) if folder else rows,
        )
        result[split] = Table(places=places, source=number, label=label, domain=domain)
    return result, problems


def _columns(source: Source, description: Mapping[str, Any]) -> tuple[Column, Column]:
    """Label and domain of each row of a source."""
    name = description.get("domain")
    if source.kind == "parquet":
        wanted = {"label": description["label"], **({"domain": name} if name else {})}
        count, found = tables.read_columns(source.url, description["image"], wanted)
        return found[0], found[1] if name else _constant(count)
    if name:
        raise BadDataError(
            f'"{name}" needs Parquet files, which have columns',
            key="dataset.domain",
            value=source.url,
        )
    if source.kind in builtin.BUILTIN:
        values = builtin.load(source.kind).labels(source.url)
        null = np.zeros(len(values), dtype=bool)
        return Column(values=values, names=None, null=null), _constant(len(values))
    number = {name: i for i, name in enumerate(source.classes)}
    values = np.array([number[f.split("/", 1)[0]] for f in source.files], dtype=np.int64)
    null = np.zeros(len(values), dtype=bool)
    return Column(values=values, names=source.classes, null=null), _constant(len(values))


def _constant(count: int) -> Column:
    zeros = np.zeros(count, dtype=np.int64)
    return Column(values=zeros, names=("",), null=zeros.astype(bool))


def images(
    places: Places,
    source: np.ndarray,
    found: Sequence[Source],
    memo: Memo,
    *,
    max_pixels: int | None,
    decode: bool,
    threads: int,
) -> Scan:
    """Hashes and checks images, those of an unchanged source from the memo.

    Args:
        places: of the N images.
        source: int32 [N], ascending: which of `found` an image belongs to.
        found: the split's sources.
        max_pixels: largest width times height.
        decode: whether every pixel is decoded, or only the header read.
        threads: that hash and check.

    Raises:
        BadDataError: a source changed while it was read, or cannot be read at all.
    """
    digests, bad = np.zeros((len(places), 32), dtype=np.uint8), {}
    bounds = np.searchsorted(source, np.arange(len(found) + 1))
    # Files are numbered through all sources of the split; within one they count from 0.
    first_file = np.cumsum([0] + [len(s.files) if s.kind == "files" else 1 for s in found])
    for number, its_source in enumerate(found):
        start, stop = int(bounds[number]), int(bounds[number + 1])
        if start == stop:
            continue
        own = places.at(np.arange(start, stop))
        local = np.stack([own.file - first_file[number], own.row]).astype("<i8")
        preimage = {
            "kind": "images",
            "source": dict(its_source.identity),
            "image": own.image,
            "rows": hashlib.sha256(local.tobytes()).hexdigest(),
            "decode": decode,
            **examination(max_pixels),
        }
        known = _from_memo(memo.get(preimage), stop - start)
        if known is None:
            known = _look(own.hints(0, stop - start), stop - start, max_pixels, decode, threads)
            if its_source.kind not in builtin.BUILTIN:
                _check_unchanged(its_source)
            memo.put(preimage, _to_memo(*known))
        digests[start:stop] = known[0]
        bad |= {start + position: why for position, why in known[1].items()}
    return Scan(places=places, digests=digests, bad=bad)


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


def _look(
    hints: Mapping[str, Any], count: int, max_pixels: int | None, decode: bool, threads: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Digests uint8 [N, 32], and reasons by position, of images that are read now."""
    parts: list[bytes] = []
    bad: dict[int, str] = {}
    look = partial(_look_at, max_pixels=max_pixels, decode=decode)
    chunks = batched(sources.read_or_reason(hints), _CHUNK)
    for number, (found, reasons) in enumerate(prefetch(look, chunks, workers=threads)):
        parts.append(found)
        bad |= {number * _CHUNK + position: why for position, why in reasons.items()}
    return np.frombuffer(b"".join(parts), np.uint8).reshape(count, 32), bad


Seen = tuple[bytes, dict[int, str]]


def _look_at(chunk: Iterable[bytes | str | None], max_pixels: int | None, decode: bool) -> Seen:
    digests, bad = [], {}
    for position, data in enumerate(chunk):
        digests.append(hashlib.sha256(data if isinstance(data, bytes) else b"").digest())
        try:
            if isinstance(data, str):
                raise BadDataError(data)
            (codec.rgb if decode else codec.check)(data, max_pixels)
        except BadDataError as error:
            bad[position] = str(error)
    return b"".join(digests), bad


def _check_unchanged(source: Source) -> None:
    if sources.locate([source.url])[0].identity != source.identity:
        raise BadDataError(f"{source.url} changed while it was read; run again")


def _to_memo(digests: np.ndarray, bad: Mapping[int, str]) -> bytes:
    flat = pa.array(digests.reshape(-1))
    metadata = {"bad": json.dumps(sorted(bad.items()))}
    schema = pa.schema([("digests", pa.uint8())], metadata=metadata)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([flat], schema=schema))
    return sink.getvalue()


def _from_memo(data: bytes | None, count: int) -> tuple[np.ndarray, dict[int, str]] | None:
    if data is None:
        return None
    with pa.ipc.open_file(pa.py_buffer(data)) as reader:
        if reader.schema != pa.schema([("digests", pa.uint8())]):
            return None
        flat = reader.read_all()["digests"].to_numpy()
        bad = json.loads((reader.schema.metadata or {})[b"bad"])
    return flat.reshape(count, 32), dict(bad)
