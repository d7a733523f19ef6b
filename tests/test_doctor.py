"""The report on a data set: every unreadable image, duplicates, and tables that fit a terminal."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from graftwork.operators.data import dataset
from graftwork.operators.errors import BadDataError
from graftwork.pipelines.describing import rendering
from graftwork.pipelines.describing import report as doctor
from tests.no_memo import NoMemo


def png(number: int, width: int = 6, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, cells: list[bytes], values: list[Any], **columns: Any) -> str:
    image = pa.array(cells, pa.binary())
    pq.write_table(pa.table({"image": image, "label": values, **columns}), path)
    return str(path)


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[:600]


def indexed(train: str, test: str, **more: Any) -> dataset.Dataset:
    return dataset.index({"train": [train], "test": [test], **more}, NoMemo(), threads=2)


def rendered(report: doctor.Report) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(rendering.render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.split("\n"))) <= 80
    return text


def test_counts_sizes_and_bytes(tmp_path: Path) -> None:
    cells = [png(0), png(1), png(2, 9, 9), png(3)]
    train = write(tmp_path / "a.parquet", cells, ["b", "a", "b", "b"], d=["x", "y", "y", "y"])
    test = write(tmp_path / "b.parquet", [png(8), png(9)], ["a", "b"], d=["x", "x"])
    steps: list[tuple[int, int]] = []
    report = doctor.describe(
        indexed(train, test, domain="d"), on_progress=lambda *step: steps.append(step)
    )
    assert report.train.images == 4
    assert report.train.classes == {"a": 1, "b": 3}
    assert report.train.domains == {"x": 1, "y": 3}
    assert report.test.domains == {"x": 2, "y": 0}
    assert report.train.sizes == [(6, 4, 3), (9, 9, 1)]
    assert report.train.bytes == sum(map(len, cells))
    assert (report.warnings, report.problems, report.skipped) == ([], [], [])
    assert steps[-1] == (6, 6)
    assert json.loads(json.dumps(report.to_json()))["test"]["classes"] == {"a": 1, "b": 1}
    text = rendered(report)
    assert "6x4 (75 %)" in text
    assert "no problems found" in text


def test_every_unreadable_image_is_listed(tmp_path: Path) -> None:
    # Behind their headers: indexing does not see it.
    train = write(tmp_path / "a.parquet", [png(0), truncated(), png(1), truncated()], [0, 0, 1, 1])
    test = write(tmp_path / "b.parquet", [png(8), png(9)], [0, 1])
    report = doctor.describe(indexed(train, test))
    assert [(p["split"], p["file"], p["row"]) for p in report.problems] == [
        ("train", train, 1),
        ("train", train, 3),
    ]
    assert all(p["reason"].startswith("truncated or damaged: ") for p in report.problems)
    assert "2 unreadable images" in rendered(report)
    skipped = doctor.describe(indexed(train, test, on_bad_image="skip"))
    assert [entry["row"] for entry in skipped.skipped] == [1, 3]
    assert "2 unusable images are skipped" in rendered(skipped)


def test_images_that_changed_or_went_away(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png(int(name[2])))
    found = indexed(str(tmp_path / "set"), str(tmp_path / "set"))
    (tmp_path / "set/a/1.png").write_bytes(png(77))
    (tmp_path / "set/a/2.png").unlink()
    reasons = [(p["row"], p["reason"]) for p in doctor.describe(found).problems]
    assert reasons == [(None, "changed since it was indexed"), (None, "not found")] * 2
    table = write(tmp_path / "a.parquet", [png(0)], [0])
    found = indexed(table, table)
    Path(table).unlink()
    with pytest.raises(BadDataError, match=r"a\.parquet: not found"):
        doctor.describe(found)


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    cells = [png(0), png(1), png(2), png(1), png(0), png(3)]
    train = write(tmp_path / "a.parquet", cells, ["cat", "dog", "owl", "cat", "cat", "owl"])
    test = write(tmp_path / "b.parquet", [png(5), png(2), png(5)], ["cat", "owl", "cat"])
    report = doctor.describe(indexed(train, test))
    assert report.warnings == [
        f"images in train more than once: 2; first: {train} row 0 (cat), {train} row 4 (cat)",
        f"images in test more than once: 1; first: {test} row 0 (cat), {test} row 2 (cat)",
        f"test images that are also in train: 1; first: {test} row 1 (owl), {train} row 2 (owl)",
        f"images with two labels: 1; first: {train} row 1 (dog), {train} row 3 (cat)",
        "classes without test images: 1; dog",
    ]
    assert "5 warnings" in rendered(report)


def test_many_classes_are_shortened(tmp_path: Path) -> None:
    counts = [1 + (n * 7) % 30 for n in range(30)]
    values = np.repeat(np.arange(30), counts).tolist()
    names = [f"class with a long name, so long that it does not fit, number {n}" for n in range(30)]
    cells = [png(n) for n in range(len(values))]
    train = write(tmp_path / "a.parquet", cells, values)
    report = doctor.describe(indexed(train, train, classes=names))
    lines = rendered(report).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("class  "))
    table = lines[start + 1 : start + 12]
    train_counts = [int(line.split()[-2]) for line in table if "more" not in line]
    assert train_counts == [30, 29, 28, 27, 26, 5, 4, 3, 2, 1]
    assert table[5].strip() == "... 20 more"
    assert len(report.train.classes) == 30


def test_every_test_image_that_is_trained_on_is_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", [png(0), png(1), png(0), png(2)], [0, 1, 0, 1])
    test = write(tmp_path / "b.parquet", [png(5), png(2), png(0), png(6), png(0)], [1, 1, 1, 0, 0])
    report = doctor.describe(indexed(train, test))
    assert report.warnings == [
        f"images in train more than once: 1; first: {train} row 0 (0), {train} row 2 (0)",
        f"images in test more than once: 1; first: {test} row 2 (1), {test} row 4 (0)",
        f"test images that are also in train: 3; first: {test} row 1 (1), {train} row 3 (1)",
        f"images with two labels: 2; first: {train} row 2 (0), {test} row 2 (1)",
    ]
    same = doctor.describe(indexed(train, train))
    assert (
        f"test images that are also in train: 4; first: {train} row 0 (0), {train} row 0 (0)"
        in (same.warnings)
    )


def test_classes_without_images_are_not_those_that_are_only_not_tested(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", *"defghi"]
    train = write(tmp_path / "a.parquet", [png(0), png(1)], [0, 2])
    test = write(tmp_path / "b.parquet", [png(2)], [0])
    report = doctor.describe(indexed(train, test, classes=names))
    assert report.warnings == [
        "classes without images: 7; bee, d, e, f, g, ...",
        "classes without test images: 1; cat",
    ]
    assert report.train.classes["bee"] == report.test.classes["bee"] == 0
    lines = rendered(report).split("\n")
    assert ["bee", "0", "0"] in [line.split() for line in lines]
    assert ["classes", "2", "1"] in [line.split() for line in lines]


def test_a_single_class(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", [png(0)], [0])
    test = write(tmp_path / "b.parquet", [png(1)], [0])
    assert doctor.describe(indexed(train, test)).warnings == ["there is only one class"]


def test_real_duplicates_are_found() -> None:
    folder = Path(os.environ.get("GRAFTWORK_DATA", ""), "cifar100_small")
    if "GRAFTWORK_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("GRAFTWORK_DATA names no folder with cifar100_small")
    found = indexed(str(folder / "train.parquet"), str(folder / "test.parquet"))
    report = doctor.describe(found)
    assert report.problems == []
    assert report.train.sizes == [(32, 32, 10_000)]
    # CIFAR-100 has a few equal images under two labels, and some in both splits.
    assert [w.partition(";")[0] for w in report.warnings] == [
        "images in train more than once: 1",
        "test images that are also in train: 2",
        "images with two labels: 2",
    ]
