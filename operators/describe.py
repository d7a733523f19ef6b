"""A method as planning sees it; imports the method, and torch with it."""

from dataclasses import asdict
from typing import Any

import methods


def method(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Resolved hyper-parameters and card of a method, and what is wrong with the request.

    Returns:
        `{"hyperparameters": ..., "card": ...}`, empty when there are problems, and the problems
        as (key path below the method, sentence).
    """
    try:
        built = methods.build(name, given)
    except methods.HyperparameterError as error:
        return {}, [(f"{name}.{field}", message) for field, message in error.problems]
    except ValueError as error:
        return {}, [("", str(error))]
    return {"hyperparameters": asdict(built), "card": asdict(type(built).card)}, []
