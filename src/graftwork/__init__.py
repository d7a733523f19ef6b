"""Continual learning with pre-trained models, as a distributed pipeline of workflow DAGs.

    import graftwork

    spec = graftwork.load_spec("quickstart", "methods=[slda, ranpac]")
    found = graftwork.run(spec, store="graftwork-store")
    for result in found.results:
        print(result.label, result.metrics["a_last"])

Functions: `load_spec`, `plan`, `run`, `results`, `predict`. `METHODS` names the methods, and
`GraftworkError` is the base of all errors that a user can act on. For the author of a method: the
contracts `Fitted`, `Trained`, `Adapted` and `Fused`, what they are made of (`Card`, `Rows`, `Task`,
`Recipe`, `Learner`, `Parts`, `Branches`), and `require` and `HyperparameterError` for the checks of
hyper-parameters; docs/adding.md shows them at work.

Importing this package imports none of its parts, neither torch nor Ray: a name is looked up when it
is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods import METHODS
    from graftwork.methods.contracts.adapted import Adapted, Parts
    from graftwork.methods.contracts.card import Card
    from graftwork.methods.contracts.fitted import Fitted, Rows
    from graftwork.methods.contracts.fused import Branches, Fused
    from graftwork.methods.contracts.hyperparameters import HyperparameterError, require
    from graftwork.methods.contracts.trained import Learner, Recipe, Task, Trained
    from graftwork.operators.errors import GraftworkError
    from graftwork.pipelines.api import load_spec, plan, predict, results, run

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapted",
    "Branches",
    "Card",
    "Fitted",
    "Fused",
    "GraftworkError",
    "HyperparameterError",
    "Learner",
    "Parts",
    "Recipe",
    "Rows",
    "Task",
    "Trained",
    "__version__",
    "load_spec",
    "plan",
    "predict",
    "require",
    "results",
    "run",
]

_PLACES = {
    "methods": ("METHODS",),
    "methods.contracts.adapted": ("Adapted", "Parts"),
    "methods.contracts.card": ("Card",),
    "methods.contracts.fitted": ("Fitted", "Rows"),
    "methods.contracts.fused": ("Branches", "Fused"),
    "methods.contracts.hyperparameters": ("HyperparameterError", "require"),
    "methods.contracts.trained": ("Learner", "Recipe", "Task", "Trained"),
    "operators.errors": ("GraftworkError",),
    "pipelines.api": ("load_spec", "plan", "predict", "results", "run"),
}
"""Module below this package -> what it gives to the package's face."""


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when it is first used."""
    for module, names in _PLACES.items():
        if name in names:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
