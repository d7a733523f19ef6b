"""The seams through which methods adapt a timm ViT, so that no method copies one.

A change that depends on the sample or reads the residual stream (prompts, key/value prefixes,
parallel adapters) is an argument of `forward_tokens`. A change to one layer's output (LoRA,
scale and shift) replaces that layer through `wrap`.

Shapes: B batch, N tokens, L prompt length, D width, H heads, K = D / H.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

Prefix = tuple[Tensor, Tensor]
"""Keys and values that a block's attention sees in front of its own, each [B or 1, H, L, K]."""

DeepPrompt = Tensor | Callable[[Tensor], Tensor]
"""Tokens [B or 1, L, D] for one block, or how they are made of the tokens [B, N, D] entering it."""


def check(network: nn.Module) -> VisionTransformer:
    """The network, as one that the seams fit.

    Raises:
        TypeError: it is no timm ViT, or its blocks are not timm's standard pre-norm ones.
    """
    if not isinstance(network, VisionTransformer):
        raise TypeError(f"expected a timm VisionTransformer, got {type(network).__name__}")
    for block in network.blocks:
        _standard(block)
    return network


def forward_tokens(
    vit: VisionTransformer,
    images: Tensor,
    *,
    prompt: Tensor | None = None,
    deep_prompts: Sequence[DeepPrompt | None] | None = None,
    prefixes: Sequence[Prefix | None] | None = None,
    compensate: bool = False,
    projections: Sequence[nn.Module | None] | None = None,
    attention_adapters: Sequence[nn.Module | None] | None = None,
    adapters: Sequence[nn.Module | None] | None = None,
    normalise: bool = True,
) -> Tensor:
    """Runs `vit.forward_features` with what a method adds to it.

    Args:
        images: [B, 3, height, width].
        prompt: [B or 1, L, D], inserted once, after the class and register tokens.
        deep_prompts: per block, or None; appended before the block and dropped after it.
        prefixes: per block, or None for a block without one.
        compensate: attention over each prefix alone, with weight 1, is added to attention over a
            block's own tokens, whose weights stay those beside the prefix.
        projections: per block, a module from norm1's output [B, N, D] to what is added to queries,
            keys and values [B, N, 3 D], or None.
        attention_adapters: per block, a module [B, N, D] -> [B, N, D] parallel to the attention,
            which reads what the attention reads, or None.
        adapters: per block, a module [B, N, D] -> [B, N, D] parallel to norm2 and MLP, or None.
        normalise: apply the final norm.

    Returns:
        Tokens [B, N, D], normalised unless told otherwise, or [B, N + L, D] with the prompt at
        `vit.num_prefix_tokens : vit.num_prefix_tokens + L`.

    Raises:
        TypeError: the ViT's blocks are not timm's standard pre-norm `Block`.
        ValueError: a per-block argument has not one entry for each block.
    """
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    if prompt is not None:
        head, tail = tokens.tensor_split([vit.num_prefix_tokens], dim=1)
        tokens = torch.cat([head, _batch(prompt, tokens), tail], dim=1)
    none = [None] * len(vit.blocks)
    rows = zip(
        vit.blocks,
        deep_prompts or none,
        prefixes or none,
        projections or none,
        attention_adapters or none,
        adapters or none,
        strict=True,
    )
    for block, deep, prefix, projection, beside, adapter in rows:
        kept = tokens.shape[1]
        if deep is not None:
            own = deep if isinstance(deep, Tensor) else deep(tokens)
            # Attention has no order: where the prompt stands changes nothing for the others.
            tokens = torch.cat([tokens, _batch(own, tokens)], dim=1)
        tokens = _block(block, tokens, prefix, compensate, projection, beside, adapter)
        if deep is not None:
            tokens = tokens[:, :kept]
    return vit.norm(tokens) if normalise else tokens


def read_out(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Feature [B, D] of normalised tokens [B, N, D]: the class token.

    A ViT without a class token is read as the mean of its tokens, which must then hold no prompt.
    """
    if vit.cls_token is not None:
        return vit.fc_norm(tokens[:, 0])
    return vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1))


def pooling(vit: VisionTransformer) -> str:
    """Name of what `read_out` reads, as specs call it: "token" or "avg"."""
    return "token" if vit.cls_token is not None else "avg"


def heads(vit: VisionTransformer) -> tuple[int, int]:
    """H and K of the attention."""
    attention: Attention = vit.blocks[0].attn  # type: ignore[assignment]
    return attention.num_heads, attention.head_dim


def wrap(vit: VisionTransformer, pattern: str, new: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces every module whose name matches `pattern` (as in fnmatch) by `new(module)`.

    Call it before DDP and `torch.compile`, for example
    `wrap(vit, "blocks.*.attn.qkv", lambda qkv: LowRank(qkv, rank=8))`.

    Raises:
        ValueError: the pattern matches nothing.
    """
    names = [name for name, _ in vit.named_modules() if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"no module of {type(vit).__name__} matches {pattern!r}")
    for name in names:
        vit.set_submodule(name, new(vit.get_submodule(name)))


class LowRank(nn.Module):
    """LoRA, https://arxiv.org/abs/2106.09685: base(x) + scale * up(down(x)); zero at the start."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class ScaleShift(nn.Module):
    """SSF, https://arxiv.org/abs/2210.08823: base(x) * scale + shift; identity at the start."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale + self.shift


def _standard(block: nn.Module) -> tuple[Block, Attention]:
    if type(block) is not Block or type(attention := block.attn) is not Attention:
        raise TypeError(f"expected timm's Block with timm's Attention, got {type(block).__name__}")
    return block, attention


def _block(
    block: nn.Module,
    tokens: Tensor,
    prefix: Prefix | None,
    compensate: bool,
    projection: nn.Module | None,
    beside: nn.Module | None,
    adapter: nn.Module | None,
) -> Tensor:
    block, attention = _standard(block)
    normed = block.norm1(tokens)
    found = _attend(attention, normed, prefix, compensate, projection)
    tokens = tokens + block.drop_path1(block.ls1(found))
    if beside is not None:
        tokens = tokens + beside(normed)
    out = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return out if adapter is None else out + adapter(tokens)


def _attend(
    attn: Attention,
    tokens: Tensor,
    prefix: Prefix | None,
    compensate: bool,
    projection: nn.Module | None,
) -> Tensor:
    """timm's `Attention.forward` with a prefix; equal to it for a prefix of length 0."""
    if prefix is None and projection is None:
        return attn(tokens)
    if attn.gate is not None:
        raise TypeError("prefixes and projections on gated attention are not supported")
    B, N, _ = tokens.shape
    qkv = attn.qkv(tokens)
    if projection is not None:
        qkv = qkv + projection(tokens)
    qkv = qkv.reshape(B, N, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, K]
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    alone: Tensor | None = None
    if prefix is not None:
        key, value = (_batch(p, k) for p in prefix)
        if compensate and key.shape[2]:
            alone = F.scaled_dot_product_attention(q, key, value, dropout_p=dropout)
            # Its share of the weights goes to no value.
            value = torch.zeros_like(value)
        k, v = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if alone is not None:
        out = out + alone
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).reshape(B, N, attn.attn_dim))))


def _batch(extra: Tensor, like: Tensor) -> Tensor:
    """Gives `extra` the batch size and, under autocast, the dtype of `like`."""
    return extra.to(like.dtype).expand(like.shape[0], *extra.shape[1:])


def unfreeze(vit: VisionTransformer) -> None:
    """Lets all of the ViT be trained that features are read through."""
    vit.requires_grad_(True)
    if isinstance(vit.attn_pool, nn.Module):
        # Such a ViT is read as a mean of its tokens instead; see `read_out`.
        vit.attn_pool.requires_grad_(False)
