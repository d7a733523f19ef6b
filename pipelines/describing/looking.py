"""Every image of a split, decoded: how the images are stored, and what is done about that.

Shapes: N images of a split.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from graftwork.operators.data import sources
from graftwork.operators.data.dataset import Split
from graftwork.operators.errors import BadDataError
from graftwork.operators.files import kinds
from graftwork.operators.images import codec, modes
from graftwork.operators.images.codec import Look
from graftwork.operators.images.prefetch import batched, prefetch

CHUNK = 32
LONG = 3.0
"""Longer edge divided by the shorter one, above which a centre crop loses most of an image."""
_DARK = 4096
"""Of 65536: images of 16 bits that stay below it are nearly black in 8 bits."""

_EDGE = {1: "top left", 2: "mirrored", 3: "by 180 degrees", 4: "mirrored, by 180 degrees",
         5: "mirrored, by 90 degrees", 6: "by 90 degrees", 7: "mirrored, by 270 degrees",
         8: "by 270 degrees"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """Something that images or files of a split have in common.

    Args:
        kind: "format", "pixels", "stored", "left out" or "unusable".
        what: in words.
        count: images, or files.
        first: name of the first one.
        done: what is done about it.
        lost: whether the images take no part, and are probably meant to.
    """

    kind: str
    what: str
    count: int
    first: str
    done: str
    lost: bool = False


@dataclass
class Looks:
    """Counts of what was seen of the images of a split so far.

    Args:
        images: that were looked at.
        bytes: of all encoded images.
        sizes: images per width and height.
        found: kind and what -> number of images, name of the first, what is done.
        problems: position and reason of images that cannot be used.
        long: images whose one edge is more than `LONG` times the other.
        highest: the largest value of grey images with 16 bits; None without such images.
    """

    images: int = 0
    bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    found: dict[tuple[str, str], tuple[int, str, str]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    long: int = 0
    highest: int | None = None

    @property
    def dark(self) -> bool:
        """Tells whether all grey images with 16 bits use a sixteenth of them or less."""
        return self.highest is not None and self.highest < _DARK

    def take(self, seen: "Seen", name: str) -> None:
        """Adds the next image."""
        position, self.images = self.images, self.images + 1
        self.bytes += seen.bytes
        if seen.look is None:
            self.problems.append((position, seen.why))
            return
        self._look(seen.look, name)

    def _look(self, look: Look, name: str) -> None:
        self.sizes[look.size] += 1
        self.long += max(look.size) > LONG * min(look.size)
        for kind, what, done in facts(look, name):
            count, first, _ = self.found.get((kind, what), (0, name, done))
            self.found[kind, what] = count + 1, first, done
        if look.highest is not None and look.bits == 16:
            self.highest = max(look.highest, self.highest or 0)

    def listed(self) -> list[Found]:
        """Facts that images have in common, kind by kind, most frequent first."""
        order = ("format", "pixels", "stored")
        entries = [
            Found(kind=kind, what=what, count=count, first=first, done=done)
            for (kind, what), (count, first, done) in self.found.items()
        ]
        return sorted(entries, key=lambda e: (order.index(e.kind), -e.count, e.what))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One image: how it is stored, or why it cannot be used, and its bytes."""

    look: Look | None
    why: str = ""
    bytes: int = 0


def facts(look: Look, name: str) -> Iterator[tuple[str, str, str]]:
    """Kind of each fact about an image, the fact, and what is done about it."""
    yield "format", look.format, "read"
    done = modes.CONVERSIONS[look.mode]
    wide = look.bits > 8 and look.mode not in modes.WIDE
    word = modes.WORDS.get(look.mode, "grey")
    depth = f", {look.bits} bits" if look.bits > 8 else ""
    yield (
        "pixels",
        f"{word}{depth} ({look.mode})",
        f"{modes.CONVERSIONS['I;16']}{'' if look.mode == 'RGB' else '; ' + done}" if wide else done,
    )
    if look.orientation != 1:
        turned = look.format == "TIFF"
        yield (
            "stored",
            f"turned {_EDGE[look.orientation]} (EXIF {look.orientation})",
            "turned, as Pillow turns TIFF"
            if turned
            else "not turned, as torchvision's ImageFolder",
        )
    if look.transparent:
        yield "stored", "transparent pixels", "their stored colour shows"
    if look.several:
        yield "stored", "several pictures in a file", "the first one is taken"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in kinds.EXTENSIONS and suffix not in kinds.FORMATS.get(look.format, ()):
        yield "stored", f"{look.format} with the name of another", "read by its content"


def look_at(split: Split, max_pixels: int | None, threads: int) -> Iterator[Seen]:
    """Each image of a split, decoded, in order.

    Raises:
        BadDataError: a source is gone.
    """
    if not len(split):
        return
    encoded = zip(sources.read_or_reason(split.places(0, len(split))), split.digests, strict=True)
    look = partial(_look_at, max_pixels=max_pixels)
    for seen in prefetch(look, batched(encoded, CHUNK), workers=threads):
        yield from seen


def _look_at(
    chunk: Sequence[tuple[bytes | str | None, np.ndarray]], max_pixels: int | None
) -> list[Seen]:
    seen: list[Seen] = []
    for data, digest in chunk:
        if isinstance(data, str):
            seen.append(Seen(look=None, why=data))
            continue
        count = len(data or b"")
        try:
            look, why = codec.look(data, max_pixels), ""
            if codec.digest(data) != digest.tobytes():
                look, why = None, "changed since it was indexed"
        except BadDataError as error:
            look, why = None, str(error)
        seen.append(Seen(look=look, why=why, bytes=count))
    return seen


def left_out(entries: Iterable[kinds.LeftOut]) -> list[Found]:
    """Files that are not used, as facts."""
    return [
        Found(kind="left out", what=e.what, count=e.count, first=e.first, done=e.why, lost=e.lost)
        for e in entries
    ]


def unusable(problems: Iterable[Mapping[str, Any]], done: str) -> list[Found]:
    """Images that cannot be used, by their reason, as facts.

    Args:
        problems: file, row and reason of each.
        done: what is done about them.
    """
    found: dict[str, tuple[int, str]] = {}
    for problem in problems:
        what = _short(problem["reason"])
        count, first = found.get(what, (0, problem["file"]))
        found[what] = count + 1, first
    return [
        Found(kind="unusable", what=what, count=count, first=first, done=done, lost=True)
        for what, (count, first) in sorted(found.items())
    ]


def _short(reason: str) -> str:
    """The kind of a reason, without what is peculiar to an image."""
    if "more than max_pixels" in reason:
        return "more than max_pixels"
    if reason.startswith("not PNG"):
        other = reason.removeprefix(f"not {codec.FORMATS}").partition(" (")[0]
        return f"no image{other.replace(', but', ':')}"
    return re.split(r"[:;]|, w| to /", reason)[0]
