"""The learned tokens of Visual Prompt Tuning, https://arxiv.org/abs/2203.12119.

Shapes: B batch, L prompt length, D width, R blocks with tokens of their own.
"""

import math
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks.vit import forward_tokens, read_out

PromptDepth = Literal["shallow", "deep"]
PromptInit = Literal["uniform", "zeros"]


class PromptTokens(nn.Module):
    """Tokens that a ViT sees beside its own; they have no position.

    Shallow tokens enter before the first block and travel through all of them. Deep tokens are
    new in every block: what a block wrote in their place is dropped.

    Args:
        vit: which they are for; it is not kept.
        length: L.
        depth: shallow or deep.
        init: uniform as published. Zeros are LAMDA-PILOT's: tokens that start equal get equal
            gradients, so that all L stay copies of one.
    """

    def __init__(
        self, vit: VisionTransformer, length: int, depth: PromptDepth, init: PromptInit = "uniform"
    ) -> None:
        super().__init__()
        self.depth: PromptDepth = depth
        rows = len(vit.blocks) if depth == "deep" else 1
        self.tokens = nn.Parameter(torch.zeros(rows, length, vit.embed_dim))
        if init == "uniform":
            bound = uniform_bound(vit)
            nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, vit: VisionTransformer, images: Tensor) -> Tensor:
        """Feature [B, D] of images [B, 3, h, w]."""
        if self.depth == "deep":
            deep = [own[None] for own in self.tokens]
            return read_out(vit, forward_tokens(vit, images, deep_prompts=deep))
        tokens = forward_tokens(vit, images, prompt=self.tokens)
        return read_out(vit, without_prompt(vit, tokens, self.tokens.shape[1]))


def without_prompt(vit: VisionTransformer, tokens: Tensor, length: int) -> Tensor:
    """Tokens [B, N, D] of [B, N + L, D], as `read_out` of a ViT without class token needs them."""
    start = vit.num_prefix_tokens
    return torch.cat([tokens[:, :start], tokens[:, start + length :]], dim=1)


def uniform_bound(vit: VisionTransformer) -> float:
    """VPT's bound of the uniform start: Xavier's for a patch of 3 channels; 0.0625 for ViT-B/16."""
    height, width = vit.patch_embed.patch_size
    return math.sqrt(6 / (3 * height * width + vit.embed_dim))
