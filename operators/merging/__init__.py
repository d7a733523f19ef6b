"""Merging of models: pure functions over named tensors, streamed one tensor at a time.

A merge is a frozen dataclass of hyper-parameters, as a method is; around it stand the functions
that do the arithmetic on tensors. Importing this package does not import torch; `load` does.
"""

from graftwork.methods.contracts.registry import Registry

__all__ = ["MERGES", "build", "fields", "load"]

MERGES: dict[str, str] = {
    "mean": "graftwork.operators.merging.means:Mean",
    "ema": "graftwork.operators.merging.means:EMA",
    "swa": "graftwork.operators.merging.means:SWA",
    "wise_ft": "graftwork.operators.merging.means:WiSEFT",
    "slerp": "graftwork.operators.merging.slerp:Slerp",
    "fisher": "graftwork.operators.merging.fisher:Fisher",
    "regmean": "graftwork.operators.merging.regmean:RegMean",
    "task_arithmetic": "graftwork.operators.merging.task_vectors:TaskArithmetic",
    "magmax": "graftwork.operators.merging.task_vectors:MagMax",
    "model_stock": "graftwork.operators.merging.model_stock:ModelStock",
    "ties": "graftwork.operators.merging.ties:Ties",
    "dare": "graftwork.operators.merging.dare:Dare",
}

_registry = Registry("merge", MERGES)
load, build, fields = _registry.load, _registry.build, _registry.fields
