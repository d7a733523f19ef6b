"""The seams on timm's ViT: equal to timm where nothing is added, and what is added is right."""

import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks import vit as seams
from tests import tiny

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 0}
NAMES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224.augreg_in21k": {"img_size": 32, "patch_size": 8},
    "vit_small_patch14_reg4_dinov2.lvd142m": {"img_size": 28},
    "vit_small_patch14_dinov2.lvd142m": {"img_size": 28},
    "deit3_small_patch16_224.fb_in22k_ft_in1k": {"img_size": 32},
    "vit_base_patch16_clip_224.openai": {"img_size": 32},
    "vit_base_patch16_siglip_224.webli": {"img_size": 32},
    "vit_base_patch16_224.mae": {"img_size": 32},
}
OTHERS = ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"]
OTHER_BLOCKS = ["vit_base_patch16_rpn_224", "vit_small_patch16_18x2_224"]
names = pytest.mark.parametrize("name", NAMES)


def create(name: str) -> VisionTransformer:
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **SMALL, **NAMES[name])
    for parameter in network.parameters():
        # Not the start, where layer scales hide the blocks and biases are zero.
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return seams.check(network).eval().requires_grad_(False)


def images(network: VisionTransformer, number: int = 2) -> Tensor:
    size = network.patch_embed.img_size
    assert size is not None
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))


@names
def test_without_arguments_it_is_timm_bitwise(name: str) -> None:
    network = create(name)
    pixels = images(network)
    plain = network.forward_features(pixels)
    assert torch.equal(seams.forward_tokens(network, pixels), plain)
    none = [None] * 2
    assert torch.equal(
        seams.forward_tokens(network, pixels, deep_prompts=none, prefixes=none, adapters=none),
        plain,
    )


@names
def test_a_prefix_of_length_0_changes_nothing(name: str) -> None:
    network = create(name)
    pixels, (heads, width) = images(network), seams.heads(network)
    assert heads * width == 48
    empty = torch.zeros(1, heads, 0, width)
    plain = network.forward_features(pixels)
    for compensate in (False, True):
        found = seams.forward_tokens(
            network, pixels, prefixes=[(empty, empty)] * 2, compensate=compensate
        )
        assert torch.allclose(found, plain, atol=1e-6)


@names
def test_other_empty_additions_change_nothing(name: str) -> None:
    network = create(name)
    pixels, empty = images(network), torch.zeros(1, 0, 48)
    plain = network.forward_features(pixels)
    assert torch.equal(seams.forward_tokens(network, pixels, prompt=empty), plain)
    assert torch.equal(seams.forward_tokens(network, pixels, deep_prompts=[empty] * 2), plain)

    class Nothing(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros_like(tokens)

    assert torch.equal(seams.forward_tokens(network, pixels, adapters=[Nothing()] * 2), plain)
    found = seams.forward_tokens(network, pixels, attention_adapters=[Nothing()] * 2)
    assert torch.equal(found, plain)

    class NoUpdate(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros_like(tokens).repeat(1, 1, 3)

    found = seams.forward_tokens(network, pixels, projections=[NoUpdate()] * 2)
    assert torch.allclose(found, plain, atol=1e-6)


@names
def test_features_are_read_as_the_class_token_or_the_mean(name: str) -> None:
    network = create(name)
    tokens = network.forward_features(images(network))
    found = seams.read_out(network, tokens)
    if "siglip" in name:
        assert seams.pooling(network) == "avg"
        assert torch.allclose(found, tokens.mean(dim=1))
    else:
        assert seams.pooling(network) == "token"
        assert torch.equal(found, tokens[:, 0])


def test_the_mean_leaves_registers_out_and_has_its_norm() -> None:
    network = tiny.vit(2, class_token=False, reg_tokens=3, global_pool="avg")
    pixels = images(network)
    tokens = network.forward_features(pixels)
    assert tokens.shape[1] == 3 + 16
    found = seams.read_out(network, tokens)
    assert torch.allclose(found, network.forward_head(tokens, pre_logits=True), atol=1e-6)


@names
def test_a_prompt_stands_behind_the_class_and_register_tokens(name: str) -> None:
    network = create(name)
    pixels, prompt = images(network), torch.randn(1, 3, 48)
    found = seams.forward_tokens(network, pixels, prompt=prompt)
    tokens = network.norm_pre(network._pos_embed(network.patch_embed(pixels)))
    first = network.num_prefix_tokens
    by_hand = torch.cat([tokens[:, :first], prompt.expand(2, 3, 48), tokens[:, first:]], dim=1)
    assert torch.equal(found, network.norm(network.blocks(by_hand)))
    own = seams.forward_tokens(network, pixels, prompt=prompt.expand(2, 3, 48))
    assert torch.equal(own, found)


def test_deep_prompts_are_new_in_every_block() -> None:
    network = tiny.vit(2)
    pixels, prompts = images(network), torch.randn(2, 1, 3, 48)
    tokens = network._pos_embed(network.patch_embed(pixels))
    for block, prompt in zip(network.blocks, prompts, strict=True):
        tokens = block(torch.cat([tokens, prompt.expand(2, 3, 48)], dim=1))[:, :17]
    found = seams.forward_tokens(network, pixels, deep_prompts=list(prompts))
    assert torch.equal(found, network.norm(tokens))


def test_deep_prompts_may_be_made_of_the_tokens() -> None:
    network, seen = tiny.vit(2), []

    def make(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens[:, :1]

    found = seams.forward_tokens(network, images(network), deep_prompts=[make, None])
    assert [t.shape for t in seen] == [(2, 17, 48)]
    fixed = seams.forward_tokens(network, images(network), deep_prompts=[seen[0][:, :1], None])
    assert torch.equal(found, fixed)


def test_a_prefix_is_seen_by_all_tokens_of_its_block_alone() -> None:
    network = tiny.vit(2)
    heads, width = seams.heads(network)
    pixels = images(network)
    key, value = torch.randn(2, 2, heads, 3, width)
    tokens = network._pos_embed(network.patch_embed(pixels))
    block: Any = network.blocks[1]
    tokens = network.blocks[0](tokens)
    q, k, v = block.attn.qkv(block.norm1(tokens)).reshape(2, 17, 3, heads, width).unbind(2)
    keys = torch.cat([key.transpose(1, 2), k], dim=1)
    values = torch.cat([value.transpose(1, 2), v], dim=1)
    share = torch.einsum("bqhw,bkhw->bhqk", q, keys).div(width**0.5).softmax(dim=3)
    tokens = tokens + block.attn.proj(torch.einsum("bhqk,bkhw->bqhw", share, values).flatten(2))
    tokens = tokens + block.mlp(block.norm2(tokens))
    found = seams.forward_tokens(network, pixels, prefixes=[None, (key, value)])
    assert torch.allclose(found, network.norm(tokens), atol=1e-5)


def test_a_compensated_prefix_adds_attention_over_itself_with_weight_1() -> None:
    network = tiny.vit(1)
    heads, width = seams.heads(network)
    pixels = images(network)
    key, value = torch.randn(2, 1, heads, 3, width)
    tokens = network._pos_embed(network.patch_embed(pixels))
    block: Any = network.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(tokens)).reshape(2, 17, 3, heads, width).unbind(2)
    keys = torch.cat([key.expand(2, -1, -1, -1).transpose(1, 2), k], dim=1)
    values = torch.cat([value.expand(2, -1, -1, -1).transpose(1, 2), v], dim=1)
    share = torch.einsum("bqhw,bkhw->bhqk", q, keys).div(width**0.5).softmax(dim=3)
    share[..., :3] /= share[..., :3].sum(dim=3, keepdim=True)
    assert bool((share.sum(dim=3) > 1.5).all())
    tokens = tokens + block.attn.proj(torch.einsum("bhqk,bkhw->bqhw", share, values).flatten(2))
    tokens = tokens + block.mlp(block.norm2(tokens))
    found = seams.forward_tokens(network, pixels, prefixes=[(key, value)], compensate=True)
    assert torch.allclose(found, network.norm(tokens), atol=1e-5)


def test_a_projection_is_added_to_queries_keys_and_values() -> None:
    network, pixels = tiny.vit(1), images(tiny.vit(1))
    update = nn.Linear(48, 3 * 48, bias=False)
    found = seams.forward_tokens(network, pixels, projections=[update])
    block: Any = network.blocks[0]
    block.attn.qkv.weight += update.weight.detach()
    assert torch.allclose(found, network.forward_features(pixels), atol=1e-5)


def test_an_attention_adapter_reads_what_the_attention_reads() -> None:
    network, pixels = tiny.vit(1), images(tiny.vit(1))
    adapter = nn.Linear(48, 48)
    tokens = network._pos_embed(network.patch_embed(pixels))
    block: Any = network.blocks[0]
    normed = block.norm1(tokens)
    tokens = tokens + block.attn(normed) + adapter(normed)
    tokens = tokens + block.mlp(block.norm2(tokens))
    found = seams.forward_tokens(network, pixels, attention_adapters=[adapter])
    assert torch.equal(found, network.norm(tokens))


def test_an_adapter_reads_the_tokens_before_norm2() -> None:
    network, pixels = tiny.vit(1), images(tiny.vit(1))
    adapter = nn.Linear(48, 48)
    tokens = network._pos_embed(network.patch_embed(pixels))
    block: Any = network.blocks[0]
    tokens = tokens + block.attn(block.norm1(tokens))
    tokens = tokens + block.mlp(block.norm2(tokens)) + adapter(tokens)
    found = seams.forward_tokens(network, pixels, adapters=[adapter])
    assert torch.equal(found, network.norm(tokens))


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False, num_classes=0)
    with pytest.raises(TypeError, match="expected a timm VisionTransformer, got"):
        seams.check(network)


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_vits_of_other_blocks_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False, num_classes=0, depth=1)
    with pytest.raises(TypeError, match="expected timm's Block with timm's Attention, got"):
        seams.check(network)


def test_one_entry_for_each_block() -> None:
    network = tiny.vit(2)
    with pytest.raises(ValueError, match="argument"):
        seams.forward_tokens(network, images(network), adapters=[None])


def test_wrap_replaces_what_matches() -> None:
    network = tiny.vit(2)
    pixels = images(network)
    plain = network.forward_features(pixels)
    with pytest.raises(ValueError, match=r"no module of VisionTransformer matches 'blocks\.\*\.x'"):
        seams.wrap(network, "blocks.*.x", nn.Identity)

    def low_rank(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear)
        return seams.LowRank(layer, rank=2, scale=0.5)

    seams.wrap(network, "blocks.*.attn.qkv", low_rank)
    assert torch.equal(seams.forward_tokens(network, pixels), plain)
    attention: Any = network.get_submodule("blocks.1.attn")
    assert isinstance(attention, Attention) and isinstance(attention.qkv, seams.LowRank)
    layer = attention.qkv
    nn.init.normal_(layer.up.weight)
    merged = layer.base.weight + 0.5 * layer.up.weight @ layer.down.weight
    tokens = torch.randn(2, 3, 48)
    wanted = F.linear(tokens, merged, layer.base.bias)
    assert torch.allclose(layer(tokens), wanted, atol=1e-5)
    changed = seams.forward_tokens(network, pixels)
    assert not torch.equal(changed, plain)
    # Ray pickles networks; nothing of a seam may be a closure.
    assert torch.equal(pickle.loads(pickle.dumps(network)).forward_features(pixels), changed)


def test_scale_and_shift_start_as_the_identity() -> None:
    layer = seams.ScaleShift(nn.Linear(4, 3), 3)
    rows = torch.randn(2, 4)
    assert torch.equal(layer(rows), layer.base(rows))
    nn.init.constant_(layer.scale, 2.0)
    nn.init.constant_(layer.shift, 1.0)
    assert torch.equal(layer(rows), 2 * layer.base(rows) + 1)


def test_additions_take_the_dtype_of_autocast() -> None:
    network = tiny.vit(1)
    heads, width = seams.heads(network)
    key = torch.randn(1, heads, 2, width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = seams.forward_tokens(
            network,
            images(network),
            prompt=torch.randn(1, 2, 48),
            deep_prompts=[torch.randn(1, 2, 48)],
            prefixes=[(key, key)],
        )
    assert found.shape == (2, 19, 48)
    assert bool(found.isfinite().all())
