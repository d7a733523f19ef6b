"""A method as planning sees it; imports the method, and torch with it."""

import difflib
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
    if name not in methods.METHODS:
        return {}, [("", _unknown("method", name, list(methods.METHODS)))]
    known = [field.name for field in methods.fields(name)]
    strangers = [
        (f".{name}.{field}", _unknown("hyper-parameter", field, known))
        for field in given
        if field not in known
    ]
    try:
        built = methods.build(name, {k: v for k, v in given.items() if k in known})
    except methods.HyperparameterError as error:
        return {}, strangers + [(f".{name}.{field}", what) for field, what in error.problems]
    if strangers:
        return {}, strangers
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
    if name not in methods.METHODS:
        raise ConfigError(f"methods: {_unknown('method', name, list(methods.METHODS))}")
    return asdict(methods.load(name).card), [asdict(field) for field in methods.fields(name)]


def _unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], known, 1)
    if near:
        return f'unknown {kind} "{name}"; did you mean "{near[0]}"?'
    return f'unknown {kind} "{name}"; known: {", ".join(known) or "none"}'
