"""Reading specs: from a file, a URL or a preset to a checked `PipelineSpec`.

All problems of a spec are reported at once, a line each, with the place where the value was
written. Relative paths in a spec are relative to the directory the command runs in, not to the
spec's own folder: presets then work anywhere, and a spec may be moved.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from graftwork.operators.errors import BadDataError, ConfigError, IncompatibleError, together
from graftwork.operators.files import urls
from graftwork.pipelines.spec import overrides as overriding
from graftwork.pipelines.spec.fields import with_places
from graftwork.pipelines.spec.model import PipelineSpec
from graftwork.pipelines.spec.problems import (
    Origin,
    Origins,
    Problem,
    dotted,
    nearest,
    one_line,
    shown,
)
from graftwork.pipelines.spec.reference import siblings
from graftwork.pipelines.spec.yaml_source import Path, SyntaxProblem, dump, parse

__all__ = [
    "Loaded",
    "PipelineSpec",
    "load_resolved",
    "presets",
]

MAX_BYTES = 1024 * 1024
_PRESETS = FilePath(__file__).parent / "presets"


@dataclass(frozen=True)
class Loaded:
    """A spec with what is needed to report problems with it.

    Args:
        spec: the checked spec.
        text: YAML with all defaults written out; loads as an equal spec.
        origins: where each value was written.
    """

    spec: PipelineSpec
    text: str
    origins: Origins

    def error(self, problems: Iterable[tuple[str, str]]) -> ConfigError:
        """Problems found after loading, in the form of the loader's own: where, what, what to do.

        Args:
            problems: (dotted key path, message); a method's hyper-parameters are at
                `methods.INDEX.field`.

        Returns:
            `FILE:LINE: key.path: message`, a line each, in the order of the file.
        """
        return self.origins.error((self.spec.written_path(key), what) for key, what in problems)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Adds to errors where the value of their key was written."""
        try:
            yield
        except (BadDataError, ConfigError, IncompatibleError) as error:
            raise error.placed(self.origins.place) from error


def presets() -> dict[str, FilePath]:
    """Preset name -> file, sorted by name."""
    return {path.stem: path for path in sorted(_PRESETS.glob("*.yaml"), key=lambda p: p.stem)}


def load_resolved(source: str, overrides: Sequence[str] = ()) -> Loaded:
    """Reads and checks a spec.

    Args:
        source: path, fsspec URL, or name of a preset; a file comes before a preset of its name.
        overrides: `dotted.key=value` each, applied in order.

    Returns:
        The spec, with its resolved text and the origins of its values.

    Raises:
        ConfigError: all problems.
    """
    name, text = _read(source)
    try:
        document = parse(text)
    except SyntaxProblem as problem:
        raise ConfigError(one_line(f"{name}:{problem.where}: {problem.message}")) from problem
    if document.value is None and not document.problems:
        raise ConfigError(f"{one_line(name)}: empty config; see the presets for examples")
    origins = Origins(
        {path: Origin(f"{name}:{line}", line) for path, line in document.lines.items()}
    )
    # Duplicates and references are worded with their own lines: a path may have two of them.
    lines = [
        ConfigError(one_line(message), key=one_line(dotted(path)), place=one_line(f"{name}:{line}"))
        for line, path, message in document.problems
    ]
    value, problems = overriding.apply(document.value, origins, overrides)
    noted = {path for _, path, _ in document.problems} | {path for path, _ in problems}
    spec, found = _check(value)
    problems += [(path, message) for path, message in found if path not in noted]
    if spec is None or problems or lines:
        raise together(lines + origins.errors(problems))
    return Loaded(spec, dump(spec.to_value()), origins)


def with_absolute_places(loaded: Loaded) -> str:
    """YAML of the spec in which every local place is absolute: a job runs in another folder.

    Raises:
        ConfigError: a place that may not be used.
    """
    from graftwork.operators.files.access import absolute

    return dump(with_places(loaded.spec, absolute).to_value())


def _read(source: str) -> tuple[str, str]:
    """The name of the source in messages, and its text."""
    if source in presets() and not FilePath(source).is_file():
        return f"preset {source}", presets()[source].read_text(encoding="utf-8")
    try:
        urls.check(source)
    except ConfigError as error:
        raise ConfigError(one_line(f"spec {shown(source)}: {error}")) from error
    name = one_line(source)
    try:
        data = _read_url(source) if "://" in source else _read_file(source)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: not found{_suggestion(source)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{name}: is a directory; name a file in it") from error
    except OSError as error:
        raise ConfigError(one_line(f"{name}: cannot be read: {error.strerror or error}")) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than 1 MiB; is this the spec?")
    try:
        # utf-8-sig: editors on Windows begin files with a byte order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return name, text


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _read_url(url: str) -> bytes:
    """Up to `MAX_BYTES` + 1 bytes; all errors of stores become OSErrors."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read(MAX_BYTES + 1)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:
        raise
    except ImportError as error:
        raise OSError(f"support for this protocol is not installed ({error})") from error
    except Exception as error:
        # The clients of object stores have exceptions of their own for denied or absent things.
        raise OSError(f"{type(error).__name__}: {error}") from error


def _suggestion(source: str) -> str:
    names = list(presets())
    close = difflib.get_close_matches(FilePath(source).stem[:100], names, n=1)
    if close:
        return f'; did you mean the preset "{close[0]}"?'
    return f"; give a file, a URL, or a preset: {', '.join(names)}"


def _check(value: Any) -> tuple[PipelineSpec | None, list[Problem]]:
    """The spec, or all that is wrong with the values."""
    if not isinstance(value, Mapping):
        return None, [((), f"must be a mapping of keys to values, got {shown(value)}")]
    problems = list(_unacceptable(value, ()))
    unusable = {path for path, _ in problems}
    try:
        spec = PipelineSpec.model_validate(dict(value))
    except ValidationError as error:
        found = [_in_words(details, value) for details in error.errors(include_url=False)]
        # A shorthand puts its value's problem one step deeper or higher; say it once.
        problems += [
            (path, message)
            for path, message in found
            if not any(path == bad or path == bad[:-1] for bad in unusable)
        ]
        return None, problems
    return (None if problems else spec), problems


def _unacceptable(value: Any, path: Path) -> Iterable[Problem]:
    """Problems that no value of a spec may have, whatever its key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unacceptable(str(key), (*path, str(key)))
            yield from _unacceptable(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _unacceptable(item, (*path, index))
    elif isinstance(value, str):
        if urls.has_credentials(value):
            yield path, "looks like a credential; use the environment"
        elif urls.has_control_characters(value):
            yield path, "invalid character (newline, NUL or another control character); remove it"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield path, f"must be a finite number, got {shown(value)}"
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            yield path, "number too large; must be below 2**63"
    elif value is not None:
        yield path, f"must be text, a number, a list or a mapping, got {type(value).__name__}"


def _in_words(details: Any, value: Any) -> Problem:
    """One of pydantic's errors as a path in the spec and a sentence."""
    context = details.get("ctx", {})
    path = (*_written_path(details["loc"], value), *context.get("at", ()))
    match details["type"]:
        case "spec":
            return path, context["message"]
        case "missing":
            return path, "missing; it is required"
        case "extra_forbidden":
            known = siblings(dotted(path[:-1]))
            return path, f"unknown key{nearest(str(path[-1]), known)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return path, f"must be a mapping, got {shown(details['input'])}"
        case _:
            return path, details["msg"]


def _written_path(loc: tuple[str | int, ...], value: Any) -> Path:
    """Pydantic's path without its names for alternatives and without steps into shorthands."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(part, str) and part.startswith("<"):
            continue
        if not isinstance(value, (Mapping, list, tuple)):
            break
        path.append(part)
        if isinstance(value, Mapping):
            value = value.get(part)
            continue
        value = value[part] if isinstance(part, int) and part < len(value) else None
    return tuple(path)
