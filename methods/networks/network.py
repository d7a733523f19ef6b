"""The pre-trained networks that methods build on: a timm ViT, a CLIP with two towers, or both.

Shapes: B batch, D width of the features.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks import vit as seams
from graftwork.methods.networks.clip import Clip


class Pair(nn.Module):
    """A CLIP and a ViT that are given the same images.

    Args:
        clip: the CLIP.
        vit: the ViT.
    """

    def __init__(self, clip: Clip, vit: VisionTransformer) -> None:
        super().__init__()
        self.clip = clip
        self.vit = vit

    @property
    def num_features(self) -> int:
        """E, the width of `feature`: that of the CLIP."""
        return self.clip.num_features


Network = VisionTransformer | Clip | Pair


def check(network: nn.Module) -> Network:
    """The network, as one that methods can be attached to.

    Raises:
        TypeError: it is neither a CLIP nor a timm ViT with timm's standard blocks.
    """
    return network if isinstance(network, Clip | Pair) else seams.check(network)


def paired(clip: Network, vit: Network) -> Pair:
    """Both networks as one.

    Raises:
        TypeError: they are no CLIP and no ViT.
    """
    if not isinstance(clip, Clip) or not isinstance(vit, VisionTransformer):
        raise TypeError(
            f"expected a CLIP and a ViT, got {type(clip).__name__}, {type(vit).__name__}"
        )
    return Pair(clip, vit)


def feature(network: Network, images: Tensor) -> Tensor:
    """Features [B, D] of normalised images, of the network without anything added."""
    if isinstance(network, Pair):
        return feature(network.clip, images)
    if isinstance(network, Clip):
        return network.image(images)
    return seams.read_out(network, network.forward_features(images))
