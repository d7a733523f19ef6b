"""Decoding: what comes out equals torchvision's convention, what cannot be used is named."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def declared(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        chunks += struct.pack(">I", len(content)) + name + content + checksum
    return b"\x89PNG\r\n\x1a\n" + chunks


def decode(data: bytes, max_pixels: int | None = None) -> torch.Tensor:
    """Pixels uint8 [3, H, W]."""
    image = codec.rgb(data, max_pixels)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("L", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
    ],
)
def test_pixels_equal_pil_convert(mode: str, kind: str) -> None:
    data = encoded(noise(13, 7, mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    pixels = decode(data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 7, 13)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert codec.check(data) == (13, 7)


def test_palette_with_transparency_does_not_warn() -> None:
    palette = noise(8, 8).convert("P")
    data = encoded(palette, "PNG", transparency=bytes(range(256)))
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(data), expected)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(noise(12, 5), "JPEG", exif=exif)).shape == (3, 5, 12)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "no image bytes"),
        (b"", "empty (0 bytes)"),
        (b"just some text", f"not {codec.FORMATS}, but text"),
        (encoded(noise(4, 4), "AVIF"), f"not {codec.FORMATS}, but AVIF"),
        (encoded(noise(4, 4), "JPEG2000"), f"not {codec.FORMATS}, but JPEG 2000"),
        (
            declared(20000, 10000),
            "20000x10000 = 200000000 pixels, more than max_pixels 89478485",
        ),
    ],
)
def test_header_alone_tells(data: bytes | None, why: str) -> None:
    for look in (codec.check, codec.rgb):
        with pytest.raises(BadDataError) as caught:
            look(data)
        assert str(caught.value) == why


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_are_errors(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    with pytest.raises(BadDataError, match=r"^truncated or damaged: \S"):
        decode(data[: int(len(data) * share)])


def test_max_pixels_is_the_limit_itself() -> None:
    data = encoded(noise(10, 10), "PNG")
    assert decode(data, 100).shape == (3, 10, 10)
    with pytest.raises(BadDataError, match="10x10 = 100 pixels, more than max_pixels 99"):
        decode(data, 99)
    assert codec.check(declared(20000, 10000), 10**9) == (20000, 10000)  # no warning of Pillow's


def test_damaged_bytes_raise_nothing_else() -> None:
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        original = np.frombuffer(encoded(noise(16, 16), kind), np.uint8)
        for _ in range(150):
            data = original.copy()
            where = generator.integers(0, len(data), 4)
            data[where] = generator.integers(0, 256, 4)
            try:
                assert decode(data.tobytes(), 10**6).shape[0] == 3
            except BadDataError as error:
                assert "\n" not in str(error)
