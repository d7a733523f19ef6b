"""What is learned: plain PyTorch on tensors. One method, one file, one line in `METHODS`.

Importing this package does not import torch; `load` does.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from methods import hyperparameters
from methods.hyperparameters import Field, HyperparameterError

if TYPE_CHECKING:
    from methods.base import Fitted

__all__ = ["METHODS", "Field", "HyperparameterError", "build", "fields", "load"]

METHODS: dict[str, str] = {
    "simplecil": "methods.simplecil:SimpleCIL",
    "slda": "methods.slda:SLDA",
    "fecam": "methods.fecam:FeCAM",
    "acil": "methods.acil:ACIL",
    "ranpac": "methods.ranpac:RanPAC",
    "joint_linear": "methods.joint_linear:JointLinear",
    "finetune": "methods.finetune:Finetune",
}


def load(name: str) -> "type[Fitted]":
    """The class of a method; imports its module, hence torch.

    Raises:
        ValueError: no method of this name.
    """
    if name not in METHODS:
        hint = hyperparameters.nearest(name, METHODS)
        raise ValueError(f"method: must be one of {', '.join(METHODS)}{hint}, got {name!r}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(name: str, values: Mapping[str, Any]) -> "Fitted":
    """A method with the given hyper-parameters; what is not given has the paper's default.

    Args:
        name: a key of `METHODS`.
        values: hyper-parameters as plain values; an int is accepted where a float belongs.

    Raises:
        ValueError: no method of this name.
        HyperparameterError: unknown fields, wrong types, values out of range; all at once.
    """
    return hyperparameters.build(load(name), name, values)


def fields(name: str) -> list[Field]:
    """The hyper-parameters of a method: name, type, default and meaning.

    Raises:
        ValueError: no method of this name.
    """
    return hyperparameters.describe(load(name))
