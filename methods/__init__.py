"""What is learned: plain PyTorch on tensors. One method, one file, one line in `METHODS`.

Importing this package does not import torch; `load` does.
"""

from methods.hyperparameters import Field, HyperparameterError
from methods.registry import Registry

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

_registry = Registry("method", METHODS, PARTS)
load, build, fields = _registry.load, _registry.build, _registry.fields
