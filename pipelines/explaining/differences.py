"""Differences between JSON values, in words that fit a line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 24
"""Characters of a value that is shown whole."""
ABSENT = object()
"""Stands for a value that is not there; `null` is one that is."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One of the differences between two values; the two texts are never equal.

    Args:
        where: in which part of them, such as `task 3 classes`; empty for the values as a whole.
        before: what is stored.
        after: what is wanted.
    """

    where: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.where} {self.before} -> {self.after}".lstrip()


def differences(before: Any, after: Any, name: str = "", where: str = "") -> Iterator[Difference]:
    """Differences between two JSON values, part by part; none for equal ones.

    Values that are short are shown whole. Of long lists the lengths are compared, and the items
    that both have.

    Args:
        before: a JSON value, or `ABSENT`.
        after: another one.
        name: key of the values, which says what the items of lists are.
        where: of the values, in words.
    """
    if _json(before) == _json(after):
        return
    short = max(len(_json(before)), len(_json(after))) <= LONGEST
    if isinstance(before, Mapping) and isinstance(after, Mapping) and not short:
        for key in sorted(before.keys() | after.keys()):
            values = before.get(key, ABSENT), after.get(key, ABSENT)
            yield from differences(*values, name=key, where=f"{where} {key}".lstrip())
    elif isinstance(before, list) and isinstance(after, list) and not short:
        one, several = _ITEMS.get(name, ("entry", "entries"))
        if len(before) != len(after):
            # Their name says it already, unless the list is a part of something else.
            counted = where if where.endswith(several) else f"{where} {several}".lstrip()
            yield Difference(where=counted, before=str(len(before)), after=str(len(after)))
        for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
            yield from differences(old, new, where=f"{where} {one} {number}".lstrip())
    else:
        old, new = _apart(before, after)
        yield Difference(where=where, before=old, after=new)


_ITEMS = {
    "tasks": ("task", "tasks"),
    "names": ("name", "names"),
    "templates": ("template", "templates"),
    "members": ("member", "members"),
}
"""Key of a list -> what its items are called."""


def _json(value: Any) -> str:
    """A value's JSON with everything unprintable as an escape: equal for equal values alone."""
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def brief(value: Any) -> str:
    """The beginning of a value, text without quotes."""
    text = _json(value)[1:-1] if isinstance(value, str) else _json(value)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:8]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}…"


def _apart(before: Any, after: Any) -> tuple[str, str]:
    """Short texts of two differing values, which differ, too."""
    if (old := brief(before)) != (new := brief(after)):
        return old, new
    old, new = _json(before), _json(after)
    pairs = zip(old, new, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    start = max(0, common - LONGEST // 3)
    return _window(old, start), _window(new, start)


def _window(text: str, start: int) -> str:
    """A part of a text that shows where it is cut."""
    cut = text[start : start + LONGEST]
    return ("…" if start else "") + cut + ("…" if start + LONGEST < len(text) else "")
