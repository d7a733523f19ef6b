"""Decoding of images to pixels: JPEG, PNG and WEBP, nothing else.

The bytes are not trusted: the format is recognised by its first bytes, the size is checked before
anything is decompressed, and a truncated image is an error.
"""

import io

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from graftwork.operators.errors import BadDataError

MAX_PIXELS = 89_478_485
"""Width times height that is decoded unless the spec says otherwise; Pillow's own first limit."""


def check(data: bytes | None, max_pixels: int | None = None) -> tuple[int, int]:
    """Reads the header only.

    Args:
        data: encoded image; None where there is none.
        max_pixels: largest width times height; None for `MAX_PIXELS`.

    Returns:
        Width and height in pixels.

    Raises:
        BadDataError: not an image, or larger than `max_pixels`.
    """
    return _open(data, max_pixels).size


def rgb(data: bytes | None, max_pixels: int | None = None) -> Image.Image:
    """Decodes an image as PIL's `convert("RGB")`, without turning it by its EXIF orientation.

    This is the convention of torchvision's `ImageFolder`: transparency is dropped.

    Args:
        data: encoded image.
        max_pixels: largest width times height; None for `MAX_PIXELS`.

    Raises:
        BadDataError: not an image, truncated, damaged, or larger than `max_pixels`.
    """
    image = _open(data, max_pixels)
    try:
        image.load()
        # Only the warning about dropping it depends on this entry, no pixel does.
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged bytes raise nearly everything
        raise BadDataError(f"truncated or damaged: {_one_line(error)}") from error


def _open(data: bytes | None, max_pixels: int | None) -> ImageFile.ImageFile:
    if not data:
        raise BadDataError("no image bytes" if data is None else "empty (0 bytes)")
    # The classes behind Image.open, without its search through all formats and without its global
    # limit, which warns where the limit of the spec allows more.
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        opener = PngImagePlugin.PngImageFile
    elif data.startswith(b"\xff\xd8\xff"):
        opener = JpegImagePlugin.JpegImageFile
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        opener = WebPImagePlugin.WebPImageFile
    else:
        raise BadDataError("not JPEG, PNG or WEBP")
    try:
        image = opener(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadDataError(f"truncated or damaged: {_one_line(error)}") from error
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    width, height = image.size
    if width * height > limit:
        raise BadDataError(
            f"{width}x{height} = {width * height} pixels, more than max_pixels {limit}"
        )
    return image


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
