"""CLIP backbones: local names only, weights loaded strictly, towers known by their own digest."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graftwork.operators.backbones import clip, loading, weights
from graftwork.operators.backbones import resolve as backbone
from graftwork.operators.errors import ConfigError, IncompatibleError
from graftwork.operators.images.preprocessing import PRESETS, resolve
from graftwork.operators.store import Store

MICRO = "open_clip:clip_micro_32"
B16 = "open_clip:ViT-B-16"


def state() -> dict[str, torch.Tensor]:
    return dict(clip.build(MICRO).model.state_dict())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


def test_random_weights_come_from_one_seed_without_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    first, second = (loading.load(MICRO, "random", "token") for _ in range(2))
    assert weights.fingerprint(first) == weights.fingerprint(second)
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.training
    assert first.num_features == 32
    images = torch.randn(2, 3, 32, 32)
    found = loading.embedder(first, "token")(images)
    assert torch.equal(found, first.model.encode_image(images))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("form", ["plain", "half", "of a checkpoint", "OpenAI"])
def test_files_of_every_form_are_loaded_in_float32(form: str, tmp_path: Path) -> None:
    given = {name: value + 0.5 for name, value in state().items()}
    path, model = tmp_path / "file.safetensors", MICRO
    if form == "half":
        given = {name: value.half() for name, value in given.items()}
        save_file(given, path)
    elif form == "of a checkpoint":
        path = tmp_path / "file.pt"
        torch.save({"state_dict": {f"module.{n}": v for n, v in given.items()}}, path)
    elif form == "OpenAI":
        more = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
        save_file(given | more | {"vocab_size": torch.tensor(49408)}, path)
        with pytest.raises(IncompatibleError, match="openai were trained with QuickGELU"):
            loading.load(model, str(path), "token")
        return
    else:
        save_file(given, path)
    loaded = loading.load(model, str(path), "token").state_dict()
    assert loaded.keys() == {f"model.{name}" for name in given}
    for name, value in given.items():
        assert loaded[f"model.{name}"].dtype == torch.float32
        assert torch.equal(loaded[f"model.{name}"], value.float())


@pytest.mark.parametrize(
    ("model", "place", "other"),
    [
        (B16, "weights/openai/model.safetensors", "ViT-B-16-quickgelu"),
        (B16, "ViT-B-16-openai.pt", "ViT-B-16-quickgelu"),
        (f"{B16}-quickgelu", "vit_b_16-laion2b_s34b_b88k.pt", "ViT-B-16"),
        (B16, "weights/laion2b_s34b_b88k/open_clip.bin", None),
        (f"{B16}-quickgelu", "weights/openai/model.safetensors", None),
        (B16, "weights/mine.safetensors", None),
        # These weights of LAION were trained with QuickGELU.
        ("open_clip:ViT-B-32", "laion400m_e32.pt", "ViT-B-32-quickgelu"),
        ("open_clip:ViT-B-32-quickgelu", "laion400m_e32.pt", None),
    ],
)
def test_weights_of_the_other_gelu_are_refused_where_their_name_says_so(
    model: str, place: str, other: str | None
) -> None:
    clip._config(model)
    if other is None:
        clip._check_activation(model, place, from_openai=False)
    else:
        with pytest.raises(IncompatibleError, match=f"; take open_clip:{other}$"):
            clip._check_activation(model, place, from_openai=False)


def test_what_cannot_be_had_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r'unknown .*"clip_micro_23"; did you mean "open_clip:clip_mi'
    ):
        loading.load("open_clip:clip_micro_23", "random", "token")
    with pytest.raises(ConfigError, match=r"weights: missing; .* nothing is downloaded"):
        loading.load(MICRO, "", "token")
    with pytest.raises(IncompatibleError, match="pooling: CLIP pools as it was trained"):
        loading.load(MICRO, "random", "avg")
    with pytest.raises(IncompatibleError, match="has another text tower"):
        loading.load("open_clip:roberta-ViT-B-32", "random", "token")
    broken = {name: value for name, value in state().items() if name != "visual.proj"}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(IncompatibleError, match=r"1 differences\): expected model.visual.proj"):
        loading.load(MICRO, str(tmp_path / "broken.safetensors"), "token")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r'pip install "graftwork\[clip\]"'):
        loading.load(MICRO, "random", "token")


def test_another_image_size_resamples_the_positions(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state(), path)
    network: Any = loading.load(MICRO, str(path), "token", 16)
    positions = network.model.visual.positional_embedding
    assert positions.shape == (5, 48)
    assert torch.equal(positions[0], state()["visual.positional_embedding"][0])
    assert loading.embedder(network, "token")(torch.randn(1, 3, 16, 16)).shape == (1, 32)
    assert loading.data_config(network)["input_size"] == [3, 16, 16]


def test_a_tower_is_known_by_its_own_tensors(tmp_path: Path, store: Store) -> None:
    def known(**changes: torch.Tensor) -> backbone.Backbone:
        path = tmp_path / "weights.safetensors"
        save_file(state() | changes, path)
        return backbone.resolve(MICRO, str(path), "token", store.memo)

    start = known()
    assert (start.network, start.width, start.refused) == ("clip", 32, "")
    text = known(**{"ln_final.bias": torch.ones(32)})
    image = known(**{"visual.ln_post.bias": torch.ones(48)})
    scale = known(logit_scale=torch.zeros(()))
    whole = {b.fingerprint for b in (start, text, image, scale)}
    assert len(whole) == 4
    same = (start.image_fingerprint, start.text_fingerprint)
    assert (text.image_fingerprint == same[0], text.text_fingerprint == same[1]) == (True, False)
    assert (image.image_fingerprint == same[0], image.text_fingerprint == same[1]) == (False, True)
    assert (scale.image_fingerprint, scale.text_fingerprint) == same


def test_weights_are_found_by_any_of_their_digests_and_changed_ones_are_not(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state(), path)
    known = backbone.resolve(MICRO, str(path), "token", store.memo)
    given = (MICRO, str(path), "token")
    networks = [
        loading.load_on_device(*given, digest, "cpu")
        for digest in (known.fingerprint, known.image_fingerprint, known.text_fingerprint)
    ]
    assert networks[0] is networks[1] is networks[2]
    save_file(state() | {"ln_final.bias": torch.ones(32)}, path)
    changed = backbone.resolve(MICRO, str(path), "token", store.memo)
    assert loading.load_on_device(*given, changed.text_fingerprint, "cpu") is not networks[0]
    with pytest.raises(IncompatibleError, match="changed since the plan"):
        loading.load_on_device(*given, known.text_fingerprint, "cpu")


def test_preprocessing_is_that_of_clip() -> None:
    config = loading.data_config(loading.load(MICRO, "random", "token"))
    found, preset = resolve("timm_default", config), PRESETS["clip"]
    assert (found.resize, found.crop, found.interpolation) == (32, 32, "bicubic")
    assert (found.mean, found.std) == (preset.mean, preset.std)
    assert preset.mean == (0.48145466, 0.4578275, 0.40821073)
    assert preset.std == (0.26862954, 0.26130258, 0.27577711)
    assert (preset.resize, preset.crop) == (224, 224)
