"""The pre-trained networks that methods build on: a timm ViT, or a CLIP with two towers.

Shapes: B batch, D width of the features.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks import vit as seams
from graftwork.methods.networks.clip import Clip

Network = VisionTransformer | Clip


def check(network: nn.Module) -> Network:
    """The network, as one that methods can be attached to.

    Raises:
        TypeError: it is neither a CLIP nor a timm ViT with timm's standard blocks.
    """
    return network if isinstance(network, Clip) else seams.check(network)


def feature(network: Network, images: Tensor) -> Tensor:
    """Features [B, D] of normalised images, of the network without anything added."""
    if isinstance(network, Clip):
        return network.image(images)
    return seams.read_out(network, network.forward_features(images))
