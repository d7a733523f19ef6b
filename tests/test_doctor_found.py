"""Doctor on a folder with one of everything: each is counted, and it is said what is done."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from graftwork.operators.data import dataset
from graftwork.pipelines.describing.rendering import render
from graftwork.pipelines.describing.report import Report, describe
from tests.no_memo import NoMemo

NAMES = ((0, "cat"), (1, "dog"))
NUMBERS = np.random.default_rng(0)


def noise(width: int = 8, height: int = 8, channels: int = 3) -> Image.Image:
    values = NUMBERS.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def folder(path: Path, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def index(train: str, test: str, **more: Any) -> dataset.Dataset:
    return dataset.index({"train": [train], "test": [test], **more}, NoMemo(), threads=1)


def plain() -> dict[str, bytes]:
    return {f"{name}/{n}.png": encoded(noise()) for name in ("cat", "dog") for n in range(2)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    wide = NUMBERS.integers(0, 256, (8, 8)).astype(np.uint16) * 257
    frames = [noise().convert("P") for _ in range(2)]
    odd = {
        "cat/a.bmp": encoded(noise(), "BMP"),
        "cat/b.TIF": encoded(noise(), "TIFF", tiffinfo={274: 6}),
        "cat/c.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cat/d.jpg": encoded(noise(), "JPEG", exif=turned(6)),
        "cat/e.jpg": encoded(noise()),
        "cat/f.png": encoded(Image.fromarray(wide)),
        "cat/g.png": encoded(noise(channels=4)),
        "cat/h.jpg": encoded(noise().convert("CMYK"), "JPEG"),
        "cat/i.webp": encoded(noise(90, 10), "WEBP"),
        "cat/j.pgm": encoded(noise(channels=1), "PPM"),
        "cat/x.heic": b"x",
        "cat/.DS_Store": b"x",
        "cat/notes.txt": b"x",
        "stray.png": encoded(noise()),
        "Cat/1.png": encoded(noise()),
        "dog/page.jpg": b"<!DOCTYPE html>",
        "dog/cut.png": encoded(noise(64, 64))[:600],
    }
    root = tmp_path_factory.mktemp("zoo")
    train = folder(root / "train", plain() | odd)
    test = folder(root / "test", plain() | {"Cat/1.png": encoded(noise())})
    return describe(index(train, test, on_bad_image="skip"), skip=False)


def test_everything_is_counted_and_it_is_said_what_is_done(report: Report) -> None:
    found = {(f.kind, f.what): (f.count, f.done) for f in report.train.found}
    first = "ends a run, unless on_bad_image: skip"
    assert found == {
        ("format", "PNG"): (8, "read"),
        ("format", "JPEG"): (2, "read"),
        ("format", "BMP"): (1, "read"),
        ("format", "GIF"): (1, "read"),
        ("format", "PPM"): (1, "read"),
        ("format", "TIFF"): (1, "read"),
        ("format", "WEBP"): (1, "read"),
        ("pixels", "colour (RGB)"): (10, "as it is"),
        ("pixels", "grey, 16 bits (I;16)"): (1, "the upper 8 of 16 bits"),
        ("pixels", "colour with transparency (RGBA)"): (1, "transparency is dropped"),
        ("pixels", "palette (P)"): (1, "colours of the palette"),
        ("pixels", "printing colours (CMYK)"): (1, "converted without a colour profile"),
        ("pixels", "grey (L)"): (1, "grey in all three channels"),
        ("stored", "PNG with the name of another"): (1, "read by its content"),
        ("stored", "several pictures in a file"): (1, "the first one is taken"),
        ("stored", "transparent pixels"): (1, "their stored colour shows"),
        ("stored", "turned by 90 degrees (EXIF 6)"): (
            2,
            "not turned, as torchvision's ImageFolder",
        ),
        ("left out", ".heic files"): (1, "not read; convert them"),
        ("left out", "images outside the class folders"): (1, "without a class"),
        ("left out", ".txt files"): (1, "no images"),
        ("left out", "hidden and system files"): (1, "no images"),
        ("unusable", "no image: a web page"): (1, first),
        ("unusable", "truncated or damaged"): (1, first),
    }
    assert {f.kind for f in report.test.found} == {"format", "pixels"}
    assert [(p["split"], p["file"].rsplit("/", 1)[1]) for p in report.problems] == [
        ("train", "cut.png"),
        ("train", "page.jpg"),
    ]


def test_what_is_suspicious_is_said(report: Report) -> None:
    assert report.warnings == [
        'classes whose names differ in case, width, spaces, - or _ alone: "Cat" and "cat"',
        "images more than 3 times as long as wide: 1; a centre crop sees less than a third of them",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_names_every_fact(report: Report, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.split("\n")]
    assert max(map(len, lines)) <= width
    words = [line.split() for line in lines]
    assert ["images", "used", "15", "5"] in words
    assert ["left", "out", "2", "0"] in words
    assert ["unusable", "2", "0"] in words
    assert ["width", "/", "height", "1.00", "to", "9.00", "1.00"] in words
    assert "no problems found" not in text
    if width == 100:
        assert all(len(found.what) > 40 or found.what in text for found in report.train.found)
        expected = "left out .heic files 1 - not read; convert them (cat/x.heic)"
        assert expected in [" ".join(line) for line in words]


def test_dark_images_of_16_bits_are_told(tmp_path: Path) -> None:
    for highest, dark in ((4000, True), (65000, False)):
        values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
        files = {f"{name}/0.png": encoded(Image.fromarray(values + n)) for n, name in NAMES}
        root = folder(tmp_path / str(highest), files)
        said = describe(index(root, root)).warnings
        assert any("become nearly black" in line for line in said) == dark


def test_a_folder_one_level_too_high_is_told(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}": data for split in ("train", "test") for name, data in plain().items()
    }
    root = folder(tmp_path / "set", files)
    said = describe(index(root, root)).warnings
    assert (
        "classes whose images all lie in folders of their folder: 2; test, train "
        "(is the data set one level too high?)"
    ) in said
    right = folder(tmp_path / "right", plain() | {"cat/deep/er.png": encoded(noise())})
    assert not any("one level" in line for line in describe(index(right, right)).warnings)


def test_classes_that_are_numbers_in_the_order_of_texts_are_told(tmp_path: Path) -> None:
    files = {f"{n}/0.png": encoded(noise()) for n in (0, 1, 2, 10)}
    root = folder(tmp_path / "set", files)
    said = describe(index(root, root)).warnings
    assert any("in the order of texts (0, 1, 10, 2)" in line for line in said)
    ordered = index(root, root, classes=["0", "1", "2", "10"])
    assert not any("order of texts" in line for line in describe(ordered).warnings)


def test_classes_that_are_called_like_missing_values_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", plain() | {"NaN/0.png": encoded(noise())})
    said = describe(index(root, root)).warnings
    assert "classes that are called like missing values: NaN" in said


def test_skipped_images_are_no_problem(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", plain() | {"cat/x.png": b""})
    other = folder(tmp_path / "test", plain())
    found = describe(index(root, other, on_bad_image="skip"))
    assert found.problems == []
    assert [(f.what, f.count, f.done) for f in found.train.found if f.kind == "unusable"] == [
        ("empty (0 bytes)", 1, "skipped, as on_bad_image says")
    ]
