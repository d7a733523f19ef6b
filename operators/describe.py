"""A method as planning sees it; imports the method, and torch with it."""

from dataclasses import asdict
from typing import Any

import methods
from operators.errors import ConfigError


def method(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Resolved hyper-parameters and card of a method, and what is wrong with the request.

    Returns:
        `{"hyperparameters": ..., "card": ...}`, empty when there are problems, and the problems
        as (key path below the spec's entry, sentence).
    """
    try:
        built = methods.build(name, given)
    except methods.HyperparameterError as error:
        return {}, [(f".{name}.{field}", message) for field, message in error.problems]
    except ValueError as error:
        return {}, [("", str(error))]
    chosen = {field.name: getattr(built, field.name) for field in methods.fields(name)}
    return {"hyperparameters": chosen, "card": asdict(type(built).card)}, []


def cards() -> dict[str, dict[str, Any]]:
    """The card of every method, by name."""
    return {name: asdict(methods.load(name).card) for name in methods.METHODS}


def card(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Card and hyper-parameters of a method.

    Raises:
        ConfigError: no method of this name.
    """
    try:
        return asdict(methods.load(name).card), [asdict(field) for field in methods.fields(name)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
