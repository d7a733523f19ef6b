"""CLIP behind one surface: equal to open_clip's own paths, offline, differentiable in prompts."""

import socket
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from graftwork.methods.networks import network
from graftwork.methods.networks.clip import VOCABULARY, Clip, class_texts, ends, phrases, unit
from tests import tiny
from tests.bounds import rounding

TEXTS = ["a photo of a cat.", "two dogs", ""]
towers = pytest.mark.parametrize("tower", ["own", "timm"])


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))


def tower_rounding(expected: Tensor) -> float:
    """For features of the tiny text tower: width 16, 2 blocks. Another length, another kernel."""
    return rounding(width=16, depth=2, size=float(expected.abs().max()))


@towers
def test_both_paths_are_those_of_open_clip(tower: str) -> None:
    clip = tiny.clip(tower=tower)
    tokens = clip.tokenise(TEXTS)
    expected = clip.model.encode_text(tokens)
    assert (clip.text(tokens) - expected).abs().max() <= tower_rounding(expected)
    assert torch.equal(clip.image(pixels()), clip.model.encode_image(pixels()))
    assert torch.equal(network.feature(clip, pixels()), clip.image(pixels()))
    assert clip.text(tokens).shape == clip.image(pixels()).shape == (3, clip.num_features)


def test_text_given_as_embeddings_is_the_text() -> None:
    clip = tiny.clip()
    tokens = clip.tokenise(TEXTS)
    expected = clip.model.encode_text(tokens)
    for length in (77, 20, 8):
        found = clip.text_from(clip.embed(tokens[:, :length]), ends(tokens))
        assert (found - expected).abs().max() <= tower_rounding(expected)


def test_custom_text_towers_work_alike() -> None:
    plain = tiny.clip()
    custom = open_clip.CustomTextCLIP(
        24,
        {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},  # type: ignore[arg-type]
        {"vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2},  # type: ignore[arg-type]
    )
    state = open_clip.model.convert_to_custom_text_state_dict(plain.model.state_dict())
    custom.load_state_dict(state)
    clip = Clip(custom).eval()
    tokens = clip.tokenise(TEXTS)
    expected, bound = plain.text(tokens), tower_rounding(plain.text(tokens))
    assert (clip.text(tokens) - expected).abs().max() <= bound
    whole = clip.text_from(clip.embed(tokens), ends(tokens))
    assert (whole - expected).abs().max() <= bound
    assert (clip.num_features, clip.text_width) == (24, 16)


def test_tokens_are_those_that_clip_was_trained_on() -> None:
    clip = tiny.clip()
    golden = [49406, 320, 1125, 539, 320, 2368, 269, 49407]
    tokens = clip.tokenise(["a photo of a cat.", "A  photo of a CAT ."])
    assert tokens.shape == (2, 77)
    assert tokens[0, :9].tolist() == [*golden, 0]
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-16")(["a photo of a cat."] * 2))
    assert ends(tokens).tolist() == [7, 7]
    with pytest.raises(ValueError, match="at most 77 tokens, got 102 in 'cat cat"):
        clip.tokenise(["cat " * 100])


def test_gradients_pass_through_a_frozen_text_tower() -> None:
    clip = tiny.clip()
    tokens = clip.tokenise(TEXTS)
    context = torch.zeros(1, 4, clip.text_width, requires_grad=True)
    embedded = clip.embed(tokens)
    embedded = torch.cat([embedded[:, :1], context.expand(3, -1, -1), embedded[:, 1:-4]], dim=1)
    clip.text_from(embedded, ends(tokens) + 4).square().sum().backward()
    assert context.grad is not None and bool((context.grad != 0).all())
    assert [name for name, p in clip.named_parameters() if p.grad is not None] == []


@towers
def test_a_prompt_beside_the_patches_changes_and_is_read(tower: str) -> None:
    clip = tiny.clip(tower=tower)
    prompt = torch.randn(1, 3, clip.image_width, generator=torch.Generator().manual_seed(1))
    prompt.requires_grad_(True)
    found = clip.image_with_prompt(pixels(), prompt)
    assert found.shape == (3, clip.num_features)
    assert torch.allclose(found, clip.image_with_prompt(pixels(), prompt.expand(3, -1, -1)))
    # Attention has no order: as a set of tokens, the prompt is read the same way.
    assert torch.allclose(found, clip.image_with_prompt(pixels(), prompt.flip(1)), atol=1e-5)
    found.square().sum().backward()
    assert prompt.grad is not None and bool((prompt.grad != 0).all())
    with pytest.raises(ValueError, match="at least one token"):
        clip.image_with_prompt(pixels(), prompt[:, :0])


def test_a_prompt_of_the_class_token_alone_is_read_as_the_class_token_is() -> None:
    clip = tiny.clip()
    visual: Any = clip.model.visual
    start = visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])
    # Twice the same token: both end alike, whatever they have attended to.
    found = clip.image_with_prompt(pixels(), start[None, None])
    tokens = visual._embeds(pixels())
    tokens = visual.transformer(torch.cat([tokens[:, :1], tokens], dim=1))
    assert torch.allclose(found, visual.ln_post(tokens[:, 0]) @ visual.proj, atol=1e-5)


def test_class_texts_are_unit_means_over_templates() -> None:
    clip = tiny.clip()
    names, templates = ["aquarium_fish", "cat"], ["a photo of a {}.", "the {}"]
    assert phrases(names, templates[1]) == ["the aquarium fish", "the cat"]
    found = class_texts(clip, names, templates)
    parts = [clip.model.encode_text(clip.tokenise(phrases(names, t)), True) for t in templates]
    mean = (parts[0] + parts[1]) / 2
    assert torch.allclose(found, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(unit(clip.image(pixels())).norm(dim=1), torch.ones(3), atol=1e-6)


def test_building_and_both_towers_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    clip = tiny.clip()
    assert clip.text(clip.tokenise(TEXTS)).shape == (3, 24)


def test_other_towers_are_refused() -> None:
    with pytest.raises(TypeError, match="expected an open_clip CLIP, got Linear"):
        Clip(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ends in the last token"):
        tiny.clip(pool_type="last")
    with pytest.raises(TypeError, match="100 tokens, not 49408"):
        tiny.clip(vocab_size=100)
    resnet: dict[str, Any] = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 16}
    text = {"width": 16, "heads": 2, "layers": 1}
    with pytest.raises(TypeError, match="image tower ModifiedResNet is no ViT"):
        Clip(open_clip.CLIP(24, resnet, text))  # type: ignore[arg-type]
