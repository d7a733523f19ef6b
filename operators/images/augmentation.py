"""Training augmentations: named values, and what they do to an image.

Random numbers belong to (seed, task, epoch, image): the same image in the same epoch of a task is
augmented alike on any worker, in any batch, and after any interruption. An exemplar has new ones in
every task, and so has an image that stands in a task twice.
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


DRAWS = 2
"""Version of how random numbers become pixels, in the keys of what is augmented at random."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A random crop, horizontal flip, brightness: torchvision's transforms on PIL images.

    Args:
        scale: smallest and largest share of the image's area, as in RandomResizedCrop; None cuts
            none of it out.
        ratio: smallest and largest width / height of such a crop.
        interpolation: of the resizing of the crop, or before it.
        flip: probability of a horizontal flip.
        brightness: largest relative change.
        resize: (edge, size): the shorter edge that an image has before a square of `size` pixels is
            cut out of it anywhere, as in Resize and RandomCrop; edges of other squares grow with
            them, rounded down. None for none: without a scale either, the test transform.
        stretch: resizes both edges to that, whatever the aspect.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.0
    brightness: float = 0.0
    resize: tuple[int, int] | None = None
    stretch: bool = False

    @property
    def crops(self) -> bool:
        """Tells whether it crops the image itself, not what the test transform leaves of it."""
        return self.scale is not None or self.resize is not None

    @property
    def draws(self) -> bool:
        """Tells whether anything is random."""
        return self.crops or bool(self.flip or self.brightness)

    def to_json(self) -> dict[str, Any]:
        """The values, for keys."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        resizing = {name: values.pop(name) for name in ("resize", "stretch")}
        return {
            **values,
            **(resizing if self.resize is not None else {}),
            **({"draws": DRAWS} if self.draws else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Augmentation":
        """The inverse of `to_json`."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        given.pop("draws", None)
        return cls(**given)


_FLIP: dict[str, Any] = {"flip": 0.5}
_IMAGENET: dict[str, Any] = {"scale": (0.08, 1.0), **_FLIP}
_JITTER: dict[str, Any] = {"brightness": 63 / 255}

AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(),
    "flip": Augmentation(**_FLIP),
    # RevisitingCIL, PILOT, EASE, MOS, RanPAC, L2P and DualPrompt; HiDe-Prompt on ImageNet-R.
    "lamda": Augmentation(scale=(0.05, 1.0), **_FLIP),
    # CODA-Prompt, LAE, S-Prompts, and ESN on CORe50 and DomainNet: torchvision's defaults.
    "imagenet": Augmentation(**_IMAGENET),
    # CoOp; SLCA, CoMA and CoFiMA on ImageNet-R.
    "imagenet_bicubic": Augmentation(interpolation="bicubic", **_IMAGENET),
    # S-Prompts on CDDB, ESN on ImageNet.
    "imagenet_jitter": Augmentation(**_IMAGENET, **_JITTER),
    # SLCA, CoMA, CoFiMA and HiDe-Prompt on CIFAR-100.
    "slca": Augmentation(interpolation="bicubic", **_IMAGENET, **_JITTER),
    # open_clip's training transform: MagMax, ZSCL.
    "clip": Augmentation(scale=(0.9, 1.0), interpolation="bicubic"),
    # KMnP/vpt on its fine-grained data sets: a crop of 224 of 256 pixels, of 384 of 438.
    "vpt": Augmentation(resize=(256, 224), **_FLIP),
    # SLCA, CoMA and CoFiMA on CUB and Cars.
    "fine_grained": Augmentation(resize=(300, 224), stretch=True, interpolation="bicubic", **_FLIP),
}


def generator(
    seed: int, task: int, epoch: int, image: int, occurrence: int = 0
) -> np.random.Generator:
    """The random numbers of an image in an epoch of a task.

    Args:
        image: id that follows from the image's bytes.
        occurrence: how many equal images of the task stand before it.
    """
    drawn = derive(seed, "augment", task, epoch, image, occurrence)
    return np.random.Generator(np.random.Philox(drawn))


def square_box(
    width: int, height: int, size: int, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of torchvision's `RandomCrop` of an image that is large enough."""
    top = int(random.integers(0, height - size + 1))
    left = int(random.integers(0, width - size + 1))
    return left, top, left + size, top + size


def resized(width: int, height: int, size: int, value: Augmentation) -> tuple[int, int]:
    """Width and height before a square of `size` is cut out; rounded down as in torchvision."""
    assert value.resize is not None
    edge = value.resize[0] * size // value.resize[1]
    if value.stretch:
        return edge, edge
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


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
        image: mode RGB; already of that size unless the augmentation crops.
    """
    if value.scale is not None:
        box = crop_box(*image.size, value, random)
        image = image.crop(box).resize((size, size), _PIL[value.interpolation])
    elif value.resize is not None:
        image = image.resize(resized(*image.size, size, value), _PIL[value.interpolation])
        image = image.crop(square_box(*image.size, size, random))
    if value.flip and random.random() < value.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if value.brightness:
        factor = random.uniform(max(0.0, 1 - value.brightness), 1 + value.brightness)
        image = ImageEnhance.Brightness(image).enhance(factor)
    return image
