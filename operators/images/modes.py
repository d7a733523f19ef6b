"""Conversion of every pixel format that Pillow knows to RGB of 8 bits, or a refusal by name.

What Pillow's `convert("RGB")` does right is done by it, as torchvision's `ImageFolder` does.
Pillow clips 16 bits, which makes nearly every pixel white: here the upper 8 bits are taken. So
does Pillow itself for colour images of 16 bits, and a picture has the same pixels whether it was
stored with 8 bits or with 16 (as v * 257 or as v * 256).
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from graftwork.operators.errors import BadDataError

_AS_IS = "as it is"
_OPAQUE = "transparency is dropped"
_UPPER = "the upper 8 of 16 bits"
_PILLOW = "converted without a colour profile"

CONVERSIONS: Mapping[str, str] = {
    "1": "0 and 255",
    "L": "grey in all three channels",
    "LA": _OPAQUE,
    "La": _OPAQUE,
    "P": "colours of the palette",
    "PA": _OPAQUE,
    "RGB": _AS_IS,
    "RGBA": _OPAQUE,
    "RGBa": _OPAQUE,
    "RGBX": "the fourth channel is dropped",
    "CMYK": _PILLOW,
    "YCbCr": _PILLOW,
    "HSV": _PILLOW,
    "LAB": _PILLOW,
    "I": _UPPER,
    "I;16": _UPPER,
    "I;16L": _UPPER,
    "I;16B": _UPPER,
    "I;16N": _UPPER,
}
"""Pillow's mode -> what is done about it. "F", floating point, is refused: it has no range."""

WORDS: Mapping[str, str] = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "La": "grey with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGB": "colour",
    "RGBA": "colour with transparency",
    "RGBa": "colour with transparency",
    "RGBX": "colour and a fourth channel",
    "CMYK": "printing colours",
    "YCbCr": "luminance and colour",
    "HSV": "hue",
    "LAB": "Lab colour",
}
"""Pillow's mode -> what people call it; others are grey."""

WIDE = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N"))
"""Modes of grey values with more than 8 bits."""
ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
"""Modes with a channel of transparency."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF: bits of each sample, what 0 means, and unsigned (1), signed (2) or float (3)."""
_WHITE_IS_ZERO = 0
_INSTEAD = "convert it to PNG with 8 or 16 bits"


def check(image: Image.Image) -> None:
    """Refuses an image whose values have no defined range; no pixel is looked at.

    Raises:
        BadDataError: names the mode and what to do.
    """
    signed = 2 in _tag(image, _SAMPLE_FORMAT)
    if image.mode == "F":
        raise BadDataError(f"floating point (mode F), which has no range; {_INSTEAD}")
    if signed:
        raise BadDataError(f"signed values (mode {image.mode}), which have no range; {_INSTEAD}")
    if image.mode == "I" and image.format == "TIFF":
        raise BadDataError(f"32 bits of grey (mode I), whose range is unknown; {_INSTEAD}")
    if image.mode not in CONVERSIONS:
        raise BadDataError(f"mode {image.mode}, which is unknown; {_INSTEAD}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in mode RGB, from any mode of `CONVERSIONS`.

    Raises:
        BadDataError: `check` refuses it.
    """
    check(image)
    # Only the warning about dropping it depends on this entry, no pixel does.
    image.info.pop("transparency", None)
    if image.mode in WIDE:
        return Image.fromarray(_upper(image)).convert("RGB")
    if image.mode == "La":  # Pillow knows this way only
        image = image.convert("LA")
    return image.convert("RGB")


def highest(image: Image.Image) -> int | None:
    """The largest value of a grey image with more than 8 bits; None for another."""
    return int(np.asarray(image).max()) if image.mode in WIDE else None


def bits(image: Image.Image) -> int:
    """Bits of each sample as they are stored: 1, 8, 12 or 16, ..."""
    if stored := _tag(image, _BITS):
        return max(stored)
    return 1 if image.mode == "1" else 16 if image.mode in WIDE else 8


def _upper(image: Image.Image) -> np.ndarray:
    """uint8 [H, W]: the upper 8 bits of grey values."""
    depth = 12 if _tag(image, _BITS) == (12,) else 16
    values = np.clip(np.asarray(image).astype(np.int64), 0, 2**depth - 1)
    if _tag(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,):  # Pillow turns these round for 8 bits only
        values = 2**depth - 1 - values
    return (values >> (depth - 8)).astype(np.uint8)


def _tag(image: Image.Image, number: int) -> tuple[int, ...]:
    """Values of a TIFF's tag; empty for another format, and where there is none."""
    value = getattr(image, "tag_v2", {}).get(number, ())
    return tuple(value) if isinstance(value, tuple) else (value,)
