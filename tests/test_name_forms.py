"""Names that differ in their Unicode form alone are one name: folders, files, specs, manifests."""

import io
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftwork.operators.data import dataset
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.files.spelling import matches, spelled
from graftwork.operators.names import alike, folded, normal
from graftwork.operators.serving import inputs
from graftwork.operators.store import Store
from graftwork.pipelines.spec.scenario import Scenario
from graftwork.pipelines.spec.stream import ListedTask
from tests import pngs
from tests.no_memo import NoMemo

ELK = "\u00e4lg"
ELK_APART = unicodedata.normalize("NFD", ELK)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(number))
    return str(path)


def index(train: str, test: str | None = None, **more: Any) -> dataset.Dataset:
    return dataset.index({"train": [train], "test": [test or train], **more}, NoMemo(), 1)


def test_the_two_spellings_are_two_texts() -> None:
    assert ELK != ELK_APART
    assert normal(ELK_APART) == ELK == normal(ELK)


def test_class_folders_of_both_forms_are_one_class(tmp_path: Path) -> None:
    together = folder(tmp_path / "a", f"{ELK}/1.png", "fox/1.png")
    apart = folder(tmp_path / "b", f"{ELK_APART}/1.png", "fox/1.png")
    for train, test in ((together, apart), (apart, together)):
        assert index(train, test).classes == ("fox", ELK)
    # The same data set has the same index, whichever system unpacked it.
    assert index(together).train.digest == index(apart).train.digest
    both = folder(tmp_path / "c", f"{ELK}/2.png", f"{ELK_APART}/1.png", "fox/1.png")
    found = index(both)
    assert (found.classes, found.train.labels.tolist()) == (("fox", ELK), [0, 1, 1])
    assert [found.train.where.name(row).rsplit("/", 1)[1] for row in (1, 2)] == ["1.png", "2.png"]


def test_names_in_a_spec_are_those_of_folders_in_either_form(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", f"{ELK_APART}/1.png", "fox/1.png")
    for spelling in (ELK, ELK_APART):
        found = index(root, classes=[spelling, "fox"])
        assert (found.classes, found.train.labels.tolist()) == ((ELK, "fox"), [1, 0])
    with pytest.raises(ConfigError, match="occurs twice"):
        index(root, classes=[ELK, ELK_APART, "fox"])
    table = pa.table({"image": pa.array([png(0)], pa.binary()), "label": [ELK_APART], "d": [ELK]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = index(str(tmp_path / "t.parquet"), domain="d", classes=[ELK])
    assert (found.classes, found.domains) == ((ELK,), (ELK,))


def test_sections_of_a_spec_keep_names_in_one_form() -> None:
    cut = Scenario(kind="class_incremental", increment=1, orders=([ELK_APART, "fox"],))
    assert cut.orders == ([ELK, "fox"],)
    groups = Scenario(kind="class_incremental", tasks=([ELK_APART], ["fox"]))
    assert groups.groups == ([ELK], ["fox"])
    task = ListedTask(
        name=ELK_APART, train=("x",), test=("y",), only=(ELK_APART,), rename={ELK_APART: "elk"}
    )
    assert (task.name, task.only, task.rename) == (ELK, (ELK,), {ELK: "elk"})


def test_paths_are_found_in_either_form(tmp_path: Path) -> None:
    root = folder(tmp_path / ELK / "set", "cat/1.png", "dog/1.png")
    apart = unicodedata.normalize("NFD", root)
    assert spelled(apart) == root
    assert index(apart).train.where.name(0) == f"{root}/cat/1.png"
    assert inputs.find([f"{apart}/cat/1.png"]).entries == inputs.find([root]).entries[:1]
    assert matches(f"{apart}/c*") == [f"{root}/cat"]
    assert spelled(f"{apart}/nothing") == f"{apart}/nothing"
    (tmp_path / ELK_APART).mkdir()
    assert spelled(apart) == apart  # both are there: it is none of the other's


def test_a_manifest_names_files_in_either_form(tmp_path: Path) -> None:
    labels = [f"{label}{ELK_APART}" for label in range(6)]
    for split in ("train", "test"):
        for number, name in enumerate(labels):
            place = tmp_path / f"data/{split}.parquet/{name}/{number}{ELK_APART}.png"
            place.parent.mkdir(parents=True)
            place.write_bytes(pngs.png(number, label=number))
    lines = ["task,split,place,class"]
    for number in range(6):
        name = f"{number}{ELK}"
        for split in ("train", "test"):
            lines.append(f"t{number // 2},{split},{name}/{number}{ELK}.png,{name}")
    (tmp_path / "cut.csv").write_text("\n".join(lines), "utf-8")
    store = Store(str(tmp_path / "store"))
    made = pngs.plan(
        store, tmp_path / "data", scenario={"manifest": str(tmp_path / "cut.csv")},
        methods=["simplecil"],
    )  # fmt: skip
    assert [task.name for task in made.runs[0].stream.tasks] == ["t0", "t1", "t2"]
    assert made.data.counts == (6, 6)
    assert made.data.classes[0] == f"0{ELK}"


def test_a_column_is_found_in_either_form(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(0), png(1)], pa.binary()), ELK_APART: ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert index(str(tmp_path / "a.parquet"), label=ELK).classes == ("a", "b")


def test_names_that_look_alike_are_grouped() -> None:
    names = ["Cat", "cat", "ice_bear", "ice  bear", "dog", "\uff44\uff4f\uff47", "stra\u00dfe"]
    assert alike(names) == [
        ("Cat", "cat"),
        ("dog", "\uff44\uff4f\uff47"),
        ("ice  bear", "ice_bear"),
    ]
    assert folded("STRASSE") == folded("stra\u00dfe")


def test_a_class_that_only_looks_trained_is_told(tmp_path: Path) -> None:
    train = folder(tmp_path / "a", "Cat/1.png", "dog/1.png")
    test = folder(tmp_path / "b", "cat/1.png", "dog/1.png")
    with pytest.raises(
        BadDataError, match='images of class 1 \\("cat"\\), train has none but has "Cat"'
    ):
        index(train, test)
