"""Weights of backbones: reading them safely, loading them strictly, their fingerprints."""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import fsspec
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from graftwork.methods.networks.clip import Clip
from graftwork.operators.errors import ConfigError, IncompatibleError


def read_weights(place: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a `.pth` without any code in it.

    Raises:
        IncompatibleError: missing, truncated, or holds more than tensors.
    """
    try:
        with fsspec.open(place, "rb") as file:
            data = file.read()  # type: ignore[union-attr]
    except FileNotFoundError as error:
        raise ConfigError("not found", key="backbone.weights", value=place) from error
    except IsADirectoryError as error:
        raise ConfigError(
            "is a folder; name a file in it", key="backbone.weights", value=place
        ) from error
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(what, key="backbone.weights", value=place) from error
    # The length that a safetensors file begins with may start with a pickle's first byte.
    if data[:2] == b"PK" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        return _read_pickle(place, data)
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise IncompatibleError(
            f"{_what_is_wrong(data)}; copy the file again", key="backbone.weights", value=place
        ) from error


def _what_is_wrong(data: bytes) -> str:
    """Problem of a file that is no safetensors: its own header has the length it must have."""
    if not data:
        return "empty (0 bytes)"
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = 8 + length + max(ends)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return f"not a safetensors file ({len(data)} bytes)"
    if expected > len(data):
        return f"truncated: its header expects {expected} bytes, the file has {len(data)}"
    return f"damaged safetensors file ({len(data)} bytes)"


def _read_pickle(place: str, data: bytes) -> dict[str, Tensor]:
    try:
        # weights_only is written out: its default can be switched by the environment.
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly everything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"contains code ({code[1]})" if code else "holds code or is damaged"
        raise IncompatibleError(
            f"{what}; convert it to safetensors", key="backbone.weights", value=place
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise IncompatibleError(
            "is not a dictionary of tensors", key="backbone.weights", value=place
        )
    return state


def load_timm(
    network: nn.Module, state: dict[str, Tensor], model: str, place: str, size: dict[str, Any]
) -> nn.Module:
    """The network with these weights, read as they stand or as timm reads other people's files.

    Args:
        network: as timm makes it, without a classifier.
        model: timm's name of it.
        place: of the weights, for people.
        size: `img_size`, where the network shall see other images than its own.

    Raises:
        IncompatibleError: names or shapes differ.
    """
    state = {
        name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in state.items()
    }
    state = _without_classifier(network, state)
    try:
        _load_strictly(network, state, model, place, size.get("img_size"))
    except IncompatibleError:
        if _of_another_size(network, state, size):
            raise
        read = _as_timm_reads(state, model, size)
        if read is None:
            raise
        return read
    return network


def _of_another_size(network: nn.Module, state: dict[str, Tensor], size: dict[str, Any]) -> bool:
    """Tells whether tensors of one name have other sizes, which timm would resample unasked."""
    own = network.state_dict()
    asked = {"pos_embed"} if size else set[str]()
    return any(own[n].numel() != state[n].numel() for n in (own.keys() & state.keys()) - asked)


def _as_timm_reads(state: dict[str, Tensor], model: str, size: dict[str, Any]) -> nn.Module | None:
    """The network after timm's own translation of a file, None if that does not fit either.

    timm translates the names that authors gave, and leaves out what only their training needs: the
    mask token of Meta's DINOv2, for example. It loads strictly, too.
    """
    # The file has no classifier any more. Where it had one, timm would not load strictly.
    overlay = {"state_dict": dict(state), "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(
                model, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **size
            )
        except Exception:  # translations meet tensors that they were not written for
            return None


def _load_strictly(
    network: nn.Module, state: dict[str, Tensor], model: str, place: str, image_size: int | None
) -> None:
    given = dict(state)
    if image_size is not None and (table := given.get("pos_embed")) is not None:
        given["pos_embed"] = resample_abs_pos_embed(
            table.float(),  # a half-precision file would round the result
            network.patch_embed.grid_size,  # type: ignore[union-attr]
            num_prefix_tokens=0 if network.no_embed_class else network.num_prefix_tokens,  # type: ignore[arg-type]
        )
    _check_names(network, given, model, place)
    network.load_state_dict(given, strict=True)


def _without_classifier(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors but those of a classifier, which a frozen backbone does without."""
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = network.state_dict()
    return {
        name: value
        for name, value in state.items()
        if name in own or not any(name.startswith(f"{head}.") for head in heads)
    }


def _check_names(network: nn.Module, given: dict[str, Tensor], model: str, place: str) -> None:
    """Raises IncompatibleError, with what differs, unless names and shapes are the network's."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in given.items()}
    differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if differing:
        shown = "; ".join(
            f"expected {name} {list(expected[name]) if name in expected else 'absent'}, "
            f"file has {list(found[name]) if name in found else 'none'}"
            for name in differing[:5]
        )
        raise IncompatibleError(
            f"{place} does not fit {model} ({len(differing)} differences): {shown}",
            key="backbone.weights",
        )


def fingerprint(network: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> str:
    """sha256 over name, dtype, shape and bytes of the loaded state, in order of names."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not keep(name):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def tower_fingerprints(network: nn.Module) -> tuple[str, ...]:
    """Fingerprints of a CLIP's image and text tower; features of one survive the other's change.

    The scale of the logits belongs to neither. Empty for other networks.
    """
    if not isinstance(network, Clip):
        return ()
    image, scale = "model.visual.", "model.logit_scale"
    return (
        fingerprint(network, lambda name: name.startswith(image)),
        fingerprint(network, lambda name: not name.startswith(image) and name != scale),
    )
