"""Names of files and folders: which are images, which belong to the system, which are passed over.

What is passed over is counted by its reason, so that no image vanishes without a word.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Format -> names of its files, in lower case; upper case is the same."""

EXTENSIONS = tuple(extension for own in FORMATS.values() for extension in own)

SYSTEM = frozenset(
    (
        "__macosx",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "@eadir",
        "#recycle",
        "#snapshot",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    )
)
"""Names, in lower case, that systems and their tools leave in folders; hidden ones go without."""

_ASIDE = (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html")
"""Files that describe images and are none."""

_METADATA = frozenset(f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet"))
_NAMED = 4
OF_THE_SYSTEM = "hidden and system files"
METADATA = "Hugging Face's files of labels"
OUTSIDE = "images outside the class folders"
SPECIAL = "pipes, sockets and devices"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Files that a folder holds and that are not used, for one reason.

    Args:
        what: the files, in the plural.
        count: how many; a folder of the system counts once.
        first: name of the first one, relative to the folder.
        why: what to do, or why nothing is lost.
        lost: whether images may be lost.
    """

    what: str
    count: int
    first: str
    why: str
    lost: bool


@dataclass(frozen=True)
class Tally:
    """Counts what is left out while a folder is listed.

    Args:
        found: what -> how many, and the first name in order.
    """

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, name: str) -> None:
        """Counts one file or folder."""
        count, first = self.found.get(what, (0, name))
        self.found[what] = count + 1, min(first, name)

    def left_out(self) -> tuple[LeftOut, ...]:
        """Counts: first what may be a loss, then by its name."""
        entries = (
            LeftOut(what=what, count=count, first=first, why=_why(what), lost=_lost(what))
            for what, (count, first) in self.found.items()
        )
        return tuple(sorted(entries, key=lambda entry: (not entry.lost, entry.what)))


def together(several: Iterable[tuple[LeftOut, ...]]) -> tuple[LeftOut, ...]:
    """Sum of what several folders leave out."""
    sums = Tally()
    for entry in (entry for entries in several for entry in entries):
        count, first = sums.found.get(entry.what, (0, entry.first))
        sums.found[entry.what] = count + entry.count, first
    return sums.left_out()


def said(left_out: Iterable[LeftOut]) -> str:
    """Text for a line about what may be a loss; empty if nothing is."""
    lost = [entry for entry in left_out if entry.lost]
    named = [f"{entry.what}: {entry.count} ({entry.first})" for entry in lost[:_NAMED]]
    more = f" and {len(lost) - _NAMED} more kinds" if len(lost) > _NAMED else ""
    return f": left out: {', '.join(named)}{more}" if lost else ""


def is_image(name: str) -> bool:
    """Tells whether a file is an image that is read, by its name."""
    return name.lower().endswith(EXTENSIONS)


def of_the_system(name: str) -> bool:
    """Tells whether a file or folder is hidden, or left by a system: no image and no class."""
    return name.startswith(".") or name.lower() in SYSTEM


def others(name: str) -> str:
    """Files like this one, in the plural: by their extension."""
    if PurePosixPath(name).name.lower() in _METADATA:
        return METADATA
    extension = PurePosixPath(name).suffix.lower()
    return f"{extension} files" if 1 < len(extension) <= 12 else "files without an extension"


def _lost(what: str) -> bool:
    return what != OF_THE_SYSTEM and what.removesuffix(" files") not in _ASIDE


def _why(what: str) -> str:
    if what == OF_THE_SYSTEM:
        return "no images"
    if what == OUTSIDE:
        return "without a class"
    if what == METADATA:
        return "not read; labels are names of folders"
    if what == SPECIAL:
        return "no files"
    return "not read; convert them" if _lost(what) else "no images"
