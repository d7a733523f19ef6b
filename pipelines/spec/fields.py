"""Kinds of values in a spec: each checks itself, and says in words what it accepts.

A `Rule` stands in `Annotated[type, rule]` and takes the place of pydantic's own check, because a
message such as "must be an integer in 1..100000, got -1" needs both bounds and the value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from graftwork.operators.errors import ConfigError
from graftwork.operators.files import urls
from graftwork.operators.names import normal
from graftwork.pipelines.spec.problems import nearest, shown
from graftwork.pipelines.spec.yaml_source import Path, scalar


def refuse(message: str, at: Path = ()) -> PydanticCustomError:
    """A problem with the value being checked.

    Args:
        message: what is wrong; what to do.
        at: path from that value to the part the message is about.
    """
    return PydanticCustomError("spec", "{message}", {"message": message, "at": at})


class Section(BaseModel):
    """Base of all sections of a spec: values stay as they are, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Rule:
    """Check of one value.

    Args:
        check: returns the value to keep, or raises `refuse(...)`.
        says: what is accepted, for the reference page.
    """

    check: Callable[[Any], Any]
    says: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)


@dataclass(frozen=True)
class Before:
    """Change of shape before the value's own checks, for shorthands.

    Args:
        change: returns the full form, or raises `refuse(...)`.
        says: what is accepted, for the reference page.
    """

    change: Callable[[Any], Any]
    says: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.change, handler(source))


def integer(low: int, high: int) -> Rule:
    """A whole number in low..high; number-like text counts, booleans and fractions do not."""
    says = f"integer in {low}..{high}"

    def check(value: Any) -> int:
        number = _number(value)
        if not isinstance(number, int) or not low <= number <= high:
            raise refuse(f"must be an {says}, got {shown(value)}")
        return number

    return Rule(check, says)


def real(low: float, high: float, whole_above_one: bool = False) -> Rule:
    """A finite number in low..high; `whole_above_one` as Ray wants its resources."""
    says = f"number in {low:g}..{high:g}"

    def check(value: Any) -> float:
        number = _number(value)
        if number is None or not math.isfinite(number) or not low <= number <= high:
            raise refuse(f"must be a {says}, got {shown(value)}")
        if whole_above_one and number > 1 and number != int(number):
            raise refuse(f"must be a whole number above 1, got {shown(value)}")
        return number

    return Rule(check, says)


def _number(value: Any) -> int | float | None:
    """The value as a number, None where it is none."""
    number = scalar(value.strip()) if isinstance(value, str) else value
    return number if isinstance(number, (int, float)) and not isinstance(number, bool) else None


FILE_NAME = 240
"""Bytes of a name that files are named after: systems allow 255, an ending included."""


def text(longest: int = 200, forbidden: str = "") -> Rule:
    """Text of 1..longest characters without control characters and `forbidden` ones."""
    says = f"text of 1..{longest} characters" + (f" without {forbidden}" if forbidden else "")

    def check(value: Any) -> str:
        if not isinstance(value, str):
            hint = "" if isinstance(value, (dict, list, type(None))) else "; put it in quotes"
            raise refuse(f"must be text, got {shown(value)}{hint}")
        if not 1 <= len(value.strip()) <= longest:
            raise refuse(f"must be {says}, got {len(value)} characters")
        for character in forbidden:
            if character in value:
                raise refuse(f'must not hold "{character}", got {shown(value)}')
        return value

    return Rule(check, says)


def name_of_files(longest: int = 100) -> Rule:
    """Text that can be the name of a folder or, with an ending, of a file on every system."""
    plain = text(longest, forbidden="/")
    says = f"{plain.says}, at most {FILE_NAME} bytes"

    def check(value: Any) -> str:
        value = plain.check(value)
        if (size := len(value.encode())) > FILE_NAME:
            raise refuse(
                f"must have at most {FILE_NAME} bytes in UTF-8, as files are named after it, got "
                f"{size} of {len(value)} characters"
            )
        if value in (".", ".."):
            raise refuse(f"must be the name of a folder, got {shown(value)}")
        return value

    return Rule(check, says)


def naming(longest: int = 200, forbidden: str = "") -> Rule:
    """Text that names a class, a domain or a task: kept in the one form that names have."""
    rule = text(longest, forbidden)
    return Rule(lambda value: normal(rule.check(value)), rule.says)


def choice(words: Sequence[str]) -> Rule:
    """One of a few words."""
    says = "one of " + ", ".join(words)

    def check(value: Any) -> str:
        if isinstance(value, str) and value in words:
            return value
        hint = nearest(value, words) if isinstance(value, str) else ""
        hint = hint if "did you mean" in hint else ""
        raise refuse(f"must be {says}, got {shown(value)}{hint}")

    return Rule(check, says)


def flag() -> Rule:
    """True or false, not a word that looks like it."""

    def check(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise refuse(f"must be true or false, got {shown(value)}")

    return Rule(check, "true or false")


def location(words: Sequence[str] = ()) -> Rule:
    """A path or URL that `operators.files.urls.check` accepts, or one of a few words."""
    says = "path or URL" + "".join(f', or "{word}"' for word in words)

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise refuse(f"must be a path or URL, got {shown(value)}")
        if len(value) > 4096:
            raise refuse(f"must be a path of at most 4096 characters, got {len(value)}")
        try:
            return value if value in words else urls.check(value)
        except ConfigError as error:
            raise refuse(str(error)) from error

    return Rule(check, says)


PLACE = location()
"""Check of a place, and the mark of its type."""

Place = Annotated[str, PLACE]
"""Type of every file, folder, glob and URL of a spec; `with_places` finds them by it."""


def optional(rule: Rule) -> Rule:
    """The rule, with null let through."""

    def check(value: Any) -> Any:
        return None if value is None else rule.check(value)

    return Rule(check, f"{rule.says}, or null")


def listing(
    says: str, *, least: int = 1, length: int | None = None, single: bool = False
) -> Before:
    """A list, kept as a tuple.

    Args:
        says: what the items are, in the plural.
        least: smallest number of items.
        length: exact number of items, if there is one.
        single: text that is not a list stands for a list with that one item.
    """
    count = f"{length} " if length else ""
    words = f"list of {count}{says}"

    def change(value: Any) -> tuple[Any, ...]:
        if single and isinstance(value, str):
            return (value,)
        if not isinstance(value, (list, tuple)):
            raise refuse(f"must be a {words}, got {shown(value)}")
        if len(value) < least or (length is not None and len(value) != length):
            raise refuse(f"must be a {words}, got {shown(value)}")
        return tuple(value)

    return Before(change, f"{words}, or one of them" if single else words)


def optionally(change: Before) -> Before:
    """The change of shape, with null let through."""
    return Before(
        lambda value: None if value is None else change.change(value), f"{change.says}, or null"
    )


def no_duplicates(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, if all of them differ."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        name = repr(value)
        if name in first:
            raise refuse(f"same as item {first[name]}; keep one", (index,))
        first[name] = index
    return values


def plain(value: Any) -> Any:
    """Tuples as lists and keys as text, at any depth."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_places(section: AnySection, change: Callable[[str], str]) -> AnySection:
    """The section with every value of type `Place` changed, at any depth.

    Args:
        section: a checked section.
        change: place -> place.
    """
    hints = get_type_hints(type(section), include_extras=True)
    found = {
        name: _with_places(hints[name], getattr(section, name), change)
        for name in type(section).model_fields
    }
    return section.model_copy(update=found)


def _with_places(annotation: Any, value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Section):
        return with_places(value, change)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if PLACE in annotation.__metadata__:
            return change(value)
        return _with_places(arguments[0], value, change)
    if origin in (Union, UnionType):
        # Words first: "builtin" is text, too, but no place.
        known = sorted(arguments, key=lambda alternative: get_origin(alternative) is not Literal)
        fitting = next((alternative for alternative in known if _fits(alternative, value)), Any)
        return _with_places(fitting, value, change)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            arguments = arguments[:1] * len(value)
        pairs = zip(arguments, value, strict=True)
        return tuple(_with_places(item, part, change) for item, part in pairs)
    if origin is list:
        return [_with_places(arguments[0], item, change) for item in value]
    if origin is dict:
        return {key: _with_places(arguments[1], item, change) for key, item in value.items()}
    return value


def _fits(annotation: Any, value: Any) -> bool:
    """Tells whether a value fits an alternative of a union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _fits(get_args(annotation)[0], value)
    if origin in (Union, UnionType):
        return any(_fits(alternative, value) for alternative in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    return annotation is Any or isinstance(value, origin or annotation)
