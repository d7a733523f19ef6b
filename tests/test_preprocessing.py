"""Pixels equal torchvision's on PIL images to the last bit; descriptions resolve to numbers."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from graftwork.operators.errors import BadDataError, ConfigError, IncompatibleError
from graftwork.operators.images import pixels
from graftwork.operators.images.preprocessing import PRESETS, Preprocessing, from_timm, resolve

SIZES = [
    *[(32, 32), (64, 64), (16, 16), (128, 32), (32, 128), (256, 256), (224, 224), (227, 227)],
    *[(512, 448), (448, 512), (512, 512), (33, 32), (90, 17), (8, 8), (1, 1)],
    *[(9, 50), (640, 427), (427, 640), (255, 257), (31, 97), (7, 5)],
]
OTHERS = {
    "bilinear": Preprocessing(resize=64, interpolation="bilinear", crop=56),
    "padded": Preprocessing(resize=20, crop=37),
    "crop only": Preprocessing(crop=48),
    "uncropped border": Preprocessing(resize=256, crop=256),
    "stretched": Preprocessing(resize=64, crop=56, stretch=True),
    "odd": Preprocessing(resize=128, crop=101, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1)),
}
ALL = PRESETS | OTHERS


def torchvision_transform(p: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    steps = []
    if p.resize:
        mode = T.InterpolationMode(p.interpolation)
        edges = [p.resize, p.resize] if p.stretch else p.resize
        steps.append(T.Resize(edges, interpolation=mode))  # type: ignore[arg-type]
    if p.crop:
        steps.append(T.CenterCrop(p.crop))
    return T.Compose(  # type: ignore[return-value]
        [*steps, T.ToTensor(), T.Normalize(p.mean, p.std)]
    )


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng([seed, width, height])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ALL)
def test_equal_to_torchvision_to_the_last_bit(name: str) -> None:
    preprocessing = ALL[name]
    # Small ones twice, not side by side: images of one size are resized together.
    sizes = [*SIZES, *(size for size in SIZES if max(size) <= 128)]
    drawn = [random_image(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    ours = pixels.prepare([png(image) for image in drawn], preprocessing)
    assert ours.dtype == torch.uint8
    reference = torchvision_transform(preprocessing)
    for image, own in zip(drawn, pixels.normalise(ours, preprocessing), strict=True):
        assert (reference(image) - own).abs().max().item() == 0, image.size


@pytest.mark.parametrize("name", PRESETS)
def test_equal_to_torchvision_on_random_sizes(name: str) -> None:
    sizes = np.random.default_rng(3).integers(5, 400, (20, 2)).tolist()
    reference = torchvision_transform(PRESETS[name])
    drawn = [random_image(w, h) for w, h in sizes]
    ours = pixels.normalise(pixels.resize_and_crop(drawn, PRESETS[name]), PRESETS[name])
    assert torch.equal(ours, torch.stack([reference(image) for image in drawn]))


@pytest.mark.parametrize("name", PRESETS)
def test_equal_to_torchvision_on_cifar(name: str) -> None:
    folder = Path(os.environ.get("GRAFTWORK_DATA", ""), "cifar100_small")
    if "GRAFTWORK_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("GRAFTWORK_DATA names no folder with cifar100_small")
    column = pq.read_table(folder / "test.parquet", columns=["image"])["image"]
    reference = torchvision_transform(PRESETS[name])
    data = column.to_pylist()[::80]
    expected = [reference(Image.open(io.BytesIO(image)).convert("RGB")) for image in data]
    ours = pixels.normalise(pixels.prepare(data, PRESETS[name]), PRESETS[name])
    assert torch.equal(ours, torch.stack(expected))


def test_the_fast_way_is_taken_for_small_images_and_not_where_weights_are_rounded() -> None:
    # 32 -> 256 has weights of 13 bits, but for the border that the crop of 224 removes.
    assert pixels._torch_is_exact(32, 256, 16, 240, "bicubic")
    assert not pixels._torch_is_exact(32, 256, 0, 256, "bicubic")
    assert not pixels._torch_is_exact(32, 224, 0, 224, "bicubic")
    assert not pixels._torch_is_exact(640, 383, 80, 304, "bicubic")


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 2, 4, 8, 16])
def test_powers_of_two_are_equal_to_torchvision(ratio: float, mode: str) -> None:
    generator = np.random.default_rng(5)
    fast = 0
    shapes = [(2, 90), (90, 2), (8, 64), (4, 30), *generator.integers(2, 40, (12, 2)).tolist()]
    for width, height in shapes:
        if ratio < 1:
            width, height = 4 * width, 4 * height
        resize = int(min(width, height) * ratio)
        crop = max(1, int(resize * generator.choice([0.5, 0.75, 0.875])))
        preprocessing = Preprocessing(resize=resize, crop=crop, interpolation=mode)
        start = round((resize - crop) / 2)
        fast += pixels._torch_is_exact(min(width, height), resize, start, start + crop, mode)
        image = random_image(width, height)
        ours = pixels.normalise(pixels.resize_and_crop([image], preprocessing), preprocessing)
        assert torch.equal(ours[0], torchvision_transform(preprocessing)(image)), (width, height)
    # 16 times bicubic has weights of 16 bits behind the point.
    assert (fast > 0) == (ratio > 1 and (ratio, mode) != (16, "bicubic"))


def test_a_pixel_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    data = [png(random_image(w, h)) for w, h in [(32, 32), (40, 30), (32, 32), (300, 200)]]
    together = pixels.prepare(data, PRESETS["lamda_224"])
    alone = [pixels.prepare([one], PRESETS["lamda_224"])[0] for one in data]
    assert torch.equal(together, torch.stack(alone))
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert together.stride() == pixels.prepare(data[:2], PRESETS["lamda_224"]).stride()


def test_images_of_different_sizes_need_a_crop() -> None:
    images = [random_image(4, 4), random_image(6, 4)]
    with pytest.raises(BadDataError, match=r"differ in size \(4x4, 6x4"):
        pixels.resize_and_crop(images, Preprocessing(resize=4))
    assert pixels.resize_and_crop(images[:1], Preprocessing()).shape == (1, 3, 4, 4)
    assert pixels.prepare([], PRESETS["micro_32"]).shape == (0, 3, 32, 32)


def test_normalise_in_other_types() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = pixels.normalise(values, PRESETS["micro_32"])
    assert exact.min() == -1
    assert exact.max() == 1
    half = pixels.normalise(values, PRESETS["micro_32"], torch.bfloat16)
    assert torch.equal(half, exact.to(torch.bfloat16))


def test_the_input_of_a_network_has_one_layout_in_memory() -> None:
    """A convolution may sum in another order for another layout, and its last bits differ then."""
    preset = PRESETS["micro_32"]
    batch = pixels.prepare([png(random_image(32, 32, seed)) for seed in range(4)], preset)
    wanted = pixels.normalise(batch, preset)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    padded = torch.cat([batch[:2], batch.new_zeros(2, *batch.shape[1:])])
    filled = torch.cat([batch[:3], batch[:1].expand(1, -1, -1, -1)])
    joined = torch.cat([batch[row : row + 1] for row in range(4)])
    for other, rows in ((padded, 2), (filled, 3), (joined, 4), (batch.contiguous(), 4)):
        found = pixels.normalise(other, preset)
        assert found.stride() == wanted.stride()
        assert torch.equal(found[:rows], wanted[:rows])


def test_presets_are_numbers() -> None:
    pillow = ".".join(version("pillow").split(".")[:2])
    assert PRESETS["lamda_224"].to_json() == {
        "resize": 256,
        "interpolation": "bicubic",
        "crop": 224,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "pillow": pillow,
    }
    for preset in PRESETS.values():
        assert Preprocessing.from_json(preset.to_json()) == preset
    assert PRESETS["ranpac_cifar_224"].resize == 224
    stretched = {name for name, preset in PRESETS.items() if preset.to_json().get("stretch")}
    assert stretched == {"proof_224", "dap_224"}
    assert PRESETS["dap_224"].mean == (0.485, 0.456, 0.406)
    assert PRESETS["dap_224"].interpolation == "bilinear"
    assert PRESETS["proof_224"].mean == PRESETS["clip"].mean
    assert PRESETS["slca_norm"].mean == (0.5071, 0.4867, 0.4408)
    assert PRESETS["micro_32"].std == (0.5, 0.5, 0.5)


def test_another_pillow_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"planned with Pillow 9\.1"):
        Preprocessing.from_json(PRESETS["micro_32"].to_json() | {"pillow": "9.1"})


def test_from_timm() -> None:
    config = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    expected = Preprocessing(resize=248, crop=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert from_timm(config) == expected
    assert resolve("timm_default", config) == expected
    assert from_timm(config | {"crop_pct": 1.0}).resize == 224
    with pytest.raises(ConfigError, match='crop mode "squash"'):
        from_timm(config | {"crop_mode": "squash"})
    with pytest.raises(ConfigError, match="input 224x192"):
        from_timm(config | {"input_size": [3, 224, 192]})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("lamda", 'unknown preset "lamda"; known are lamda_224, '),
        ({"size": 3}, "preprocessing.size: unknown key"),
        ({"resize": 0}, "preprocessing.resize: must be an integer in 1..4096: 0"),
        ({"crop": True}, "preprocessing.crop: must be an integer"),
        ({"interpolation": "nearest"}, "must be one of bilinear, bicubic"),
        ({"stretch": 1, "resize": 8}, "preprocessing.stretch: must be true or false"),
        (
            {"stretch": True},
            "preprocessing.stretch: must be true or false, and true only with resize",
        ),
        ({"std": [0, 1, 1]}, "preprocessing.std: must be three numbers in 0..1"),
        ({"mean": [0.5]}, "preprocessing.mean: must be three numbers"),
        ({"mean": [float("nan"), 0, 0]}, "preprocessing.mean: must be three numbers"),
    ],
)
def test_what_cannot_be_meant(description: str | dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(description)
    assert message in str(caught.value)


def test_explicit_description() -> None:
    described = resolve({"resize": 48, "crop": 32, "mean": [0.5, 0.5, 0.5]})
    assert described == Preprocessing(resize=48, crop=32, mean=(0.5, 0.5, 0.5))


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from graftwork.operators.data import dataset;"
        "from graftwork.operators.images import codec, preprocessing;"
        "preprocessing.PRESETS['lamda_224'].to_json();"
        "assert not {'torch', 'torchvision', 'sklearn', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
