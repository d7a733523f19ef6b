"""Methods built from the descriptions that keys hold."""

from typing import Any

from graftwork import methods
from graftwork.methods.contracts.fitted import Fitted
from graftwork.methods.contracts.trained import Trained


def fitted(method: dict[str, Any]) -> Fitted:
    """The method of a key's description `{name, version, hyperparameters}`."""
    return methods.build(method["name"], method["hyperparameters"])


def trained(method: dict[str, Any]) -> Trained:
    """The method of a key's description `{name, version, hyperparameters}`."""
    return methods.build(method["name"], method["hyperparameters"])  # type: ignore[return-value]
