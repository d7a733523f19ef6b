"""Content keys: sha256 over canonical JSON, and the digest of the program itself."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from graftwork import methods, operators

_SOURCES = (".py", ".json")
"""Code, and the descriptions of models that ship with it."""


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no blanks, ASCII; NaN and infinity are refused.

    Raises:
        ValueError: the value holds NaN or infinity.
        TypeError: the value is not made of dict, list, tuple, str, int, float, bool, None.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of `canonical(value)`, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def program_digest() -> str:
    """`source_digest` of all that defines a method, a merge, a rule or a backbone.

    Whole packages, not the files that a card is known to depend on: which ones these are changes
    with every import. Editing an unrelated file costs one more look, in a second or two.
    """
    return source_digest(methods, operators)


def source_digest(*packages: ModuleType) -> str:
    """sha256 over the source files of packages with their sub-packages, 64 hex digits.

    Paths count as well as bytes: a file that was moved, added or removed is another program. Where
    the packages are installed does not count.
    """
    return digest([entry for package in packages for entry in _sources(package)])


def _sources(package: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Name of the package, path within it and sha256 of each of its files, in a fixed order."""
    for place in map(Path, package.__path__):
        for path in sorted(p for p in place.rglob("*") if p.suffix in _SOURCES):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            yield package.__name__, path.relative_to(place).as_posix(), content
