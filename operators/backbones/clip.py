"""open_clip models with their weights: built from local configurations, loaded strictly.

No name is looked up in the network, and no weights are downloaded.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from graftwork.methods.networks.clip import Clip
from graftwork.operators.backbones.names import CLIP as PREFIX
from graftwork.operators.errors import ConfigError, IncompatibleError

_OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Numbers among the tensors of a file that OpenAI published, and nobody else's."""


def build(model: str, image_size: int | None = None) -> Clip:
    """A CLIP of random weights, from seed 0, in eval mode, its parameters frozen.

    Args:
        model: open_clip's name of it, with the prefix.
        image_size: pixels of the square that it shall see, if not its own.

    Raises:
        ConfigError: open_clip is not installed, or has no model of this name.
        IncompatibleError: towers that methods cannot work with.
    """
    config = _config(model)
    custom = config.pop("custom_text", False)
    if "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
        raise IncompatibleError(
            f"{model} has another text tower than CLIP's; take a ViT-B-16, say",
            key="backbone.model",
        )
    import open_clip

    vision = config["vision_cfg"]
    vision["image_size"] = image_size or vision.get("image_size", 224)
    vision["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own: Any = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        try:
            network = Clip(own)
        except TypeError as error:
            raise IncompatibleError(str(error), key="backbone.model", value=model) from error
        if "timm_model_name" in vision:
            own.visual.set_input_size(vision["image_size"])
    return network.eval().requires_grad_(False)


def state_for(network: Clip, state: dict[str, Tensor], model: str, place: str) -> dict[str, Tensor]:
    """The tensors of a file under the names of `Clip`, in float32, at the network's image size.

    Raises:
        IncompatibleError: the file was made with another activation than the model has.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    from_openai = [state.pop(name) for name in _OPENAI if name in state] != []
    _check_activation(model, place, from_openai)
    if hasattr(network.model, "text"):
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    # In half precision small steps of training would be lost.
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    _resample(network.model.visual, state)
    return {f"model.{name}": value for name, value in state.items()}


def data_config(network: Clip) -> dict[str, Any]:
    """CLIP's preprocessing at the network's image size, as timm writes such things."""
    import open_clip

    height, width = network.model.visual.image_size
    return {
        "input_size": [3, height, width],
        "interpolation": "bicubic",
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "fixed_input_size": True,
    }


def _config(model: str) -> dict[str, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            f'{model} needs open_clip: pip install "graftwork[clip]"', key="backbone.model"
        ) from error
    for path in sorted((Path(__file__).parent / "shipped").glob("*.json")):
        if path.stem not in open_clip.list_models():
            open_clip.add_model_config(path)
    name = model.removeprefix(PREFIX)
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f'did you mean "{PREFIX}{near[0]}"?' if near else "open_clip.list_models() names all"
        raise ConfigError(f'unknown open_clip model "{name}"; {hint}', key="backbone.model")
    config = open_clip.get_model_config(name)
    assert config is not None
    return config


def _check_activation(model: str, place: str, from_openai: bool) -> None:
    """Refuses weights of the other GELU, which fit and cost points, where it can be known.

    A file does not say with which activation it was trained. Files as OpenAI published them can be
    recognised; otherwise the names of open_clip's pretrained weights are looked for in the path.
    """
    import open_clip

    config = open_clip.get_model_config(model.removeprefix(PREFIX)) or {}
    quick = bool(config.get("quick_gelu", False))
    base = model.removeprefix(PREFIX).removesuffix("-quickgelu")
    found = {"openai": True} if from_openai else {}
    words = re.sub(r"[^a-z0-9]+", "_", "_".join(Path(place).parts[-2:]).lower())
    for name in (base, f"{base}-quickgelu"):
        for tag in open_clip.list_pretrained_tags_by_model(name):
            if tag.replace("-", "_") in words and not from_openai:
                about = open_clip.get_pretrained_cfg(name, tag)
                found.setdefault(tag, bool(about.get("quick_gelu", False)))
    if found and quick not in found.values():
        other = base if quick else f"{base}-quickgelu"
        raise IncompatibleError(
            f"weights {max(found, key=len)} were trained with "
            f"{'GELU' if quick else 'QuickGELU'}, {model} has the other",
            key="backbone.model",
            advice=f"take {PREFIX}{other}",
        )


def _resample(visual: Any, state: dict[str, Tensor]) -> None:
    """Fits the image tower's position embeddings to its image size, as open_clip and timm do."""
    if hasattr(visual, "trunk"):
        if (table := state.get("visual.trunk.pos_embed")) is not None:
            trunk = visual.trunk
            state["visual.trunk.pos_embed"] = resample_abs_pos_embed(
                table,
                trunk.patch_embed.grid_size,
                num_prefix_tokens=0 if trunk.no_embed_class else trunk.num_prefix_tokens,
            )
    elif "visual.positional_embedding" in state:
        from open_clip.model import resize_pos_embed

        resize_pos_embed(state, _Holder(visual))


class _Holder:
    """The part of a model that open_clip's resampling reads."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
