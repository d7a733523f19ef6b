"""Ensembles: rules that combine the scores of several models, image by image.

Importing this package does not import torch; `load` does.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from methods import hyperparameters
from methods.hyperparameters import Field

__all__ = ["RULES", "build", "fields", "load"]

RULES: dict[str, str] = {
    "mean_logit": "operators.ensembling.rules:MeanLogit",
    "mean_prob": "operators.ensembling.rules:MeanProb",
    "max_logit": "operators.ensembling.rules:MaxLogit",
    "max_prob": "operators.ensembling.rules:MaxProb",
    "vote": "operators.ensembling.rules:Vote",
    "energy_route": "operators.ensembling.rules:EnergyRoute",
}


def load(name: str) -> type[Any]:
    """The class of a rule; imports its module, hence torch.

    Raises:
        ValueError: no rule of this name.
    """
    if name not in RULES:
        hint = hyperparameters.nearest(name, RULES)
        raise ValueError(f"ensemble: must be one of {', '.join(RULES)}{hint}, got {name!r}")
    module, _, attribute = RULES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(name: str, values: Mapping[str, Any]) -> Any:
    """A rule with the given hyper-parameters, the others at their defaults.

    Raises:
        ValueError: no rule of this name.
        HyperparameterError: unknown fields, wrong types, values out of range; all at once.
    """
    return hyperparameters.build(load(name), name, values)


def fields(name: str) -> list[Field]:
    """The hyper-parameters of a rule: name, type, default and meaning.

    Raises:
        ValueError: no rule of this name.
    """
    return hyperparameters.describe(load(name))
