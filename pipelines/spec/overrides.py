"""`--set dotted.key=value`: changes to the values of a spec before they are checked."""

from collections.abc import Sequence
from typing import Any

from graftwork.operators.files.urls import mask
from graftwork.pipelines.spec.problems import (
    Origin,
    Origins,
    Problem,
    dotted,
    nearest,
    parse_path,
    shown,
)
from graftwork.pipelines.spec.yaml_source import Path, SyntaxProblem, parse, scalar

# Options come after every line of the file.
_RANK = 10**9


def apply(value: Any, origins: Origins, overrides: Sequence[str]) -> tuple[Any, list[Problem]]:
    """Apply options in order.

    The last part of a path may be new (the spec refuses keys it does not know); a missing
    mapping on the way is created; a position in a list must exist.

    Args:
        value: the spec as plain values; changed in place.
        origins: where the values were written; each option enters itself.
        overrides: `dotted.key=value` each.

    Returns:
        The changed values, and problems of options that could not be applied.
    """
    problems: list[Problem] = []
    for number, option in enumerate(overrides):
        origin = Origin(_shortened(f"--set {option}"), _RANK + number)
        name, separator, text = option.partition("=")
        path = parse_path(name.strip())
        if not separator or not path or dotted(path) != name.strip():
            origins.places[(name,)] = origin
            problems.append(((name,), 'expected "dotted.key=value"'))
            continue
        for old in [place for place in origins.places if place[: len(path)] == path]:
            del origins.places[old]
        origins.places[path] = origin
        try:
            _put(value, path, _value(text))
        except _Refused as refused:
            problems.append((path, str(refused)))
    return value, problems


class _Refused(Exception):
    """The option cannot be applied; the message says why."""


def _value(text: str) -> Any:
    """The value of an option: a scalar, or a list, mapping or quoted text in YAML's notation."""
    if not text.strip().startswith(("[", "{", '"', "'")):
        return scalar(text.strip())
    try:
        document = parse(text)
    except SyntaxProblem as problem:
        raise _Refused(f"{problem.message} (character {problem.where.split(':')[1]})") from problem
    if document.problems:
        raise _Refused(document.problems[0][2])
    return document.value


def _put(root: Any, path: Path, value: Any) -> None:
    """Set the value at a path below `root`."""
    node = root
    for depth, part in enumerate(path[:-1]):
        node = _child(node, part, path, depth)
    part = path[-1]
    if isinstance(node, list):
        node[_position(node, part)] = value
    elif isinstance(node, dict):
        node[str(part)] = value
    else:
        raise _Refused(_no_inside(path[:-1], node))


def _child(node: Any, part: str | int, path: Path, depth: int) -> Any:
    """The value that holds the rest of the path; created, or written out in full, where needed."""
    if isinstance(node, list):
        key: Any = _position(node, part)
    elif isinstance(node, dict):
        key = str(part)
    else:
        raise _Refused(_no_inside(path[:depth], node))
    child = node[key] if isinstance(node, list) else node.get(key)
    if child is None:
        child = node[key] = {}
    elif isinstance(child, str) and path[: depth + 1] == ("dataset",):
        child = node[key] = {"builtin": child}
    elif isinstance(child, str) and path[0] == "methods" and depth == 1:
        child = node[key] = {child: {}}
    return child


def _position(items: list[Any], part: str | int) -> int:
    if isinstance(part, int) and part < len(items):
        return part
    if isinstance(part, str):
        names = [
            i if isinstance(i, str) else next(iter(i), "")
            for i in items
            if isinstance(i, (str, dict))
        ]
        if part in names:
            raise _Refused(f'items are numbered; write {names.index(part)} for "{part}"')
        hint = nearest(part, [str(n) for n in names])
        raise _Refused(f'"{part}" is no position; the list has positions 0..{len(items) - 1}{hint}')
    raise _Refused(f"no item {part}; the list has {len(items)}, counted from 0")


def _no_inside(path: Path, node: Any) -> str:
    return f"{dotted(path)} is {shown(node)}, which has no keys"


def _shortened(option: str) -> str:
    """The option as messages show it; masked before it is cut, so that no token slips through."""
    text = mask(option)
    return text if len(text) <= 80 else text[:77] + "..."
