"""Preprocessing on pixels: decode, resize, crop, normalise.

Pixels stay uint8 until they are on the device. Every pixel equals what torchvision's transforms
make of a PIL image. Pillow resizes with weights of 22 bits, torch's much faster kernel for uint8
with 16; torch is used only where all weights that matter fit in its 16 bits without rounding,
which makes both sum up the same integers: where edges grow by a power of two (32 -> 256), up to
the border that the crop removes. Pillow resizes everything else; where images shrink it would
even round in another order, because it begins with the height of tall ones.

Shapes: B batch, h and w the preprocessed height and width, H and W those of the image.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec
from graftwork.operators.images.preprocessing import Preprocessing

_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def prepare(
    images: Sequence[bytes], preprocessing: Preprocessing, max_pixels: int | None = None
) -> Tensor:
    """Decodes, resizes and crops.

    Args:
        images: encoded images of any sizes.
        preprocessing: `mean` and `std` are left to `normalise`.
        max_pixels: largest width times height of an image; None for `images.MAX_PIXELS`.

    Returns:
        uint8 [B, 3, h, w], channels last in memory.

    Raises:
        BadDataError: an image cannot be decoded, or without a crop the sizes differ.
    """
    return resize_and_crop([codec.rgb(data, max_pixels) for data in images], preprocessing)


def resize_and_crop(decoded: Sequence[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """`prepare` for images that are already decoded, all in mode RGB."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, image in enumerate(decoded):
        groups[image.size].append(position)
    resized = {size: _resized(size, preprocessing.resize) for size in groups}
    crop = preprocessing.crop
    frames = {(crop, crop)} if crop else set(resized.values())
    if len(frames) > 1:
        sizes = ", ".join(f"{w}x{h}" for w, h in sorted(frames)[:3])
        raise BadDataError(f"images differ in size ({sizes}, ...); set preprocessing.crop")
    width, height = frames.pop() if frames else (0, 0)
    out = torch.zeros(len(decoded), height, width, 3, dtype=torch.uint8)
    for size, positions in groups.items():
        (x, into_x), (y, into_y) = (
            _window(r, f) for r, f in zip(resized[size], (width, height), strict=True)
        )
        chosen = [decoded[p] for p in positions]
        mode = preprocessing.interpolation
        if _torch_is_exact(size[0], resized[size][0], x.start, x.stop, mode) and _torch_is_exact(
            size[1], resized[size][1], y.start, y.stop, mode
        ):
            pixels = _resize_by_torch(chosen, resized[size], mode)[:, y, x]
        else:
            pixels = _resize_by_pillow(chosen, resized[size], mode, x, y)
        if len(groups) == 1:
            out[:, into_y, into_x] = pixels
        else:
            out[torch.tensor(positions), into_y, into_x] = pixels
    return out.permute(0, 3, 1, 2)


def normalise(
    pixels: Tensor, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(pixels / 255 - mean) / std, computed in float32 as torchvision does.

    Args:
        pixels: uint8 [B, 3, h, w] on any device.
        dtype: of the result.

    Returns:
        [B, 3, h, w] on the same device, channels last in memory whatever the pixels' layout: a
        convolution sums in another order for another layout, and a batch that was filled up or
        put together of single images has another one than a batch decoded at once.
    """
    values = pixels.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
    if preprocessing.mean != (0.0, 0.0, 0.0):
        values.sub_(values.new_tensor(preprocessing.mean).view(3, 1, 1))
    if preprocessing.std != (1.0, 1.0, 1.0):
        values.div_(values.new_tensor(preprocessing.std).view(3, 1, 1))
    return values.to(dtype)


def _resized(size: tuple[int, int], shorter: int | None) -> tuple[int, int]:
    """Width and height after Resize, rounded down as torchvision does."""
    width, height = size
    if shorter is None:
        return size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _window(size: int, frame: int) -> tuple[slice, slice]:
    """The part of an edge that CenterCrop takes, and its place in the frame."""
    if size < frame:
        # torchvision pads (frame - size) // 2 in front and then finds nothing to cut.
        before = (frame - size) // 2
        return slice(0, size), slice(before, before + size)
    start = round((size - frame) / 2.0)
    return slice(start, start + frame), slice(0, frame)


def _resize_by_torch(chosen: list[Image.Image], size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [B, H, W, 3] of equally large images."""
    width, height = chosen[0].size
    joined = bytearray(b"".join(image.tobytes() for image in chosen))
    pixels = torch.frombuffer(joined, dtype=torch.uint8).view(-1, height, width, 3)
    if size == (width, height):
        return pixels
    # Channels last: the kernel then works on whole pixels, four times as fast.
    result = F.interpolate(
        pixels.permute(0, 3, 1, 2),
        size=(size[1], size[0]),
        mode=mode,
        align_corners=False,
        antialias=True,
    )
    return result.permute(0, 2, 3, 1)


def _resize_by_pillow(
    chosen: list[Image.Image], size: tuple[int, int], mode: str, x: slice, y: slice
) -> Tensor:
    """uint8 [B, h, w, 3]: the window of each resized image."""
    arrays = [
        np.asarray(image if image.size == size else image.resize(size, _PIL[mode]))[y, x]
        for image in chosen
    ]
    return torch.from_numpy(np.stack(arrays))


@lru_cache(maxsize=4096)
def _torch_is_exact(size: int, resized: int, start: int, stop: int, mode: str) -> bool:
    """Tells whether torch's 16-bit weights of the output pixels start..stop-1 are Pillow's."""
    if size == resized:
        return True
    if resized / size not in (2.0, 4.0, 8.0, 16.0, 32.0):  # other ratios have other fractions
        return False
    weights = _weights(size, resized, mode)
    # torch: as many bits behind the point as keep the largest weight in 16 bits with its sign.
    largest = weights.max()
    bits = max(b for b in range(22) if int(0.5 + largest * 2**b) < 2**15)
    scaled = weights[start:stop] * 2**bits
    return bool(np.abs(scaled - np.rint(scaled)).max() < 1e-9)


def _weights(size: int, resized: int, mode: str) -> np.ndarray:
    """Pillow's weights [resized, size] before they are rounded."""
    scale = size / resized
    stretch = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    support = (2.0 if mode == "bicubic" else 1.0) * stretch
    low = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centres + support + 0.5).astype(np.int64), size)
    inputs = np.arange(size)
    x = np.abs((inputs[None] - centres[:, None] + 0.5) / stretch)
    if mode == "bicubic":  # Keys' kernel with a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        values = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    else:
        values = np.maximum(1.0 - x, 0.0)
    values[(inputs[None] < low[:, None]) | (inputs[None] >= high[:, None])] = 0.0
    return values / values.sum(axis=1, keepdims=True)
