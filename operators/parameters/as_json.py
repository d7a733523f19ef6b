"""Frozen dataclasses as the JSON values that keys and hints hold, and back, by their fields.

A field is written under its own name, or under another one (`named`). The fields of an `INLINE`
value stand among those of what holds it. An `OPTIONAL` one is left out while it is None; any other
None is written. Tuples are lists in JSON. A class with its own `to_json` or `from_json` is asked.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Convert = Callable[[Any], Any]


INLINE = {"inline": True}
"""Metadata of a field whose value's own fields stand beside the others in JSON."""

OPTIONAL = {"optional": True}
"""Metadata of a field, None by default, that is left out of JSON while it is None."""


def named(key: str) -> dict[str, str]:
    """Metadata of a field that has another name in JSON."""
    return {"key": key}


def to_json(value: Any) -> dict[str, Any]:
    """The JSON value of a dataclass, made of dictionaries, lists and scalars."""
    found: dict[str, Any] = {}
    for part in _parts(type(value)):
        own = getattr(value, part.name)
        if part.inline:
            found.update(to_json(own))
        elif own is not None:
            found[part.key] = part.write(own)
        elif not part.optional:
            found[part.key] = None
    return found


def from_json(kind: type[T], value: Mapping[str, Any]) -> T:
    """The inverse of `to_json`.

    Raises:
        ValueError: a key is missing, is not known, or has a value of another type; it is named.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{kind.__name__}: must be a mapping, got {value!r}")
    if strangers := [key for key in value if key not in _keys(kind)]:
        raise ValueError(f"{kind.__name__}: unknown key {', '.join(map(repr, strangers))}")
    given: dict[str, Any] = {}
    for part in _parts(kind):
        if part.inline:
            known = _keys(part.kind)
            given[part.name] = from_json(part.kind, {k: v for k, v in value.items() if k in known})
        elif part.key in value:
            try:
                given[part.name] = part.read(value[part.key])
            except TypeError as error:
                raise ValueError(f"{kind.__name__}: {part.key!r} {error}") from error
        elif not part.optional:
            raise ValueError(f"{kind.__name__}: missing key {part.key!r}")
    return kind(**given)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One field of a dataclass."""

    name: str
    key: str
    kind: Any
    inline: bool
    optional: bool
    write: Convert
    read: Convert


@cache
def _parts(kind: type[Any]) -> tuple[_Part, ...]:
    hints = get_type_hints(kind)
    return tuple(
        _Part(
            name=each.name,
            key=each.metadata.get("key", each.name),
            kind=hints[each.name],
            inline=each.metadata.get("inline", False),
            optional=each.metadata.get("optional", False),
            write=_writer(hints[each.name]),
            read=_reader(hints[each.name]),
        )
        for each in fields(kind)
    )


@cache
def _keys(kind: type[Any]) -> frozenset[str]:
    """Every key that the JSON value of a dataclass may have."""
    own = (_keys(part.kind) if part.inline else {part.key} for part in _parts(kind))
    return frozenset().union(*own)


def _inner(kind: Any) -> Any:
    """The type that `X | None` has beside None; None for a type of another form."""
    if get_origin(kind) in (Union, types.UnionType):
        [*others] = [each for each in get_args(kind) if each is not type(None)]
        return others[0] if len(others) == 1 and len(get_args(kind)) == 2 else None
    return None


def _writer(kind: Any) -> Convert:
    """From a field's value, which is not None, to its JSON value."""
    if inner := _inner(kind):
        return _writer(inner)
    if get_origin(kind) is tuple:
        one = get_args(kind)[0]
        if not is_dataclass(one) and get_origin(one) is not tuple:
            return list
        each = _writer(one)
        return lambda value: [each(one) for one in value]
    if hasattr(kind, "to_json"):
        return lambda value: value.to_json()
    return to_json if is_dataclass(kind) else lambda value: value


def _reader(kind: Any) -> Convert:
    """From a field's JSON value to its value; TypeError says what it must be."""
    if inner := _inner(kind):
        read = _reader(inner)
        return lambda value: None if value is None else read(value)
    if get_origin(kind) is tuple:
        each = _reader(get_args(kind)[0])
        return lambda value: tuple(each(one) for one in _typed(value, (list, tuple), "a list"))
    if hasattr(kind, "from_json"):
        return kind.from_json
    if is_dataclass(kind):
        return lambda value: from_json(kind, value)  # type: ignore[arg-type]
    if kind in _SCALARS:
        return lambda value: _typed(value, *_SCALARS[kind])
    return lambda value: value


_SCALARS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
}
"""Type of a field -> types of its JSON values, and what they are called."""


def _typed(value: Any, kinds: tuple[type, ...], called: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"must be {called}, got {value!r}")
    return value
