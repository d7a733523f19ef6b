"""Methods as plain PyTorch on tensors. One method, one class, one line in `METHODS`.

Importing this package does not import torch; `load` does.
"""

from graftwork.methods.contracts.hyperparameters import Field, HyperparameterError
from graftwork.methods.contracts.registry import Registry

__all__ = ["METHODS", "PARTS", "Field", "HyperparameterError", "build", "fields", "load"]

METHODS: dict[str, str] = {
    "simplecil": "graftwork.methods.representations.simplecil:SimpleCIL",
    "slda": "graftwork.methods.representations.slda:SLDA",
    "fecam": "graftwork.methods.representations.fecam:FeCAM",
    "acil": "graftwork.methods.representations.acil:ACIL",
    "ranpac": "graftwork.methods.representations.ranpac:RanPAC",
    "joint_linear": "graftwork.methods.representations.joint_linear:JointLinear",
    "aper_finetune": "graftwork.methods.representations.aper:AperFinetune",
    "aper_vpt_shallow": "graftwork.methods.representations.aper:AperVPTShallow",
    "aper_vpt_deep": "graftwork.methods.representations.aper:AperVPTDeep",
    "aper_ssf": "graftwork.methods.representations.aper:AperSSF",
    "aper_adapter": "graftwork.methods.representations.aper:AperAdapter",
    "finetune": "graftwork.methods.baselines.finetune:Finetune",
    "vpt_shallow": "graftwork.methods.prompts.vpt:VPTShallow",
    "vpt_deep": "graftwork.methods.prompts.vpt:VPTDeep",
    "l2p": "graftwork.methods.prompts.l2p:L2P",
    "dualprompt": "graftwork.methods.prompts.dualprompt:DualPrompt",
    "lora": "graftwork.methods.baselines.lora:LoRA",
    "slca": "graftwork.methods.representations.slca:SLCA",
    "joint": "graftwork.methods.baselines.joint:Joint",
    "ease": "graftwork.methods.representations.ease:EASE",
    "coda_prompt": "graftwork.methods.prompts.coda_prompt:CodaPrompt",
    "dap": "graftwork.methods.prompts.dap:DAP",
    "s_prompts": "graftwork.methods.prompts.s_prompts:SPrompts",
    "hide_prompt": "graftwork.methods.prompts.hide_prompt:HiDePrompt",
    "bitfit": "graftwork.methods.baselines.bitfit:BitFit",
    "lae": "graftwork.methods.mixtures.lae:LAE",
    "coma": "graftwork.methods.mixtures.coma:CoMA",
    "cofima": "graftwork.methods.mixtures.cofima:CoFiMA",
    "esn": "graftwork.methods.mixtures.esn:ESN",
    "magmax": "graftwork.methods.mixtures.magmax:MagMax",
    "magmax_independent": "graftwork.methods.mixtures.magmax_independent:MagMaxIndependent",
    "zs_clip": "graftwork.methods.baselines.zs_clip:ZeroShotCLIP",
    "coop": "graftwork.methods.prompts.coop:CoOp",
    "zscl": "graftwork.methods.mixtures.zscl:ZSCL",
    "proof": "graftwork.methods.mixtures.proof:PROOF",
    "promptfusion": "graftwork.methods.mixtures.promptfusion:PromptFusion",
}

PARTS: dict[str, str] = {
    "first_session": "graftwork.methods.parts.first_session:FirstSession",
    "promptfusion_clip": "graftwork.methods.mixtures.promptfusion_clip:Stabiliser",
    "promptfusion_joint": "graftwork.methods.mixtures.promptfusion_joint:Joint",
    "promptfusion_vit": "graftwork.methods.mixtures.promptfusion_vit:Booster",
}
"""What methods are made of and nobody runs alone; found by name like a method."""

_registry = Registry("method", METHODS, PARTS)
load, build, fields = _registry.load, _registry.build, _registry.fields
