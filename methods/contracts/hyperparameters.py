"""Hyper-parameters of a method: strict building from plain values, and what each field means.

A method is a frozen keyword-only dataclass; its fields are the hyper-parameters, among them those
of the dataclasses that it includes. This module does not import torch.
"""

import difflib
import inspect
import math
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

LATER = {"later": True}
"""Metadata of a field that came after results were stored. At its default it means what was done
before, and is in no key."""


class HyperparameterError(ValueError):
    """Values that a method refuses, all of them at once.

    Args:
        problems: (field, message) pairs; a message reads `must be ..., got <value>`.

    Example:
        >>> build("ranpac", {"projection_dim": -1})
        Traceback (most recent call last):
        HyperparameterError: projection_dim: must be ...
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(f"{field}: {message}" for field, message in self.problems)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One hyper-parameter, for people.

    Args:
        name: the field's name.
        type: `int`, `float`, `bool`, `str`, or the allowed values joined by ` | `; with ` | null`
            if it may be None.
        default: its value when nothing is given.
        doc: what it does, from the Args section of the class that declares or explains it.
    """

    name: str
    type: str
    default: Any
    doc: str


def require(owner: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse all fields that break their rule, together.

    Args:
        owner: the dataclass instance.
        rules: field -> (kept, what the value must be).

    Raises:
        HyperparameterError: at least one rule is broken.

    Example:
        In `__post_init__` of a method's dataclass, where `self` is the owner:

        >>> from types import SimpleNamespace
        >>> graftwork.require(SimpleNamespace(lr=0.0), {"lr": (False, "above 0")})
        Traceback (most recent call last):
        HyperparameterError: lr: must be above 0, got 0.0
    """
    problems = [
        (name, f"must be {what}, got {getattr(owner, name)!r}")
        for name, (kept, what) in rules.items()
        if not kept
    ]
    if problems:
        raise HyperparameterError(problems)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing if no known name is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def build(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """An instance of a method's class from plain values, as read from a file or a command line.

    Raises:
        HyperparameterError: unknown fields, wrong types, numbers that are not finite, values out
            of range; all problems at once.
    """
    types = {field.name: get_type_hints(cls)[field.name] for field in dataclass_fields(cls)}
    accepted: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for field, value in values.items():
        if field not in types:
            hint = nearest(str(field), types)
            problems.append((str(field), f"must be a field of {name}{hint}, got {value!r}"))
            continue
        try:
            accepted[field] = _accept(types[field], value)
        except ValueError as error:
            problems.append((field, f"must be {error}, got {value!r}"))
    try:
        instance = cls(**accepted)
    except HyperparameterError as error:
        raise HyperparameterError(problems + error.problems) from None
    if problems:
        raise HyperparameterError(problems)
    return instance


def resolved(method: Any) -> dict[str, Any]:
    """Hyper-parameters as keys hold them: all of them, but for `LATER` ones at their default."""
    return {
        field.name: value
        for field in dataclass_fields(method)
        if (value := getattr(method, field.name)) != field.default
        or not field.metadata.get("later")
    }


def describe(cls: type) -> list[Field]:
    """The fields of a method's class, in their order."""
    types, docs = get_type_hints(cls), _argument_docs(cls)
    return [
        Field(
            name=field.name,
            type=_type_name(types[field.name]),
            default=None if field.default is MISSING else field.default,
            doc=docs.get(field.name, ""),
        )
        for field in dataclass_fields(cls)
    ]


def _accept(kind: Any, value: Any) -> Any:
    """The value as the field's type.

    Raises:
        ValueError: its message says what the value must be.
    """
    if isinstance(kind, types.UnionType):
        [inner] = [each for each in get_args(kind) if each is not types.NoneType]
        return None if value is None else _accept(inner, value)
    if get_origin(kind) is Literal:
        # `1 == True == 1.0`: compare types as well.
        if any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
            return value
        raise ValueError("one of " + ", ".join(map(str, get_args(kind))))
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    words = {int: "an integer", bool: "true or false", str: "a string"}
    # A bool is an int to isinstance, hence the exact type.
    if type(value) is not kind:
        raise ValueError(words[kind])
    return value


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        named = (_type_name(each) for each in get_args(kind) if each is not types.NoneType)
        return " | ".join([*named, "null"])
    return " | ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else kind.__name__


def _argument_docs(cls: type) -> dict[str, str]:
    """Field -> text, from the Args sections of a class and its bases; the nearest one counts."""
    names = {field.name for field in dataclass_fields(cls)}
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _args_section(inspect.cleandoc(base.__doc__ or ""), names)
    return docs


def _args_section(text: str, names: Collection[str]) -> dict[str, str]:
    """Name -> text of those of some names that the Args section of a docstring explains."""
    docs: dict[str, str] = {}
    inside, current = False, None
    for line in text.splitlines():
        if not line.startswith(" "):
            inside, current = line == "Args:" or (inside and not line), None
            continue
        name, colon, text = line.strip().partition(":")
        if inside and colon and name in names and line.startswith("    " + name):
            current, docs[name] = name, text.strip()
        elif inside and current is not None:
            docs[current] += " " + line.strip()
    return docs
