"""Merging of models: pure functions over named tensors, streamed one tensor at a time.

A merge is a frozen dataclass of hyper-parameters, as a method is; around it stand the functions
that do the arithmetic on tensors. Importing this package does not import torch; `load` does.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from methods import hyperparameters
from methods.hyperparameters import Field

__all__ = ["MERGES", "build", "fields", "load"]

MERGES: dict[str, str] = {
    "mean": "operators.merging.means:Mean",
    "ema": "operators.merging.means:EMA",
    "swa": "operators.merging.means:SWA",
    "wise_ft": "operators.merging.means:WiSEFT",
    "slerp": "operators.merging.slerp:Slerp",
    "fisher": "operators.merging.fisher:Fisher",
    "regmean": "operators.merging.regmean:RegMean",
    "task_arithmetic": "operators.merging.task_vectors:TaskArithmetic",
    "magmax": "operators.merging.task_vectors:MagMax",
    "model_stock": "operators.merging.model_stock:ModelStock",
    "ties": "operators.merging.ties:Ties",
    "dare": "operators.merging.dare:Dare",
}


def load(name: str) -> type[Any]:
    """The class of a merge; imports its module, hence torch.

    Raises:
        ValueError: no merge of this name.
    """
    if name not in MERGES:
        hint = hyperparameters.nearest(name, MERGES)
        raise ValueError(f"merge: must be one of {', '.join(MERGES)}{hint}, got {name!r}")
    module, _, attribute = MERGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(name: str, values: Mapping[str, Any]) -> Any:
    """A merge with the given hyper-parameters, the others at their defaults.

    Raises:
        ValueError: no merge of this name.
        HyperparameterError: unknown fields, wrong types, values out of range; all at once.
    """
    return hyperparameters.build(load(name), name, values)


def fields(name: str) -> list[Field]:
    """The hyper-parameters of a merge: name, type, default and meaning.

    Raises:
        ValueError: no merge of this name.
    """
    return hyperparameters.describe(load(name))
