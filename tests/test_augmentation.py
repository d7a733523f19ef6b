"""Augmentation: torchvision's transforms, with random numbers that belong to an image."""

import math
from collections.abc import Iterator
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import (
    InterpolationMode,
    RandomCrop,
    RandomResizedCrop,
    functional,
)

from graftwork import methods
from graftwork.methods.contracts import augmentations
from graftwork.operators.images.augmentation import (
    AUGMENTATIONS,
    DRAWS,
    Augmentation,
    augment,
    crop_box,
    generator,
    resized,
    square_box,
)
from graftwork.operators.seeds import derive

# Their annotations speak of tensors alone.
F: Any = functional
crop_of: Any = RandomResizedCrop.get_params
square_of: Any = RandomCrop.get_params
LAMDA = AUGMENTATIONS["lamda"]
SIZES = [(32, 32), (50, 37), (37, 61), (224, 180), (5, 9)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Script:
    """Random numbers that the test has chosen, and the limits they were asked for."""

    def __init__(self, **numbers: list[float]) -> None:
        self._numbers: dict[str, Iterator[float]] = {k: iter(v) for k, v in numbers.items()}
        self.asked: list[tuple[Any, ...]] = []

    def uniform(self, low: float, high: float) -> float:
        self.asked.append(("uniform", low, high))
        return next(self._numbers["uniform"])

    def integers(self, low: int, high: int) -> int:
        self.asked.append(("integers", low, high))
        return int(next(self._numbers["integers"]))

    def random(self) -> float:
        return next(self._numbers["random"])


def scripted(**numbers: list[float]) -> Any:
    return cast(np.random.Generator, Script(**numbers))


# --- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
@pytest.mark.parametrize("image", range(6))
def test_pixels_are_torchvisions(name: str, image: int) -> None:
    value, size = AUGMENTATIONS[name], 24
    original = picture(*SIZES[image % 5]) if value.crops else picture(size, size, image)
    found = augment(original, size, value, generator(1, 0, 2, image))

    random, expected = generator(1, 0, 2, image), original
    if value.scale is not None:
        left, top, right, bottom = crop_box(*original.size, value, random)
        expected = F.resized_crop(
            expected, top, left, bottom - top, right - left, [size, size],
            InterpolationMode(value.interpolation),
        )  # fmt: skip
    if value.resize is not None:
        edge = value.resize[0] * size // value.resize[1]
        mode = InterpolationMode(value.interpolation)
        edges = [edge, edge] if value.stretch else edge
        expected = F.resize(expected, edges, mode)
        left, top, _, _ = square_box(expected.width, expected.height, size, random)
        expected = F.crop(expected, top, left, size, size)
    if value.flip and random.random() < value.flip:
        expected = F.hflip(expected)
    if value.brightness:
        strength = value.brightness
        expected = F.adjust_brightness(expected, random.uniform(1 - strength, 1 + strength))
    assert found.size == (size, size)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.9])
def test_given_numbers_do_what_torchvision_does(mode: str, flipped: bool, factor: float) -> None:
    value = Augmentation(scale=(0.1, 1.0), interpolation=mode, flip=0.3, brightness=1.0)
    random = scripted(
        uniform=[0.25, math.log(1.2), factor], integers=[7, 3], random=[0.29 if flipped else 0.3]
    )
    image = picture(60, 50)
    found = augment(image, 32, value, random)
    # A quarter of 60 x 50 pixels with width / height = 1.2, below 7 rows, right of 3 columns.
    width, height = round(math.sqrt(750 * 1.2)), round(math.sqrt(750 / 1.2))
    assert (width, height) == (30, 25)
    expected = F.resized_crop(image, 7, 3, height, width, [32, 32], InterpolationMode(mode))
    if flipped:
        expected = F.hflip(expected)
    assert found.tobytes() == F.adjust_brightness(expected, factor).tobytes()
    assert random.asked == [
        ("uniform", 0.1, 1.0),
        ("uniform", math.log(3 / 4), math.log(4 / 3)),
        ("integers", 0, 50 - 25 + 1),
        ("integers", 0, 60 - 30 + 1),
        ("uniform", 0.0, 2.0),
    ]


def test_none_changes_nothing_and_draws_nothing() -> None:
    image = picture(30, 20)
    assert augment(image, 30, AUGMENTATIONS["none"], scripted()) is image


def test_a_brightness_above_one_never_inverts() -> None:
    random = scripted(uniform=[0.5])
    augment(picture(4, 4), 4, Augmentation(brightness=1.5), random)
    assert random.asked == [("uniform", 0.0, 2.5)]


# --- boxes ------------------------------------------------------------------------------------


def boxes(value: Augmentation, size: tuple[int, int], count: int = 3000) -> np.ndarray:
    """Left, top, width, height [count, 4] of the crops of as many images."""
    found = np.array([crop_box(*size, value, generator(0, 0, 0, n)) for n in range(count)])
    found[:, 2:] -= found[:, :2]
    return found


@pytest.mark.parametrize("name", ["lamda", "imagenet"])
@pytest.mark.parametrize("size", [(500, 400), (50, 37), (37, 61)])
def test_boxes_are_within_image_area_and_aspect(name: str, size: tuple[int, int]) -> None:
    value = AUGMENTATIONS[name]
    assert value.scale is not None
    left, top, width, height = boxes(value, size).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= size[0]).all() and (top + height <= size[1]).all()
    # Both edges were rounded, by half a pixel at most.
    low, high = (share * size[0] * size[1] for share in value.scale)
    assert ((width + 0.5) * (height + 0.5) >= low).all()
    assert ((width - 0.5) * (height - 0.5) <= high).all()
    assert ((width + 0.5) / (height - 0.5) >= value.ratio[0]).all()
    assert ((width - 0.5) / (height + 0.5) <= value.ratio[1]).all()


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    result: Any = ks_2samp(one, other)
    return result.pvalue > 0.01


@pytest.mark.parametrize("size", [(500, 400), (37, 61)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = Image.new("RGB", size)
    theirs = np.array([crop_of(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    ours = boxes(LAMDA, size)[:, [1, 0, 3, 2]]  # top, left, height, width
    for column in range(4):
        assert alike(ours[:, column], theirs[:, column])
    for product in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (size[1] - b[:, 2] + 1),
    ):
        assert alike(product(ours), product(theirs))


def test_area_and_aspect_are_uniform_where_every_draw_fits() -> None:
    value = Augmentation(scale=(0.05, 0.5))
    _, _, width, height = boxes(value, (2000, 2000)).T
    assert kstest(width * height / 2000**2, "uniform", (0.05, 0.45)).pvalue > 0.01
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert kstest(np.log(width / height), "uniform", (low, high - low)).pvalue > 0.01


@pytest.mark.parametrize(
    "size", [(300, 7), (7, 300), (100, 1), (1, 100), (97, 64), (64, 97), (400, 299)]
)
def test_an_image_that_no_crop_fits_gives_its_centre(size: tuple[int, int]) -> None:
    value = Augmentation(scale=(2.0, 3.0))  # no such crop: ten tries fail
    top, left, height, width = crop_of(Image.new("RGB", size), [2.0, 3.0], [3 / 4, 4 / 3])
    assert crop_box(*size, value, generator(0, 0, 0, 0)) == (left, top, left + width, top + height)
    assert min(width, height) > 0


def test_ten_tries_are_made() -> None:
    value = Augmentation(scale=(0.1, 2.0))
    too_large = [2.0, 0.0]
    last = scripted(uniform=[*too_large * 9, 0.25, 0.0], integers=[1, 2])
    assert crop_box(40, 40, value, last) == (2, 1, 22, 21)
    never = scripted(uniform=[*too_large * 10, 0.25, 0.0], integers=[1, 2])
    assert crop_box(40, 40, value, never) == (0, 0, 40, 40)


# --- random numbers ---------------------------------------------------------------------------


def test_a_seed_a_task_an_epoch_and_an_image_have_numbers_of_their_own() -> None:
    image = picture(40, 30)

    def pixels(*which: Any) -> bytes:
        return augment(image, 32, AUGMENTATIONS["slca"], generator(*which)).tobytes()

    assert pixels(0, 7, 3, 5) == pixels(0, 7, 3, 5) == pixels(0, 7, 3, 5, 0)
    others = [(1, 7, 3, 5), (0, 8, 3, 5), (0, 7, 4, 5), (0, 7, 3, 6), (0, 7, 3, 5, 1)]
    assert len({pixels(0, 7, 3, 5), *(pixels(*which) for which in others)}) == 6
    # Not a sum of the parts, and ids are any int64.
    mixed = [(0, 0, 1, 2), (0, 1, 0, 2), (0, 0, 2, 1), (1, 0, 0, 2), (0, 0, 1, -2)]
    assert len({pixels(*which) for which in mixed}) == 5


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 0)])
def test_flips_and_factors_are_even_and_independent_of_epoch_and_task(other: Any) -> None:
    def draws(seed: int, task: int, epoch: int) -> np.ndarray:
        return np.array([generator(seed, task, epoch, image).random() for image in range(4000)])

    first, second = draws(0, 0, 0), draws(*other)
    for numbers in (first, second):
        assert kstest(numbers, "uniform").pvalue > 0.01
        assert abs((numbers < 0.5).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(4000)


def test_the_draws_of_a_stored_result_stay_what_they_were() -> None:
    """These numbers are in no key: who changes them raises `DRAWS`."""
    assert DRAWS == 2
    assert derive(0, "augment", 0, 0, 1, 0) == GOLDEN_SEED
    assert crop_box(64, 48, LAMDA, generator(0, 0, 0, 1)) == GOLDEN_BOX
    assert generator(7, 3, 2, -5).random() == GOLDEN_NUMBER


GOLDEN_SEED, GOLDEN_BOX = 5555866882809217389, (13, 8, 45, 43)
GOLDEN_NUMBER = 0.6345799355230549


def test_derived_seeds_are_non_negative_int64_and_all_different() -> None:
    seeds = {
        derive(seed, what, epoch, step)
        for seed in range(5)
        for what in ("shuffle", "step")
        for epoch in range(5)
        for step in (-1, 0, 2**62)
    }
    assert len(seeds) == 5 * 2 * 5 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)
    assert derive("1") != derive(1)


# --- names ------------------------------------------------------------------------------------


def test_every_name_that_methods_use_has_values() -> None:
    assert set(get_args(augmentations.Augmentation)) == set(AUGMENTATIONS)


def test_the_values_are_those_of_the_papers_code() -> None:
    assert {name: value.to_json() for name, value in AUGMENTATIONS.items()} == {
        name: {
            "scale": scale,
            "ratio": [3 / 4, 4 / 3],
            "interpolation": interpolation,
            "flip": flip,
            "brightness": brightness,
            **more,
            **({} if name == "none" else {"draws": 2}),
        }
        for name, scale, interpolation, flip, brightness, more in [
            ("none", None, "bilinear", 0.0, 0.0, {}),
            ("flip", None, "bilinear", 0.5, 0.0, {}),
            ("lamda", [0.05, 1.0], "bilinear", 0.5, 0.0, {}),
            ("imagenet", [0.08, 1.0], "bilinear", 0.5, 0.0, {}),
            ("imagenet_bicubic", [0.08, 1.0], "bicubic", 0.5, 0.0, {}),
            ("imagenet_jitter", [0.08, 1.0], "bilinear", 0.5, 63 / 255, {}),
            ("slca", [0.08, 1.0], "bicubic", 0.5, 63 / 255, {}),
            ("clip", [0.9, 1.0], "bicubic", 0.0, 0.0, {}),
            ("vpt", None, "bilinear", 0.5, 0.0, {"resize": [256, 224], "stretch": False}),
            ("fine_grained", None, "bicubic", 0.5, 0.0, {"resize": [300, 224], "stretch": True}),
        ]
    }


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_values_come_back_from_keys(name: str) -> None:
    assert Augmentation.from_json(AUGMENTATIONS[name].to_json()) == AUGMENTATIONS[name]


def test_defaults_are_those_of_the_authors_code() -> None:
    """Read in their repositories; docs/parity.md lists them."""
    expected = {
        **dict.fromkeys(("magmax", "magmax_independent", "zscl"), "clip"),
        "coop": "imagenet_bicubic",
        **dict.fromkeys(("slca", "coma", "cofima", "hide_prompt"), "slca"),
        **dict.fromkeys(("coda_prompt", "lae", "s_prompts", "esn", "lora"), "imagenet"),
        **dict.fromkeys(("l2p", "dualprompt", "ease", "finetune", "ranpac", "aper_ssf"), "lamda"),
        "dap": "none",
    }
    for name, augmentation in expected.items():
        [field] = [field for field in methods.fields(name) if field.name == "augmentation"]
        assert field.default == augmentation, name
    [epochs] = [field.default for field in methods.fields("coop") if field.name == "epochs"]
    assert epochs == 200


# --- squares cut out anywhere -----------------------------------------------------------------


@pytest.mark.parametrize(("size", "edge"), [(224, 256), (384, 438), (448, 512)])
def test_vpt_resizes_as_its_code_does_for_each_of_its_crops(size: int, edge: int) -> None:
    assert resized(800, 600, size, AUGMENTATIONS["vpt"]) == (int(edge * 800 / 600), edge)
    assert resized(600, 800, size, AUGMENTATIONS["vpt"]) == (edge, int(edge * 800 / 600))


def test_fine_grained_images_lose_their_aspect() -> None:
    assert resized(640, 427, 224, AUGMENTATIONS["fine_grained"]) == (300, 300)


@pytest.mark.parametrize("size", [(256, 300), (300, 256), (224, 224)])
def test_squares_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = Image.new("RGB", size)
    theirs = np.array([square_of(image, (224, 224))[:2] for _ in range(3000)])
    ours = np.array([square_box(*size, 224, generator(0, 0, 0, n)) for n in range(3000)])
    assert (ours[:, 2] - ours[:, 0] == 224).all() and (ours[:, 3] - ours[:, 1] == 224).all()
    assert ours.min() >= 0 and ours[:, 2].max() <= size[0] and ours[:, 3].max() <= size[1]
    assert alike(ours[:, 1], theirs[:, 0]) and alike(ours[:, 0], theirs[:, 1])
