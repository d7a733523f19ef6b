"""Decoding of images to pixels: PNG, JPEG, WEBP, BMP, TIFF, GIF and PPM, nothing else.

The bytes are not trusted: the format is recognised by its first bytes, the size is checked before
anything is decompressed, and a truncated image is an error. Of several pictures in a file the
first is taken.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from graftwork.operators.errors import BadDataError
from graftwork.operators.images import modes

MAX_PIXELS = 89_478_485
"""Width times height that is decoded unless the spec says otherwise; Pillow's own first limit."""

FORMATS = "PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM"
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112

# The classes behind Image.open, without its search through all formats and without its global
# limit, which warns where the limit of the spec allows more.
_OPENERS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(re.escape(_PNG)), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"P[1-6fF][\s#]"), PpmImagePlugin.PpmImageFile),
)

_OTHERS: Mapping[str, re.Pattern[bytes]] = {
    "HEIC": re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL),
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "Photoshop": re.compile(rb"8BPS"),
    "PDF": re.compile(rb"%PDF"),
    "ICO": re.compile(rb"\0\0[\x01\x02]\0"),
    "a ZIP archive": re.compile(rb"PK\x03\x04"),
    "a NumPy array": re.compile(rb"\x93NUMPY"),
    "a pointer of Git LFS (git lfs pull)": re.compile(rb"version https://git-lfs"),
    "SVG": re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg", re.S),
    "a web page": re.compile(rb"\s*(<!doctype html|<html|<head|<body)", re.IGNORECASE),
    "text": re.compile(rb"(\xef\xbb\xbf)?[\t\n\r\x20-\x7e]{1,64}\Z|[\t\n\r\x20-\x7e]{64}"),
}
"""What is found in place of images, by its first bytes; the first that fits names it."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """An image as it is stored.

    Args:
        size: width and height in pixels, as decoded.
        format: Pillow's name, such as "PNG".
        mode: Pillow's mode of the pixels, such as "RGB".
        bits: of each sample in the file.
        orientation: of EXIF, 1 to 8; 1 where nothing is said.
        several: whether more pictures follow the first.
        transparent: whether a pixel is not opaque.
        highest: the largest value of a grey image with more than 8 bits; None for another.
    """

    size: tuple[int, int]
    format: str
    mode: str
    bits: int
    orientation: int
    several: bool
    transparent: bool
    highest: int | None


def check(data: bytes | None, max_pixels: int | None = None) -> tuple[int, int]:
    """Reads the header only.

    Args:
        data: encoded image; None where there is none.
        max_pixels: largest width times height; None for `MAX_PIXELS`.

    Returns:
        Width and height in pixels.

    Raises:
        BadDataError: not an image, of a refused mode, or larger than `max_pixels`.
    """
    return _open(data, max_pixels).size


def rgb(data: bytes | None, max_pixels: int | None = None) -> Image.Image:
    """Decodes an image to mode RGB, as `modes.CONVERSIONS` says.

    This is the convention of torchvision's `ImageFolder`, PIL's `convert("RGB")`, but for 16 bits
    of grey: transparency is dropped, and an orientation in EXIF turns no image but TIFF, for which
    Pillow always follows it.

    Args:
        data: encoded image.
        max_pixels: largest width times height; None for `MAX_PIXELS`.

    Raises:
        BadDataError: not an image, truncated, damaged, of a refused mode, or larger than
            `max_pixels`.
    """
    return _loaded(_open(data, max_pixels))


def look(data: bytes | None, max_pixels: int | None = None) -> Look:
    """Decodes an image as `rgb` does, and says how it is stored.

    Raises:
        BadDataError: as `rgb`.
    """
    image = _open(data, max_pixels)
    mode, bits, orientation = image.mode, _bits(image, data or b""), _orientation(image)
    several = _several(image)
    # Of the first picture again: what was asked for may have moved to another.
    image = _open(data, max_pixels)
    clear = image.info.get("transparency") is not None
    size = _loaded(image).size
    if image.mode in modes.ALPHA:
        clear = image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    return Look(
        size=size,
        format=image.format or "",
        mode=mode,
        bits=bits,
        orientation=orientation,
        several=several,
        transparent=clear,
        highest=modes.highest(image),
    )


def digest(data: bytes | None) -> bytes:
    """The 32 bytes that an image is known by in every key: sha256 of the encoded bytes.

    Of a PNG with 16 bits of grey the rule that makes 8 of them takes part: an earlier version of
    this program had other pixels for it, and results made of them must not be taken for these.
    """
    found = hashlib.sha256(data or b"").digest()
    if data and data.startswith(_PNG) and data[24:26] == b"\x10\x00":  # depth 16, colour type grey
        return hashlib.sha256(b"upper 8 of 16 bits\0" + found).digest()
    return found


def _loaded(image: ImageFile.ImageFile) -> Image.Image:
    try:
        image.load()
        return modes.to_rgb(image)
    except (MemoryError, BadDataError):
        raise
    except Exception as error:  # decoders of damaged bytes raise nearly everything
        raise BadDataError(f"truncated or damaged: {_one_line(error)}") from error


def _open(data: bytes | None, max_pixels: int | None) -> ImageFile.ImageFile:
    if not data:
        raise BadDataError("no image bytes" if data is None else "empty (0 bytes)")
    opener = next((opener for start, opener in _OPENERS if start.match(data[:16])), None)
    if opener is None:
        raise BadDataError(f"not {FORMATS}{_instead(data)}")
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        image = opener(io.BytesIO(data))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadDataError(f"more pixels than max_pixels {limit}: {_one_line(error)}") from error
    except Exception as error:  # as above
        raise BadDataError(f"truncated or damaged: {_one_line(error)}") from error
    width, height = image.size
    if width * height > limit:
        raise BadDataError(
            f"{width}x{height} = {width * height} pixels, more than max_pixels {limit}"
        )
    modes.check(image)
    return image


def _instead(data: bytes) -> str:
    """Name of what is there in place of an image, for people; empty if it is not known."""
    start = data[:512]
    name = next((name for name, pattern in _OTHERS.items() if pattern.match(start)), "")
    return f", but {name}" if name else ""


def _bits(image: ImageFile.ImageFile, data: bytes) -> int:
    return data[24] if image.format == "PNG" else modes.bits(image)


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing, and no pixel depends on it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _several(image: ImageFile.ImageFile) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damaged behind its first picture
        return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
