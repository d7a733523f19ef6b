"""A look at a network before anything is planned with it: what one image tells.

timm registers networks that give several maps, or none that could be pooled, and widths that are
not those of their features: what comes out is known after an image has gone through.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.methods.networks import network as networks
from graftwork.methods.networks import vit as seams
from graftwork.methods.networks.clip import Clip
from graftwork.operators.backbones import loading
from graftwork.operators.errors import IncompatibleError


@dataclass(frozen=True)
class Examined:
    """Facts about a network that one image tells.

    Args:
        width: D of the pooled features.
        refused: why methods cannot be attached to its blocks; empty if they can.
        natural_pooling: what attached methods read of it.
    """

    width: int
    refused: str
    natural_pooling: str


@torch.no_grad()
def examine(network: nn.Module, model: str, pooling: str, size: Sequence[int]) -> Examined:
    """Sends one image through a network, to learn what it gives before cluster time is spent.

    Args:
        size: [3, height, width] of the image.

    Raises:
        IncompatibleError: it does not give one finite vector for an image.
    """
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    try:
        feature = loading.pooled_features(network, image, pooling)
    except IncompatibleError:
        raise
    except Exception as error:  # whatever a network of another kind raises
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise IncompatibleError(
            f"{model} ({type(network).__name__}) gives no feature of an image: {reason}; "
            "choose another network",
            key="backbone.model",
        ) from error
    shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
    if not isinstance(feature, Tensor) or feature.ndim != 2 or not bool(feature.isfinite().all()):
        raise IncompatibleError(
            f"{model} ({type(network).__name__}) does not give one finite vector for an image, "
            f"but {shape}; choose another network",
            key="backbone.model",
        )
    refused, natural = attachable(network)
    if not refused and not isinstance(network, Clip):
        # What methods read and what is cached are the same, or queries would be of another network.
        read = networks.feature(seams.check(network), image)
        cached = feature if natural == pooling else loading.pooled_features(network, image, natural)
        if not torch.allclose(read, cached, rtol=1e-4, atol=1e-5):
            refused = f"{type(network).__name__} is read as {natural}, and pools in another way"
    return Examined(width=feature.shape[1], refused=refused, natural_pooling=natural)


def attachable(network: nn.Module) -> tuple[str, str]:
    """Reason against attaching methods to a network (empty if none), and what they read of it."""
    if isinstance(network, Clip):
        return "", "token"
    try:
        vit = seams.check(network)
    except TypeError as error:
        return str(error), ""
    natural, own = seams.pooling(vit), loading.own_pooling(vit)
    if natural == "token" and own != "token":
        return f"methods read its class token, which it does not pool ({own})", ""
    return "", natural
