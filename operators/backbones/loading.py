"""Backbones with their weights, loaded strictly: timm models, and CLIPs of open_clip.

Shapes: B batch, N tokens, D width.
"""

import difflib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from graftwork.methods.networks import network as networks
from graftwork.methods.networks.clip import Clip
from graftwork.operators.backbones import clip, shipped
from graftwork.operators.backbones.weights import (
    _check_names,
    fingerprint,
    load_timm,
    read_weights,
    tower_fingerprints,
)
from graftwork.operators.errors import ChangedWeights, ConfigError, IncompatibleError

assert shipped  # registers the models that this package ships

HUB_SECONDS = 5.0
"""Seconds that the hub gets to tell where weights are."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """The precision of a forward pass, to be entered around every one, and around no backward pass.

    Args:
        device: "cpu" or "cuda".
        precision: a key of `PRECISIONS`; fp32 changes nothing.
    """
    dtype = PRECISIONS[precision]
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def load(model: str, weights: str, pooling: str, image_size: int | None = None) -> nn.Module:
    """Creates a timm model without classifier, or a CLIP; in eval mode, its parameters frozen.

    Args:
        model: timm name with its tag, or `open_clip:` and a name of open_clip.
        weights: path or URL of safetensors or of a `.pth` that holds tensors only; "random" for
            an initialisation from seed 0; "" for the weights that timm's tag names.
        pooling: "token", "avg" or "map", checked against the model.
        image_size: pixels of the square that a ViT shall see, if not its own: its position
            embeddings are resampled, as timm does it.

    Raises:
        ConfigError: unknown model, or its pretrained weights are not to be had.
        IncompatibleError: the weights do not fit the model, it pools in another way, or it cannot
            be had in this size.
    """
    if model.startswith(clip.PREFIX):
        return _load_clip(model, weights, pooling, image_size)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), 1)
        hint = f'; did you mean "{near[0]}"?' if near else "; timm.list_models() names all"
        raise ConfigError(f'unknown timm model "{model}"{hint}', key="backbone.model")
    if weights == "":
        _check_hub(model)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            network = timm.create_model(model, pretrained=weights == "", num_classes=0, **size)
        except (TypeError, AssertionError) as error:
            if image_size is None:
                raise
            raise IncompatibleError(
                f"{model} cannot be had for images of {image_size} pixels",
                key="backbone.image_size",
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            _check_tag(model)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConfigError(
                f"cannot be created: {reason[:200]}",
                key="backbone.model",
                value=model,
                advice="give a file of its weights",
            ) from error
    if weights not in ("", "random"):
        network = load_timm(network, read_weights(weights), model, weights, size)
    check_pooling(network, model, pooling)
    return network.eval().requires_grad_(False)


def _load_clip(model: str, weights: str, pooling: str, image_size: int | None) -> Clip:
    if weights == "":
        raise ConfigError(
            f"missing; {model} needs a file, or random, since nothing is downloaded",
            key="backbone.weights",
        )
    if pooling != "token":
        raise IncompatibleError(
            f"CLIP pools as it was trained; leave it out, got {pooling}", key="features.pooling"
        )
    network = clip.build(model, image_size)
    if weights != "random":
        state = clip.state_for(network, read_weights(weights), model, weights)
        _check_names(network, state, model, weights)
        network.load_state_dict(state, strict=True)
    return network


def _check_tag(model: str) -> None:
    """Raises ConfigError, with the tags that there are, if timm has no such tag."""
    name, _, tag = model.partition(".")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in known:
        near = difflib.get_close_matches(tag, known, 1)
        hint = (
            f'did you mean "{name}.{near[0]}"?' if near else f"tags: {', '.join(known) or 'none'}"
        )
        raise ConfigError(
            f'{name} has no weights with the tag "{tag}"; {hint}', key="backbone.model"
        )


def _check_hub(model: str) -> None:
    """Looks once whether weights that are not cached can be had; timm's way takes a minute.

    Raises:
        ConfigError: timm has no weights for the model, or the hub cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError

    config = timm.get_pretrained_cfg(model)
    if config is None or not (config.url or config.file or config.hf_hub_id):
        raise ConfigError(
            f"timm has no pretrained weights for {model}",
            key="backbone.weights",
            advice="give a file, or random",
        )
    if config.file or not config.hf_hub_id:
        return
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename, "model.safetensors", "open_clip_model.safetensors")
    names = [name for name in (*names, "pytorch_model.bin", "open_clip_pytorch_model.bin") if name]
    if any(
        isinstance(hub.try_to_load_from_cache(repository, name, revision=revision or None), str)
        for name in names
    ):
        return
    try:
        place = hub.hf_hub_url(repository, names[0], revision=revision or None)
        hub.get_hf_file_metadata(place, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return  # it answers; timm knows other names to ask for
    except Exception as error:  # the client's library has exceptions of its own
        raise ConfigError(
            f"weights of {model} are not cached and the hub is unreachable "
            f"({' '.join(str(error).split())[:120]})",
            key="backbone.weights",
            advice="give a file",
        ) from error


def load_on_device(
    model: str,
    weights: str,
    pooling: str,
    fingerprint_: str,
    device: str,
    image_size: int | None = None,
) -> nn.Module:
    """Calls `load` once per process; checks that the weights still are what was planned.

    Args:
        fingerprint_: of the whole network, or of the tower of a CLIP that is wanted.

    Raises:
        ChangedWeights: the weights changed since the plan was made.
    """
    if device.startswith("cuda"):
        # fp32 is fp32: by default cuDNN computes convolutions, so the patches, in TF32.
        torch.backends.cudnn.allow_tf32 = False
    network, known = _kept(model, weights, pooling, device, image_size)
    if fingerprint_ not in known:  # the file may have changed since this process read it
        _kept.cache_clear()
        network, known = _kept(model, weights, pooling, device, image_size)
    _check_fingerprint(model, fingerprint_, known)
    return network


def load_apart(
    model: str, weights: str, pooling: str, fingerprint_: str, image_size: int | None = None
) -> nn.Module:
    """Loads as `load_on_device` does, on the CPU and for the caller alone: nothing is kept.

    Raises:
        ChangedWeights: the weights changed since the plan was made.
    """
    network = load(model, weights, pooling, image_size)
    _check_fingerprint(model, fingerprint_, _fingerprints(network))
    return network


@lru_cache(maxsize=2)
def _kept(
    model: str, weights: str, pooling: str, device: str, image_size: int | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A network on its device, and its fingerprints."""
    network = load(model, weights, pooling, image_size)
    known = _fingerprints(network)
    return network.to(device), known


def _fingerprints(network: nn.Module) -> tuple[str, ...]:
    return fingerprint(network), *tower_fingerprints(network)


def _check_fingerprint(model: str, wanted: str, known: tuple[str, ...]) -> None:
    if wanted not in known:
        raise ChangedWeights(model, wanted, known[0])


def check_pooling(network: nn.Module, model: str, pooling: str) -> None:
    """Refuses a pooling that is not the network's, where it has no other meaning either.

    Raises:
        IncompatibleError: with the pooling to ask for instead.
    """
    own = own_pooling(network)
    # The mean of tokens is known of every network; of the others each has one.
    if pooling == "avg" or pooling == own:
        return
    other = own if own in ("token", "map") else "avg"
    without = pooling == "token" and not getattr(network, "num_prefix_tokens", 0)
    what = "has no class token" if without else f"pools {own or 'in its own way'}"
    raise IncompatibleError(
        f"{model} {what}; set features.pooling: {other}", key="features.pooling", value=pooling
    )


def data_config(network: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """timm's own preprocessing of the model, or CLIP's, as JSON values."""
    if isinstance(network, Clip):
        return clip.data_config(network)
    config = resolve_model_data_config(network)
    fixed = network.pretrained_cfg.get("fixed_input_size", False)  # type: ignore[union-attr]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    if image_size is not None:
        plain["input_size"] = [3, image_size, image_size]
    return plain | {"fixed_input_size": bool(fixed)}


def embedder(network: nn.Module, pooling: str) -> Callable[[Tensor], Tensor]:
    """Features [B, D] of normalised images: `pooled_features` of a network."""
    return partial(pooled_features, network, pooling=pooling)


def pooled_features(network: nn.Module, images: Tensor, pooling: str) -> Tensor:
    """Features [B, D]: the network's own pooling, which "token" is, or the mean of patch tokens.

    Args:
        images: [B, 3, height, width], normalised.
        pooling: "avg" is the mean of all tokens but class and register tokens, after the final
            norm, of a network that pools otherwise; for one without such tokens its own pooling.

    Raises:
        IncompatibleError: the mean of tokens is asked for where they cannot be told apart.
    """
    if isinstance(network, Clip):
        return networks.feature(network, images)
    tokens = network.forward_features(images)  # type: ignore[operator]
    own = own_pooling(network)
    if pooling == own or not _has_tokens(network, tokens):
        if pooling != own and own in ("token", "map"):
            raise IncompatibleError(
                f"{type(network).__name__} has no tokens to take a mean of; "
                f"set features.pooling: {own}",
                key="features.pooling",
                value=pooling,
            )
        return network.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    return tokens[:, network.num_prefix_tokens :].mean(dim=1)  # type: ignore[index]


def own_pooling(network: nn.Module) -> str:
    """Pooling of a network as timm calls it; empty where that is no word of a transformer's."""
    own = getattr(network, "global_pool", "")
    return own if isinstance(own, str) else ""


def _has_tokens(network: nn.Module, tokens: Any) -> bool:
    """Tells whether these are tokens [B, N, D] with a known number of class and register tokens."""
    known = hasattr(network, "num_prefix_tokens")
    return known and isinstance(tokens, Tensor) and tokens.ndim == 3
