"""Tables of what a spec may name: classes of hyper-parameters, imported when they are used."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwork.methods.contracts import hyperparameters
from graftwork.methods.contracts.hyperparameters import Field


@dataclass(frozen=True)
class Registry:
    """A table of names; importing one does not import torch, `load` does.

    Args:
        kind: what the names are names of, for messages.
        places: name -> `module:attribute` of a frozen dataclass.
        parts: further ones, which nobody is offered.
    """

    kind: str
    places: Mapping[str, str]
    parts: Mapping[str, str] = field(default_factory=dict)

    def load(self, name: str) -> type[Any]:
        """The class of a name.

        Raises:
            ValueError: unknown name.
        """
        place = self.places.get(name) or self.parts.get(name)
        if place is None:
            hint = hyperparameters.nearest(name, self.places)
            names = ", ".join(self.places)
            raise ValueError(f"{self.kind}: must be one of {names}{hint}, got {name!r}")
        module, _, attribute = place.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def build(self, name: str, values: Mapping[str, Any]) -> Any:
        """Builds the value of a name, with some hyper-parameters given and the others at defaults.

        Args:
            values: plain values; an int is accepted where a float belongs.

        Raises:
            ValueError: unknown name.
            HyperparameterError: unknown fields, wrong types, values out of range; all at once.
        """
        return hyperparameters.build(self.load(name), name, values)

    def fields(self, name: str) -> list[Field]:
        """The hyper-parameters of a name: name, type, default and meaning.

        Raises:
            ValueError: unknown name.
        """
        return hyperparameters.describe(self.load(name))
