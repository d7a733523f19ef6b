"""Every family of networks that timm registers: its features, and whether methods train on it.

The table is made of what timm's networks say on the meta device, which computes shapes alone; a few
small ones are run in numbers. A family that a newer timm adds is held to the same law.
"""

import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._registry import _module_to_models

from graftwork.operators.backbones import loading
from graftwork.operators.backbones.examine import attachable, examine
from graftwork.operators.backbones.resolve import resolve
from graftwork.operators.errors import GraftworkError, IncompatibleError
from graftwork.operators.store import Store
from graftwork.operators.store.memo import Memo

FAMILIES: dict[str, tuple[str, str, int]] = {
    "beit": ("beitv2_base_patch16_224", "avg", 768),
    "byoanet": ("halonet26t", "avg", 2048),
    "byobnet": ("test_byobnet", "avg", 256),
    "cait": ("cait_xxs24_224", "token", 192),
    "coat": ("coat_lite_tiny", "token", 320),
    "convit": ("convit_tiny", "token", 192),
    "convmixer": ("convmixer_768_32", "avg", 768),
    "convnext": ("test_convnext2", "avg", 128),
    "cpubone": ("cpubone_nano", "avg", 1600),
    "crossvit": ("crossvit_tiny_240", "token", 288),
    "csatv2": ("csatv2", "avg", 386),
    "cspnet": ("cs3darknet_focus_s", "avg", 512),
    "cspnext": ("cspnext_tiny", "avg", 384),
    "davit": ("davit_tiny", "avg", 768),
    "deepseek_vit": ("deepseek_vit_412m", "avg", 1024),
    "deit": ("deit_tiny_patch16_224", "token", 192),
    "densenet": ("densenet121", "avg", 1024),
    "dla": ("dla34", "avg", 512),
    "dpn": ("dpn68", "avg", 832),
    "edgenext": ("edgenext_xx_small", "avg", 168),
    "efficientformer": ("efficientformer_l1", "avg", 448),
    "efficientformer_v2": ("efficientformerv2_s0", "avg", 176),
    "efficientnet": ("test_efficientnet", "avg", 256),
    "efficientvim": ("efficientvim_m2", "avg", 1408),
    "efficientvit_mit": ("efficientvit_b0", "avg", 1280),
    "efficientvit_msra": ("efficientvit_m0", "avg", 192),
    "eva": ("eva02_tiny_patch14_224", "avg", 192),
    "fasternet": ("fasternet_t0", "avg", 1280),
    "fastvit": ("fastvit_t8", "avg", 768),
    "focalnet": ("focalnet_tiny_srf", "avg", 768),
    "gcvit": ("gcvit_xtiny", "avg", 512),
    "gemma4_vit": ("gemma4_vit_167m", "avg", 768),
    "ghostnet": ("ghostnet_050", "avg", 1280),
    "hardcorenas": ("hardcorenas_a", "avg", 1280),
    "hgnet": ("hgnet_tiny", "avg", 2048),
    "hiera": ("hiera_tiny_224", "avg", 768),
    "hieradet_sam2": ("sam2_hiera_tiny", "avg", 768),
    "hrnet": ("hrnet_w18_small", "avg", 2048),
    "iformer": ("iformer_t", "avg", 256),
    "inception_next": ("inception_next_atto", "avg", 960),
    "inception_resnet_v2": ("inception_resnet_v2", "avg", 1536),
    "inception_v3": ("tf_inception_v3", "avg", 2048),
    "inception_v4": ("inception_v4", "avg", 1536),
    "lcnetv2": ("lcnetv2_small", "avg", 1280),
    "levit": ("levit_384_s8", "avg", 768),
    "lowformer": ("lowformer_b0", "avg", 1600),
    "mambaout": ("test_mambaout", "avg", 256),
    "maxxvit": ("test_coatnet", "avg", 128),
    "metaformer": ("caformer_s18", "avg", 512),
    "mlp_mixer": ("gmlp_ti16_224", "avg", 128),
    "mobilenetv3": ("mobilenetv3_small_075", "avg", 1024),
    "mobilenetv5": ("mobilenetv5_base", "avg", 2048),
    "mobilevit": ("mobilevit_xxs", "avg", 320),
    "mvitv2": ("mvitv2_tiny", "avg", 768),
    "naflexvit": ("naflexvit_base_patch16_siglip", "map", 768),
    "nasnet": ("nasnetalarge", "avg", 4032),
    "nest": ("nest_tiny", "avg", 384),
    "nextvit": ("nextvit_small", "avg", 1024),
    "nfnet": ("test_nfnet", "avg", 192),
    "pit": ("pit_xs_224", "token", 384),
    "pnasnet": ("pnasnet5large", "avg", 4320),
    "pvt_v2": ("pvt_v2_b0", "avg", 256),
    "qwen3_vit": ("qwen3_vit_88m", "avg", 768),
    "rdnet": ("rdnet_tiny", "avg", 1040),
    "regnet": ("regnety_008_tv", "avg", 784),
    "repghost": ("repghostnet_050", "avg", 1280),
    "repvit": ("repvit_m0_9", "avg", 384),
    "res2net": ("res2next50", "avg", 2048),
    "resnest": ("resnest14d", "avg", 2048),
    "resnet": ("test_resnet", "avg", 96),
    "resnetv2": ("resnetv2_152x2_bit_teacher_384", "avg", 4096),
    "rexnet": ("rexnet_100", "avg", 1280),
    "selecsls": ("selecsls42", "avg", 1280),
    "senet": ("legacy_seresnet18", "avg", 512),
    "sequencer": ("sequencer2d_s", "avg", 384),
    "shvit": ("shvit_s1", "avg", 320),
    "sknet": ("skresnet18", "avg", 512),
    "starnet": ("starnet_s2", "avg", 256),
    "swiftformer": ("swiftformer_s", "avg", 224),
    "swin_transformer": ("swin_s3_tiny_224", "avg", 768),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", "avg", 768),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", "avg", 768),
    "tiny_vit": ("tiny_vit_11m_224", "avg", 448),
    "tnt": ("tnt_s_legacy_patch16_224", "token", 384),
    "tresnet": ("tresnet_m", "avg", 2048),
    "twins": ("twins_svt_small", "avg", 512),
    "vgg": ("vgg11", "avg", 4096),
    "visformer": ("visformer_tiny", "avg", 384),
    "vision_transformer": ("test_vit", "token", 64),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224_in21k", "token", 192),
    "vision_transformer_relpos": ("test_vit_relpos", "avg", 96),
    "vision_transformer_sam": ("samvit_base_patch16", "avg", 256),
    "vitamin": ("vitamin_small_224", "avg", 384),
    "volo": ("volo_d1_224", "token", 384),
    "vovnet": ("ese_vovnet19b_slim", "avg", 512),
    "xception": ("xception", "avg", 2048),
    "xception_aligned": ("xception41", "avg", 2048),
    "xcit": ("xcit_nano_12_p8_384", "token", 128),
}
"""Module of timm: one of its networks, its own pooling as specs write it, width of features."""
TRAINED = ("deit", "vision_transformer", "vision_transformer_hybrid", "vitamin")
"""Families with networks that methods attach to: timm's ViT with timm's standard blocks."""


OF_TIMM = [family for family in _module_to_models if f"timm.models.{family}" in sys.modules]
RECURRENT = {"sequencer"}
"""On the meta device an LSTM takes a minute; in numbers it is quick."""


def shapes_of(name: str, device: str) -> torch.nn.Module:
    with warnings.catch_warnings(action="ignore"), torch.device(device):
        return timm.create_model(name, num_classes=0).eval()


@pytest.mark.parametrize("family", OF_TIMM)
@torch.no_grad()
def test_a_family_gives_one_vector_of_its_own_pooling(family: str) -> None:
    smallest = min(_module_to_models[family], key=lambda name: (len(name), name))
    name, pooling, width = FAMILIES.get(family, (smallest, "", 0))
    device = "cpu" if family in RECURRENT else "meta"
    network = shapes_of(name, device)
    pooling = pooling or loading.own_pooling(network)
    images = torch.zeros(1, *loading.data_config(network)["input_size"], device=device)
    tokens = network.forward_features(images)  # type: ignore[operator]
    own = network.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    assert own.shape == (1, width or own.shape[1])
    network.forward_features = lambda images: tokens  # type: ignore[method-assign]
    assert loading.pooled_features(network, images, pooling).shape == own.shape
    assert (attachable(network)[0] == "") == (family in TRAINED) or family not in FAMILIES
    # Whatever else is asked for has another meaning there, or is refused with what to write.
    for other in {"token", "avg", "map"} - {pooling}:
        try:
            loading.check_pooling(network, name, other)
            assert loading.pooled_features(network, images, other).shape == own.shape
            assert other == "avg" and hasattr(network, "num_prefix_tokens")
        except IncompatibleError as error:
            assert f"set features.pooling: {pooling}" in str(error)


def test_the_table_has_every_family() -> None:
    missing = set(OF_TIMM) - FAMILIES.keys()
    assert not missing or tuple(map(int, timm.__version__.split(".")[:3])) > (1, 0, 31), missing


NUMBERS = {
    "test_vit": ("token", 64, ""),
    "test_vit2": ("avg", 64, ""),
    "test_vit3": ("map", 96, ""),
    "deit_tiny_distilled_patch16_224": ("token", 192, "is read as token, and pools in another way"),
    "crossvit_9_240": ("token", 384, "got CrossVit"),
    "hiera_tiny_224": ("avg", 768, "got Hiera"),
    "eva02_tiny_patch14_224": ("avg", 192, "got Eva"),
    "mobilenetv3_small_050": ("avg", 1024, "got MobileNetV3"),
    "test_convnext": ("avg", 64, "got ConvNeXt"),
    "test_resnet": ("avg", 96, "got ResNet"),
}
"""Networks run in numbers: own pooling, width, and why methods cannot train on them."""


@pytest.mark.parametrize("name", NUMBERS)
def test_features_are_those_that_timm_pools(name: str) -> None:
    pooling, width, refused = NUMBERS[name]
    network = loading.load(name, "random", pooling)
    size = loading.data_config(network)["input_size"]
    seen = examine(network, name, pooling, size)
    assert seen.width == width
    assert refused in seen.refused and bool(refused) == bool(seen.refused)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loading.pooled_features(network, images, pooling)
        own = network.forward_head(network.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.equal(found, own) and found.shape == (2, width)


@pytest.mark.parametrize(
    ("name", "pooling", "said"),
    [
        ("crossvit_9_240", "avg", "has no tokens to take a mean of; set features.pooling: token"),
        ("hiera_tiny_224", "token", "has no class token; set features.pooling: avg"),
        ("eva02_tiny_patch14_224", "token", "pools avg; set features.pooling: avg"),
        ("test_vit", "map", "pools token; set features.pooling: token"),
        ("test_resnet", "map", "set features.pooling: avg"),
    ],
)
def test_another_pooling_is_refused_while_planning(
    name: str, pooling: str, said: str, tmp_path: Path
) -> None:
    memo = Memo(Store(str(tmp_path)).blobs)
    with pytest.raises(IncompatibleError, match=r"features\.pooling") as caught:
        resolve(name, "random", pooling, memo)
    assert said in str(caught.value)


class Broken(torch.nn.Module):
    """A network that gives what cannot be a feature."""

    num_features = 4

    def __init__(self, result: object) -> None:
        super().__init__()
        self._result = result

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool) -> object:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (NotImplementedError("no classification"), "gives no feature of an image: no classific"),
        (AttributeError("'list' has no attribute 'ndim'"), "gives no feature of an image: 'list'"),
        ([torch.zeros(1, 4)], r"does not give one finite vector for an image, but list"),
        (torch.zeros(1, 4, 7, 7), r"one finite vector for an image, but \[1, 4, 7, 7\]"),
        (torch.full((1, 4), torch.nan), r"one finite vector for an image, but \[1, 4\]"),
    ],
    ids=["refuses", "fails", "list", "map", "NaN"],
)
def test_what_is_no_feature_is_refused_in_a_line(result: object, said: str) -> None:
    with pytest.raises(GraftworkError, match=said) as caught:
        examine(Broken(result), "broken", "avg", (3, 8, 8))
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.key == "backbone.model"


# --- files of weights -------------------------------------------------------------------------


def test_files_that_timm_reads_are_read(tmp_path: Path) -> None:
    """Meta's DINOv2 brings a mask token; others are wrapped, or were saved by a parallel module."""
    name = "vit_small_patch14_dinov2"
    plain = loading.load(name, "random", "token", 28).state_dict()
    for number, changed in enumerate(
        (
            plain | {"mask_token": torch.zeros(1, 384)},
            {f"module.{key}": tensor for key, tensor in plain.items()},
            plain | {"head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)},
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path)
        read = loading.load(name, str(path), "token", 28).state_dict()
        assert read.keys() == plain.keys()
        assert all(torch.equal(read[key], plain[key]) for key in plain), number
    path = tmp_path / "other.safetensors"
    save_file({**plain, "strange": torch.zeros(1)}, path)
    with pytest.raises(IncompatibleError, match="expected strange absent, file has"):
        loading.load(name, str(path), "token", 28)
    less = {key: tensor for key, tensor in plain.items() if key != "norm.bias"}
    save_file({**less, "mask_token": torch.zeros(1, 384)}, path)
    with pytest.raises(IncompatibleError, match=r"norm\.bias"):
        loading.load(name, str(path), "token", 28)
