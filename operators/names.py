"""Names of classes, domains and tasks, which are compared in one Unicode form: NFC.

An accented letter is one character on most systems and two on others; people see the same name.
"""

import re
import unicodedata
from collections.abc import Iterable


def normal(name: str) -> str:
    """A name in NFC, the form in which names are kept and compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name without what is easily mistaken: case, width, and any number of spaces, `-`, `_`."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r"[\s_-]+", " ", plain).strip()


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of different names that are the same when `folded`, each group sorted."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(folded(name), set()).add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)
