"""What is learned: plain PyTorch on tensors. One method, one file, one line in `METHODS`.

Importing this package does not import torch; `load` does.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from methods import hyperparameters
from methods.hyperparameters import Field, HyperparameterError

__all__ = ["METHODS", "PARTS", "Field", "HyperparameterError", "build", "fields", "load"]

METHODS: dict[str, str] = {
    "simplecil": "methods.simplecil:SimpleCIL",
    "slda": "methods.slda:SLDA",
    "fecam": "methods.fecam:FeCAM",
    "acil": "methods.acil:ACIL",
    "ranpac": "methods.ranpac:RanPAC",
    "joint_linear": "methods.joint_linear:JointLinear",
    "aper_finetune": "methods.aper_finetune:AperFinetune",
    "aper_vpt_shallow": "methods.aper_vpt_shallow:AperVPTShallow",
    "aper_vpt_deep": "methods.aper_vpt_deep:AperVPTDeep",
    "aper_ssf": "methods.aper_ssf:AperSSF",
    "aper_adapter": "methods.aper_adapter:AperAdapter",
    "finetune": "methods.finetune:Finetune",
    "vpt_shallow": "methods.vpt_shallow:VPTShallow",
    "vpt_deep": "methods.vpt_deep:VPTDeep",
    "l2p": "methods.l2p:L2P",
    "dualprompt": "methods.dualprompt:DualPrompt",
    "lora": "methods.lora:LoRA",
    "slca": "methods.slca:SLCA",
    "joint": "methods.joint:Joint",
    "ease": "methods.ease:EASE",
    "coda_prompt": "methods.coda_prompt:CodaPrompt",
    "dap": "methods.dap:DAP",
    "s_prompts": "methods.s_prompts:SPrompts",
    "hide_prompt": "methods.hide_prompt:HiDePrompt",
    "bitfit": "methods.bitfit:BitFit",
    "lae": "methods.lae:LAE",
    "coma": "methods.coma:CoMA",
    "cofima": "methods.cofima:CoFiMA",
    "esn": "methods.esn:ESN",
    "magmax": "methods.magmax:MagMax",
    "magmax_independent": "methods.magmax_independent:MagMaxIndependent",
    "zs_clip": "methods.zs_clip:ZeroShotCLIP",
    "coop": "methods.coop:CoOp",
    "zscl": "methods.zscl:ZSCL",
    "proof": "methods.proof:PROOF",
    "promptfusion": "methods.promptfusion:PromptFusion",
}

PARTS: dict[str, str] = {
    "first_session": "methods.first_session:FirstSession",
    "promptfusion_clip": "methods.promptfusion_clip:Stabiliser",
    "promptfusion_vit": "methods.promptfusion_vit:Booster",
}
"""What methods are made of and nobody runs alone; found by name like a method."""


def load(name: str) -> type[Any]:
    """The class of a method, of whichever contract; imports its module, hence torch.

    Raises:
        ValueError: no method of this name.
    """
    place = METHODS.get(name) or PARTS.get(name)
    if place is None:
        hint = hyperparameters.nearest(name, METHODS)
        raise ValueError(f"method: must be one of {', '.join(METHODS)}{hint}, got {name!r}")
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(name: str, values: Mapping[str, Any]) -> Any:
    """A method, of whichever contract, with the given hyper-parameters.

    What is not given has the paper's default.

    Args:
        name: a key of `METHODS` or `PARTS`.
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
