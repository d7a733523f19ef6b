"""Local paths that are spelled in another Unicode form than their names on the disk."""

import glob
import os
import unicodedata

from graftwork.operators.names import normal


def spelled(path: str) -> str:
    """A local path as the disk spells it, if only the Unicode form of names differs.

    A path that is there, and one that is in no form, are returned as they are; so is one that
    stands for several.

    Args:
        path: absolute.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    found = os.sep
    for part in path.split(os.sep):
        place = os.path.join(found, part)
        if not os.path.lexists(place):
            same = [name for name in _names(found) if normal(name) == normal(part)]
            if len(same) != 1:
                return path
            place = os.path.join(found, same[0])
        found = place
    return found


def matches(pattern: str) -> list[str]:
    """Paths that a local pattern matches, sorted; in another form of its names if it has none."""
    forms = (pattern, *(unicodedata.normalize(form, pattern) for form in ("NFC", "NFD")))
    return next((sorted(found) for p in forms if (found := glob.glob(p, recursive=True))), [])


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # whoever opens the path says what is wrong with it
        return []
