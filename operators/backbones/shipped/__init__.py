"""Small backbones that ship with the package.

Importing this module registers them with timm, after which
``timm.create_model("vit_micro_patch4_32", num_classes=0)`` builds the architecture. The weights
lie next to this file; see ``README.md`` there for where they come from.
"""

from pathlib import Path
from typing import Any, Final

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

__all__ = ["VIT_MICRO", "VIT_MICRO_WEIGHTS"]

VIT_MICRO: Final = "vit_micro_patch4_32"
VIT_MICRO_WEIGHTS: Final = Path(__file__).with_name(f"{VIT_MICRO}.safetensors")

default_cfgs = generate_default_cfgs(
    {
        VIT_MICRO: {
            # No url or hub id on purpose: the weights are a file of this package, never a download.
            "file": str(VIT_MICRO_WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a 5-block ViT of width 192 for 32x32 images (64 patches and a class token)."""
    # Width and head size equal ViT-Ti's, so that its first blocks can initialise this model.
    args: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 5,
        "num_heads": 3,
        "num_classes": 0,
    }
    return build_model_with_cfg(VisionTransformer, VIT_MICRO, pretrained, **{**args, **kwargs})
