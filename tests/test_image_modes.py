"""Every pixel format that Pillow knows has one conversion to RGB, or is refused by its name."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec, modes

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]"""
    return np.asarray(codec.rgb(data))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def wide_png(values: np.ndarray, channels: int = 1) -> bytes:
    """A PNG with 16 bits of grey, grey and alpha, or colour: uint16 [H, W, channels]."""
    height, width = values.shape[:2]
    kind = {1: 0, 2: 4, 3: 2}[channels]
    rows = values.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = b""
    for name, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        chunks += struct.pack(">I", len(content)) + name + content + checksum
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(values: np.ndarray, bits: int, tags: dict[int, int], order: str = "<") -> bytes:
    """A TIFF without compression: the bytes of `values` as they are, and tags of one short each."""
    height, width = values.shape[:2]
    every = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height} | tags
    start = 8 + 2 + 12 * (len(every) + 2) + 4
    every |= {273: start, 279: values.nbytes}
    entries = b"".join(
        struct.pack(f"{order}HHI", number, 4 if number in (273, 279) else 3, 1)
        + struct.pack(f"{order}I" if number in (273, 279) else f"{order}HH", *own)
        for number, value in sorted(every.items())
        for own in [(value,) if number in (273, 279) else (value, 0)]
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(every)) + entries + b"\0\0\0\0"
    return head + values.tobytes()


@pytest.mark.parametrize("factor", [256, 257])
def test_a_picture_has_the_same_pixels_in_8_and_in_16_bits(factor: int) -> None:
    wide = GREY.astype(np.uint16) * factor
    expected = pixels(encoded(Image.fromarray(GREY), "PNG"))
    assert np.array_equal(expected, grey(GREY))
    for data in (
        wide_png(wide),
        encoded(Image.fromarray(wide), "PNG"),
        encoded(Image.fromarray(wide), "TIFF"),
        encoded(Image.fromarray(wide), "TIFF", compression="tiff_lzw"),
        tiff(wide.astype("<u2"), 16, {}),
        tiff(wide.astype(">u2"), 16, {}, ">"),
        tiff((65535 - wide).astype("<u2"), 16, {262: 0}),  # white is 0
        b"P5 16 16 65535\n" + wide.astype(">u2").tobytes(),
        wide_png(np.repeat(wide[..., None], 3, axis=2), 3),
        wide_png(np.stack([wide, np.full_like(wide, 65535)], axis=2), 2),
    ):
        assert np.array_equal(pixels(data), expected)
        assert codec.check(data) == (16, 16)


def test_the_largest_of_16_bits_is_255_and_the_smallest_0() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert pixels(wide_png(values))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_12_bits_of_a_tiff_are_taken_as_12() -> None:
    # Two values 0xABC, 0x123 in three bytes.
    data = tiff(np.array([[0xAB, 0xC1, 0x23]], dtype=np.uint8), 12, {256: 2})
    assert pixels(data)[0, :, 0].tolist() == [0xAB, 0x12]


def test_a_pgm_of_another_range_is_scaled_to_its_own_maximum() -> None:
    values = np.array([[0, 500, 1000]], dtype=">u2")
    assert pixels(b"P5 3 1 1000\n" + values.tobytes())[0, :, 0].tolist() == [0, 128, 255]


PALETTE = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
ALPHA = np.dstack([COLOUR, np.full((5, 7), 9, np.uint8)])


@pytest.mark.parametrize("mode", sorted({*Image.MODES, "I;16L"}))
def test_every_mode_of_pillow_is_converted_or_refused(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    if mode not in modes.CONVERSIONS:
        assert mode == "F"
        with pytest.raises(BadDataError, match=rf"\(mode {mode}\).*convert it to PNG"):
            modes.to_rgb(image)
        return
    found = modes.to_rgb(image)
    assert (found.mode, found.size) == ("RGB", (3, 2))


def test_values_of_every_mode() -> None:
    rgb, luma = Image.fromarray(COLOUR), Image.fromarray(GREY)
    bits = Image.fromarray(GREY > 100)
    with_alpha = Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA")
    four = Image.fromarray(ALPHA, "RGBA")
    extra = Image.merge("RGBX", [*rgb.split(), luma.resize(rgb.size)])
    for image, expected, within in (
        (bits, grey(np.where(GREY > 100, 255, 0)), 0),
        (luma, grey(GREY), 0),
        (with_alpha, grey(GREY), 0),
        (PALETTE, np.asarray(PALETTE.convert("RGB")), 0),
        (PALETTE.convert("PA"), np.asarray(PALETTE.convert("RGB")), 0),
        (rgb, COLOUR, 0),
        (four, COLOUR, 0),
        (extra, COLOUR, 0),
        (rgb.convert("CMYK"), COLOUR, 1),
        (rgb.convert("YCbCr"), COLOUR, 3),
        (rgb.convert("HSV"), COLOUR, 6),
    ):
        found = np.asarray(modes.to_rgb(image)).astype(int)
        assert np.abs(found - expected).max() <= within, image.mode


def test_colours_multiplied_by_their_alpha_are_divided_again() -> None:
    half = Image.fromarray(np.array([[[200, 100, 50, 128]]], np.uint8), "RGBA").convert("RGBa")
    found = np.asarray(modes.to_rgb(half)).astype(int)
    assert np.abs(found - [200, 100, 50]).max() <= 2
    grey_half = Image.fromarray(np.array([[[200, 128]]], np.uint8), "LA").convert("La")
    assert np.abs(np.asarray(modes.to_rgb(grey_half)).astype(int) - 200).max() <= 2


def test_lab_is_near_what_a_colour_profile_makes_of_it() -> None:
    lab = ImageCms.createProfile("LAB")
    there = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    for colour in ((255, 0, 0), (0, 128, 0), (40, 60, 200), (128, 128, 128)):
        image = ImageCms.applyTransform(Image.new("RGB", (1, 1), colour), there)
        assert image is not None
        found = np.asarray(codec.rgb(encoded(image, "TIFF")))[0, 0].astype(int)
        assert np.abs(found - colour).max() <= 12, colour


@pytest.mark.parametrize("given", [3, bytes(range(256))], ids=["index", "bytes"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparency_of_a_palette_is_dropped(kind: str, given: int | bytes) -> None:
    if kind == "GIF" and isinstance(given, bytes):
        given = 5
    data = encoded(PALETTE, kind, transparency=given)
    expected = pixels(encoded(PALETTE, kind))
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(expected, np.asarray(PALETTE.convert("RGB")))
    assert codec.look(data).transparent


def test_adobes_inverted_cmyk_is_turned_round_once() -> None:
    flat = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    found = pixels(encoded(flat, "JPEG", quality=100)).astype(int)
    assert np.abs(found - (200, 30, 60)).max() <= 4


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "floating point (mode F)"),
        (encoded(Image.new("F", (2, 2), 0.5), "PPM"), "floating point (mode F)"),
        (encoded(Image.new("I", (2, 2), 9), "TIFF"), "signed values (mode I)"),
        (tiff(np.zeros((2, 2), np.uint32), 32, {}), "32 bits of grey (mode I)"),
        (tiff(np.zeros((2, 2), np.int16), 16, {339: 2}), "signed values (mode I)"),
        (tiff(np.zeros((2, 2), np.int8), 8, {339: 2}), "signed values (mode L)"),
    ],
)
def test_values_without_a_range_are_refused_before_decoding(data: bytes, why: str) -> None:
    for look in (codec.check, codec.rgb, codec.look):
        with pytest.raises(BadDataError) as caught:
            look(data)
        assert str(caught.value).startswith(why)
        assert str(caught.value).endswith("no range; convert it to PNG with 8 or 16 bits") or (
            str(caught.value).endswith("is unknown; convert it to PNG with 8 or 16 bits")
        )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
def test_formats_without_loss_agree(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    source = PALETTE.convert("RGB") if kind == "GIF" else Image.fromarray(COLOUR)
    data = encoded(source, kind, **options)
    assert np.array_equal(pixels(data), np.asarray(source))
    assert codec.look(data).format == kind


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(pixels(data), np.asarray(frames[0]))
    assert codec.look(data).several
    assert not codec.look(encoded(frames[0], kind)).several


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_no_image_but_tiff(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOUR)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(image, kind, exif=exif)
        plain = encoded(image, kind)
        assert np.array_equal(pixels(data), pixels(plain))
        assert codec.look(data).orientation == orientation
    turned = {6: np.rot90(COLOUR, -1), 3: COLOUR[::-1, ::-1], 8: np.rot90(COLOUR)}
    if orientation in turned:
        data = encoded(image, "TIFF", tiffinfo={274: orientation})
        assert np.array_equal(pixels(data), turned[orientation])
        look = codec.look(data)
        assert (look.size, look.orientation) == (pixels(data).shape[1::-1], orientation)


def test_how_an_image_is_stored() -> None:
    look = codec.look(wide_png(GREY.astype(np.uint16) * 16))
    assert (look.mode, look.bits, look.highest) == ("I;16", 16, 255 * 16)
    assert codec.look(wide_png(np.zeros((2, 2, 3), np.uint16), 3)).bits == 16
    assert codec.look(encoded(Image.new("1", (2, 2)), "PNG")).bits == 1
    opaque = Image.fromarray(np.dstack([COLOUR, np.full((5, 7), 255, np.uint8)]), "RGBA")
    assert not codec.look(encoded(opaque, "PNG")).transparent
    assert codec.look(encoded(Image.fromarray(ALPHA, "RGBA"), "PNG")).transparent


def test_only_images_whose_pixels_changed_are_known_by_another_digest() -> None:
    for image in (Image.fromarray(COLOUR), Image.fromarray(GREY), PALETTE):
        data = encoded(image, "PNG")
        assert codec.digest(data) == hashlib.sha256(data).digest()
    colour = wide_png(np.zeros((2, 2, 3), np.uint16), 3)
    assert codec.digest(colour) == hashlib.sha256(colour).digest()
    wide = wide_png(GREY.astype(np.uint16))
    assert codec.digest(wide) != hashlib.sha256(wide).digest()
    assert codec.digest(wide) != codec.digest(wide_png(GREY.astype(np.uint16) + 1))


def bomb(kind: str) -> bytes:
    """A header that promises 20000 x 10000 pixels, and next to nothing."""
    if kind == "GIF":  # a small screen, and a frame that is larger
        screen = struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + bytes(6)
        return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, 20000, 10000, 0) + b"\x02\0;"
    if kind == "BMP":
        info = struct.pack("<IiiHHIIiiII", 40, 20000, 10000, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info
    if kind == "PPM":
        return b"P6 20000 10000 255\n"
    return tiff(np.zeros((1, 1), np.uint8), 8, {256: 20000, 257: 10000})


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "TIFF"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_named_before_anything_is_decoded(kind: str) -> None:
    for look in (codec.check, codec.rgb):
        with pytest.raises(BadDataError, match=r"pixels.* more than max_pixels|more pixels than"):
            look(bomb(kind))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"<html>moved</html>", "a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0", "AVIF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b"label,path\n", "text"),
    ],
)
def test_what_lies_in_place_of_an_image_is_named(data: bytes, name: str) -> None:
    with pytest.raises(BadDataError) as caught:
        codec.check(data)
    assert str(caught.value).startswith(f"not {codec.FORMATS}, but {name}")
