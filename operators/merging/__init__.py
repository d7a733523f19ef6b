"""Merging of models: pure functions over named tensors, streamed one tensor at a time.

A merge is a frozen dataclass of hyper-parameters, as a method is; around it stand the functions
that do the arithmetic on tensors. Importing this package does not import torch; `load` does.
"""

from methods.contracts.registry import Registry

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

_registry = Registry("merge", MERGES)
load, build, fields = _registry.load, _registry.build, _registry.fields
