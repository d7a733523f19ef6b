"""Ensembles: rules that combine the scores of several models, image by image.

Importing this package does not import torch; `load` does.
"""

from graftwork.methods.contracts.registry import Registry

__all__ = ["RULES", "build", "fields", "load"]

RULES: dict[str, str] = {
    "mean_logit": "graftwork.operators.ensembling.rules:MeanLogit",
    "mean_prob": "graftwork.operators.ensembling.rules:MeanProb",
    "max_logit": "graftwork.operators.ensembling.rules:MaxLogit",
    "max_prob": "graftwork.operators.ensembling.rules:MaxProb",
    "vote": "graftwork.operators.ensembling.rules:Vote",
    "energy_route": "graftwork.operators.ensembling.rules:EnergyRoute",
}

_registry = Registry("ensemble", RULES)
load, build, fields = _registry.load, _registry.build, _registry.fields
