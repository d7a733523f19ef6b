"""Methods built from what keys hold of them."""

from graftwork import methods
from graftwork.methods.contracts.fitted import Fitted
from graftwork.methods.contracts.fused import Fused
from graftwork.methods.contracts.trained import Trained
from graftwork.operators.parameters.learners import MethodRef


def fitted(method: MethodRef) -> Fitted:
    """The closed-form method of a key."""
    return methods.build(method.name, method.hyperparameters)


def trained(method: MethodRef) -> Trained:
    """The trained method of a key."""
    return methods.build(method.name, method.hyperparameters)  # type: ignore[return-value]


def fused(method: MethodRef) -> Fused:
    """The fused method of a key."""
    return methods.build(method.name, method.hyperparameters)  # type: ignore[return-value]
