"""Training augmentations: named values, and what they do to an image.

Random numbers belong to (seed, epoch, image): the same image in the same epoch is augmented alike
on any worker, in any batch, and after any interruption.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from graftwork.operators.seeds import derive

_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
TRIES = 10
"""Crops tried before the centre is taken, as in torchvision."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """RandomResizedCrop, horizontal flip, brightness: torchvision's transforms on PIL images.

    Args:
        scale: smallest and largest share of the image's area; None takes the test transform.
        ratio: smallest and largest width / height of the crop.
        interpolation: of the resizing of the crop.
        flip: probability of a horizontal flip.
        brightness: largest relative change.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.0
    brightness: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The values, for keys."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(),
    "flip": Augmentation(flip=0.5),
    # RevisitingCIL, PILOT, EASE, MOS, RanPAC, L2P and DualPrompt.
    "lamda": Augmentation(scale=(0.05, 1.0), flip=0.5),
    # CODA-Prompt: torchvision's defaults.
    "imagenet": Augmentation(scale=(0.08, 1.0), flip=0.5),
    # SLCA on CIFAR-100.
    "slca": Augmentation(scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, brightness=63 / 255),
}


def generator(seed: int, epoch: int, image: int) -> np.random.Generator:
    """The random numbers of an image in an epoch.

    Args:
        image: id that follows from the image's bytes.
    """
    return np.random.Generator(np.random.Philox(derive(seed, "augment", epoch, image)))


def crop_box(
    width: int, height: int, value: Augmentation, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of torchvision's `RandomResizedCrop`."""
    assert value.scale is not None
    low, high = (math.log(r) for r in value.ratio)
    for _ in range(TRIES):
        area = width * height * random.uniform(*value.scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(random.integers(0, height - h + 1))
            left = int(random.integers(0, width - w + 1))
            return left, top, left + w, top + h
    shape = width / height
    w, h = width, height
    if shape < value.ratio[0]:
        h = round(w / value.ratio[0])
    elif shape > value.ratio[1]:
        w = round(h * value.ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augment(
    image: Image.Image, size: int, value: Augmentation, random: np.random.Generator
) -> Image.Image:
    """An augmented image of `size` x `size` pixels.

    Args:
        image: mode RGB; with `scale` None already of that size.
    """
    if value.scale is not None:
        box = crop_box(*image.size, value, random)
        image = image.crop(box).resize((size, size), _PIL[value.interpolation])
    if value.flip and random.random() < value.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if value.brightness:
        factor = random.uniform(max(0.0, 1 - value.brightness), 1 + value.brightness)
        image = ImageEnhance.Brightness(image).enhance(factor)
    return image
