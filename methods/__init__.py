"""What is learned: plain PyTorch on tensors. One method, one file, one line in `METHODS`.

Importing this package does not import torch; `load` does.
"""

from methods.contracts.hyperparameters import Field, HyperparameterError
from methods.contracts.registry import Registry

__all__ = ["METHODS", "PARTS", "Field", "HyperparameterError", "build", "fields", "load"]

METHODS: dict[str, str] = {
    "simplecil": "methods.representations.simplecil:SimpleCIL",
    "slda": "methods.representations.slda:SLDA",
    "fecam": "methods.representations.fecam:FeCAM",
    "acil": "methods.representations.acil:ACIL",
    "ranpac": "methods.representations.ranpac:RanPAC",
    "joint_linear": "methods.representations.joint_linear:JointLinear",
    "aper_finetune": "methods.representations.aper_finetune:AperFinetune",
    "aper_vpt_shallow": "methods.representations.aper_vpt_shallow:AperVPTShallow",
    "aper_vpt_deep": "methods.representations.aper_vpt_deep:AperVPTDeep",
    "aper_ssf": "methods.representations.aper_ssf:AperSSF",
    "aper_adapter": "methods.representations.aper_adapter:AperAdapter",
    "finetune": "methods.baselines.finetune:Finetune",
    "vpt_shallow": "methods.prompts.vpt_shallow:VPTShallow",
    "vpt_deep": "methods.prompts.vpt_deep:VPTDeep",
    "l2p": "methods.prompts.l2p:L2P",
    "dualprompt": "methods.prompts.dualprompt:DualPrompt",
    "lora": "methods.baselines.lora:LoRA",
    "slca": "methods.representations.slca:SLCA",
    "joint": "methods.baselines.joint:Joint",
    "ease": "methods.representations.ease:EASE",
    "coda_prompt": "methods.prompts.coda_prompt:CodaPrompt",
    "dap": "methods.prompts.dap:DAP",
    "s_prompts": "methods.prompts.s_prompts:SPrompts",
    "hide_prompt": "methods.prompts.hide_prompt:HiDePrompt",
    "bitfit": "methods.baselines.bitfit:BitFit",
    "lae": "methods.mixtures.lae:LAE",
    "coma": "methods.mixtures.coma:CoMA",
    "cofima": "methods.mixtures.cofima:CoFiMA",
    "esn": "methods.mixtures.esn:ESN",
    "magmax": "methods.mixtures.magmax:MagMax",
    "magmax_independent": "methods.mixtures.magmax_independent:MagMaxIndependent",
    "zs_clip": "methods.baselines.zs_clip:ZeroShotCLIP",
    "coop": "methods.prompts.coop:CoOp",
    "zscl": "methods.mixtures.zscl:ZSCL",
    "proof": "methods.mixtures.proof:PROOF",
    "promptfusion": "methods.mixtures.promptfusion:PromptFusion",
}

PARTS: dict[str, str] = {
    "first_session": "methods.parts.first_session:FirstSession",
    "promptfusion_clip": "methods.mixtures.promptfusion_clip:Stabiliser",
    "promptfusion_vit": "methods.mixtures.promptfusion_vit:Booster",
}
"""What methods are made of and nobody runs alone; found by name like a method."""

_registry = Registry("method", METHODS, PARTS)
load, build, fields = _registry.load, _registry.build, _registry.fields
