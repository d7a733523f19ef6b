"""VPT: the prompt tokens, and both of them trained on task after task."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.parts.prompt_tokens import (
    PromptDepth,
    PromptTokens,
    uniform_bound,
    without_prompt,
)
from graftwork.methods.prompts.vpt import VPTDeep, VPTShallow
from tests import tiny

DEPTHS: list[PromptDepth] = ["shallow", "deep"]
METHODS = {"shallow": VPTShallow, "deep": VPTDeep}
KINDS: list[dict[str, Any]] = [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))


def plain(vit: VisionTransformer, images: Tensor) -> Tensor:
    return vit.forward_head(vit.forward_features(images), pre_logits=True)


def base() -> VisionTransformer:
    """ViT-B/16 without memory."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert isinstance(vit, VisionTransformer)
    return vit


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("changes", KINDS)
def test_v1_no_tokens_equal_the_plain_model(depth, changes):
    vit = tiny.vit(3, **changes)
    feature = PromptTokens(vit, 0, depth)(vit, pixels())
    torch.testing.assert_close(feature, plain(vit, pixels()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("changes", KINDS)
def test_v2_the_order_of_the_tokens_changes_nothing(depth, changes):
    vit = tiny.vit(3, **changes)
    prompt = PromptTokens(vit, 4, depth)
    before = prompt(vit, pixels())
    prompt.tokens.data = prompt.tokens.data[:, [2, 0, 3, 1]]
    torch.testing.assert_close(prompt(vit, pixels()), before, rtol=0, atol=2e-6)
    prompt.tokens.data = -prompt.tokens.data
    assert (prompt(vit, pixels()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("depth", DEPTHS)
def test_v3_tokens_drift_apart_from_a_uniform_start_and_never_from_zeros(depth):
    """The symmetry rule: equal tokens get equal gradients."""
    spread = {}
    for init in ("uniform", "zeros"):
        method = METHODS[depth](epochs=2, batch_size=6, prompt_length=4, vpt_init=init)
        tokens = tiny.train(method, tasks=1, depth=3)[0]["prompt.tokens"]
        assert tokens.abs().max() > 1e-3
        # From zeros the tokens move far, and together.
        spread[init] = (tokens - tokens[:, :1]).abs().max() / tokens.abs().max()
    assert spread["uniform"] > 0.1
    assert spread["zeros"] < 1e-5


def test_v4_deep_drops_what_shallow_carries_on():
    vit = tiny.vit(3)
    tokens = PromptTokens(vit, 4, "shallow").tokens
    deep = read_out(vit, forward_tokens(vit, pixels(), deep_prompts=[tokens, None, None]))
    shallow = read_out(vit, forward_tokens(vit, pixels(), prompt=tokens))
    assert (deep - shallow).abs().max() > 1e-4
    # With a single block there is nothing to carry.
    one = tiny.vit(1)
    tokens = PromptTokens(one, 4, "shallow").tokens
    deep = read_out(one, forward_tokens(one, pixels(), deep_prompts=[tokens]))
    shallow = read_out(one, forward_tokens(one, pixels(), prompt=tokens))
    torch.testing.assert_close(deep, shallow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", DEPTHS)
def test_v4_every_block_sees_its_own_tokens_and_the_prompt_once(depth):
    vit, seen = tiny.vit(3), []
    for block in vit.blocks:
        norm = block.get_submodule("norm1")
        norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0].shape[1]))
    PromptTokens(vit, 4, depth)(vit, pixels())
    assert seen == [17 + 4] * 3


def test_v5_number_of_parameters_and_the_bound_of_the_start():
    vit = base()
    with torch.device("meta"):
        assert PromptTokens(vit, 5, "shallow").tokens.numel() == 5 * 768
        assert PromptTokens(vit, 5, "deep").tokens.numel() == 12 * 5 * 768
    assert uniform_bound(vit) == 0.0625
    tokens = PromptTokens(tiny.vit(3), 50, "deep").tokens.detach()
    bound = (6 / (3 * 8 * 8 + 48)) ** 0.5
    assert 0.99 * bound < tokens.abs().max() <= bound
    assert tokens.mean().abs() < 0.01


def test_a_prompt_is_not_read_as_an_image_token():
    vit = tiny.vit(2, class_token=False, global_pool="avg")
    prompt = PromptTokens(vit, 4, "shallow")
    tokens = forward_tokens(vit, pixels(), prompt=prompt.tokens)
    expected = vit.fc_norm(tokens[:, 4:].mean(dim=1))
    torch.testing.assert_close(prompt(vit, pixels()), expected)
    assert without_prompt(vit, tokens, 4).shape == (3, 16, tiny.WIDTH)
    marked = torch.arange(8.0)[None, :, None]
    kept = without_prompt(tiny.vit(1, reg_tokens=1), marked, 3).flatten()
    assert kept.tolist() == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_later_task_moves_the_prompt_and_only_its_own_rows_of_the_head(depth):
    """Old rows stay to the last bit although the prompt has weight decay."""
    method = METHODS[depth](epochs=2, batch_size=6, prompt_length=3, weight_decay=0.1)
    first, second = tiny.train(method, depth=3)
    assert second.keys() == {"prompt.tokens", "head.weight", "head.bias"}
    assert torch.equal(second["head.weight"][:3], first["head.weight"])
    assert torch.equal(second["head.bias"][:3], first["head.bias"])
    assert second["head.weight"].shape == (6, tiny.WIDTH)
    assert not torch.equal(second["prompt.tokens"], first["prompt.tokens"])
    assert first["prompt.tokens"].shape == (3 if depth == "deep" else 1, 3, tiny.WIDTH)


@pytest.mark.parametrize("depth", DEPTHS)
def test_weight_decay_shrinks_the_prompt_alone(depth):
    learner = METHODS[depth](weight_decay=0.1).learner(tiny.vit(2), tiny.task(0))
    optimizer = METHODS[depth](weight_decay=0.1).recipe(tiny.task(0)).optimizer(learner.groups())
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = {name: decays[id(p)] for name, p in learner.named_parameters() if p.requires_grad}
    assert trained == {"prompt.tokens": 0.1, "head.weight": 0.0, "head.bias": 0.0}
