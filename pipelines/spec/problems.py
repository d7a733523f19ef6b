"""Problems of a spec as lines that say where, what, and what to do."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.operators.errors import ConfigError, together
from graftwork.operators.files.urls import mask
from graftwork.pipelines.spec.yaml_source import Path

MAX_LINES = 50

Problem = tuple[Path, str]
"""Path of a value, and what is wrong with it."""


@dataclass(frozen=True)
class Origin:
    """Place where a value was written: a line of the file, or a `--set` option.

    Args:
        text: `FILE:LINE` or `--set key=value`.
        rank: sorts problems in the order of the file, options last.
    """

    text: str
    rank: int


@dataclass(frozen=True)
class Origins:
    """Places where the values of a spec were written.

    Args:
        places: path -> origin; a path without one has that of its nearest parent.
    """

    places: dict[Path, Origin]

    def find(self, path: Path) -> Origin | None:
        """Origin of the value, or of the nearest parent that was written down."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None

    def place(self, key: Path | str) -> str:
        """`FILE:LINE` of a key, or `--set key=value`; empty where nothing was written."""
        origin = self.find(parse_path(key) if isinstance(key, str) else key)
        return one_line(origin.text) if origin else ""

    def errors(self, problems: Iterable[Problem | tuple[str, str]]) -> list[ConfigError]:
        """An error for each problem, in the order of the file.

        Args:
            problems: (path or dotted key path, message).

        Returns:
            `FILE:LINE: key.path: message` each, credentials masked, at most `MAX_LINES`.
        """
        ranked: list[tuple[int, ConfigError]] = []
        for key, message in problems:
            path = parse_path(key) if isinstance(key, str) else key
            origin = self.find(path)
            shown_key, place = one_line(dotted(path)), self.place(path)
            error = ConfigError(one_line(message), key=shown_key, place=place)
            ranked.append((origin.rank if origin else 0, error))
        ranked.sort(key=lambda pair: pair[0])
        found = list({str(error): error for _, error in ranked}.values())
        if len(found) > MAX_LINES:
            more = ConfigError(f"... and {len(found) - MAX_LINES} more problems")
            return [*found[:MAX_LINES], more]
        return found

    def error(self, problems: Iterable[Problem | tuple[str, str]]) -> ConfigError:
        """The problems as one exception, see `errors`."""
        return together(self.errors(problems))


def dotted(path: Path) -> str:
    """`("methods", 0, "lr")` -> `methods.0.lr`."""
    return ".".join(str(part) for part in path)


def parse_path(text: str) -> Path:
    """`methods.0.lr` -> `("methods", 0, "lr")`."""
    parts = [part for part in text.split(".") if part]
    return tuple(int(p) if p.isascii() and p.isdigit() and len(p) < 10 else p for p in parts)


def one_line(text: str) -> str:
    """The text without credentials, with everything unprintable written as an escape."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in mask(text))


def shown(value: Any) -> str:
    """A value as it appears in a message: short, and text in quotes."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None or isinstance(value, (bool, float)):
        return json.dumps(value)
    # A number of thousands of digits can be neither printed nor read.
    huge = isinstance(value, int) and value.bit_length() > 200
    if huge:
        return "a huge number"
    if not isinstance(value, str):
        return str(value)
    text = mask(value)
    shown = json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)
    return shown.encode(errors="backslashreplace").decode()


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?` where a known word resembles this one, else the known words."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else ""
