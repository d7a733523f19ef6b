"""Parameter-efficient modules that several methods put into a ViT.

Shapes: B batch, N tokens, D width, R bottleneck.
"""

import math

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks.vit import ScaleShift, wrap


class Adapter(nn.Module):
    """AdaptFormer's adapter, https://arxiv.org/abs/2205.13535: scale * up(relu(down(x))).

    It is zero at the start and has no norm: `forward_tokens(adapters=...)` puts it beside norm2 and
    the MLP, on the tokens before the norm.

    Args:
        width: D.
        bottleneck: R.
        dropout: of the hidden units.
        scale: fixed factor of the output.
    """

    def __init__(
        self, width: int, bottleneck: int, *, dropout: float = 0.1, scale: float = 0.1
    ) -> None:
        super().__init__()
        self._dropout, self._scale = dropout, scale
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        """Addend [B, N, D] to the output of a block that `tokens` [B, N, D] are in."""
        hidden = F.dropout(F.relu(self.down(tokens)), self._dropout, self.training)
        return self._scale * self.up(hidden)


def adapters(vit: VisionTransformer, bottleneck: int, dropout: float = 0.1) -> nn.ModuleList:
    """One adapter for every block."""
    return nn.ModuleList(
        Adapter(vit.embed_dim, bottleneck, dropout=dropout) for _ in range(len(vit.blocks))
    )


def scale_and_shift(vit: VisionTransformer, std: float = 0.02) -> None:
    """Puts SSF behind the patch projection, every linear layer and every norm of the ViT.

    Scales start at N(1, std^2) and shifts at N(0, std^2), as the authors have them: not quite the
    untouched backbone.

    Raises:
        ValueError: the ViT lacks one of the layers.
    """

    def site(layer: nn.Module) -> nn.Module:
        width = layer.out_features if isinstance(layer, nn.Linear) else vit.embed_dim
        new = ScaleShift(layer, width)
        nn.init.normal_(new.scale, mean=1.0, std=std)
        nn.init.normal_(new.shift, std=std)
        return new

    # A ViT that is read as a mean of its tokens may have its final norm behind the mean.
    final = "fc_norm" if isinstance(vit.norm, nn.Identity) else "norm"
    for pattern in (
        "patch_embed.norm",
        "blocks.*.norm[12]",
        "blocks.*.attn.qkv",
        "blocks.*.attn.proj",
        "blocks.*.mlp.fc[12]",
        final,
    ):
        wrap(vit, pattern, site)
