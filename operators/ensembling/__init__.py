"""Ensembles: rules that combine the scores of several models, image by image.

Importing this package does not import torch; `load` does.
"""

from methods.contracts.registry import Registry

__all__ = ["RULES", "build", "fields", "load"]

RULES: dict[str, str] = {
    "mean_logit": "operators.ensembling.rules:MeanLogit",
    "mean_prob": "operators.ensembling.rules:MeanProb",
    "max_logit": "operators.ensembling.rules:MaxLogit",
    "max_prob": "operators.ensembling.rules:MaxProb",
    "vote": "operators.ensembling.rules:Vote",
    "energy_route": "operators.ensembling.rules:EnergyRoute",
}

_registry = Registry("ensemble", RULES)
load, build, fields = _registry.load, _registry.build, _registry.fields
