"""Label columns of every type: the right class, or a line with file, row, column and value."""

import io
import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftwork.operators.data import dataset
from graftwork.operators.errors import BadDataError
from graftwork.operators.parquet.names import claimed, disagreement
from tests.no_memo import NoMemo


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels: Any, **columns: Any) -> str:
    cells = pa.array([png(n) for n in range(len(labels))], pa.binary())
    pq.write_table(pa.table({"image": cells, "label": labels, **columns}), path)
    return str(path)


def index(*train: str, **more: Any) -> dataset.Dataset:
    given = {"train": list(train), "test": list(train)} | more
    return dataset.index(given, NoMemo(), threads=1)


HALF = np.array([0, 1, 2], np.float16)


@pytest.mark.parametrize(
    ("labels", "ids", "classes"),
    [
        (pa.array([0.0, 2.0, 1.0]), [0, 2, 1], ["0", "1", "2"]),
        (pa.array(HALF), [0, 1, 2], ["0", "1", "2"]),
        (pa.array([1.0, 0.0], pa.float32()), [1, 0], ["0", "1"]),
        (pa.array([Decimal("1.00"), Decimal("0.00")]), [1, 0], ["0", "1"]),
        (pa.array([True, False]), [1, 0], ["0", "1"]),
        (pa.array([1, 0], pa.uint8()), [1, 0], ["0", "1"]),
        (pa.array(["b", "a"], pa.large_string()), [1, 0], ["a", "b"]),
        (pa.array(["b", "a"], pa.string_view()), [1, 0], ["a", "b"]),
        (pa.array([b"b", b"a"], pa.binary()), [1, 0], ["a", "b"]),
        (pa.array([b"b", b"a"], pa.large_binary()), [1, 0], ["a", "b"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ["a", "b"]),
        (
            pa.array([10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]).dictionary_encode(),
            [10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9],
            list(map(str, range(11))),
        ),
        (pa.array(["b ", "b"]), [1, 0], ["b", "b "]),
        (pa.array(["caf\u00e9", "cafe\u0301"]), [0, 0], ["caf\u00e9"]),
    ],
)
def test_labels_of_every_type(tmp_path: Path, labels: Any, ids: list[int], classes: Any) -> None:
    found = index(write(tmp_path / "a.parquet", labels))
    assert found.train.labels.tolist() == ids
    assert list(found.classes) == classes


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (pa.array([0.0, 0.5, 1.5]), 'row 1: column "label" has 0.5, which is no label (in all 2'),
        (pa.array([0.0, float("inf")]), 'row 1: column "label" has inf, which is no label'),
        (pa.array([1e300, 0.0]), 'row 0: column "label" has 1e+300, which is no label'),
        (pa.array([Decimal("0.00"), Decimal("1.50")]), 'row 1: column "label" has 1.50, which'),
        (pa.array(["", "a"]), "row 0: column \"label\" has '', which is no label"),
        (pa.array(["a", " \t"]), "row 1: column \"label\" has ' \\t', which is no label"),
        (pa.array([b"a", b"\xff"], pa.binary()), "row 1: column \"label\" has b'\\xff', which is"),
    ],
)
def test_a_value_that_is_no_label_is_named(tmp_path: Path, labels: Any, said: str) -> None:
    file = write(tmp_path / "a.parquet", labels)
    with pytest.raises(BadDataError) as caught:
        index(file)
    assert str(caught.value).split("\n")[0].startswith(f"dataset.label: {file} {said}")


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0, None]),
        pa.array([0.0, float("nan")]),
        pa.array([0.0, None]),
        pa.array([True, None]),
        pa.array(["a", None]),
        pa.array(["a", None]).dictionary_encode(),
        pa.array([b"a", None], pa.binary()),
    ],
)
def test_a_missing_label_is_named(tmp_path: Path, labels: Any) -> None:
    file = write(tmp_path / "a.parquet", labels)
    with pytest.raises(BadDataError) as caught:
        index(file)
    assert str(caught.value).split("\n")[0] == f"{file} row 1: no label"


@pytest.mark.parametrize(
    "labels", [pa.array([0, 1], pa.timestamp("s")), pa.array([[0], [1]]), pa.array([{"a": 1}] * 2)]
)
def test_other_types_are_refused_by_name(tmp_path: Path, labels: Any) -> None:
    file = write(tmp_path / "a.parquet", labels)
    with pytest.raises(BadDataError, match=r'column "label" is .*; integers, whole numbers, bool'):
        index(file)


@pytest.mark.parametrize("doubled", ["image", "label"])
def test_a_column_that_occurs_twice_is_named(tmp_path: Path, doubled: str) -> None:
    columns = [pa.array([png(0)], pa.binary()), pa.array([0])]
    names = ["image", "label"]
    twice = pa.table([*columns, columns[names.index(doubled)]], names=[*names, doubled])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(BadDataError) as caught:
        index(str(tmp_path / "a.parquet"))
    assert str(caught.value).split("\n")[0] == (
        f"dataset.{doubled}: {tmp_path}/a.parquet: "
        f'column "{doubled}" occurs 2 times; rename all but one'
    )


def test_empty_files_go_with_any_others(tmp_path: Path) -> None:
    full = write(tmp_path / "full.parquet", pa.array(["b", "a"]), place=pa.array(["x", "y"]))
    expected = index(full, domain="place")
    for number, kind in enumerate((pa.null(), pa.int64(), pa.float64(), pa.list_(pa.int8()))):
        none = pa.array([], kind)
        empty = tmp_path / f"empty{number}.parquet"
        pq.write_table(pa.table({"image": pa.nulls(0), "label": none, "place": none}), empty)
        for files in ((full, str(empty)), (str(empty), full)):
            found = index(*files, domain="place")
            assert found.train.digest == expected.train.digest
            assert (found.classes, found.domains) == (("a", "b"), ("x", "y"))
            assert found.train.places(0, 2)["files"] == [full]


def test_types_of_one_kind_go_together_and_others_name_both_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.parquet", pa.array(["b", "a"]))
    coded = write(tmp_path / "b.parquet", pa.array(["c", "a"]).dictionary_encode())
    assert index(plain, coded).train.labels.tolist() == [1, 0, 2, 0]
    whole = write(tmp_path / "c.parquet", pa.array([2.0, 0.0]))
    small = write(tmp_path / "d.parquet", pa.array([1, 0], pa.int8()))
    assert index(whole, small).train.labels.tolist() == [2, 0, 1, 0]
    with pytest.raises(BadDataError) as caught:
        index(plain, whole)
    assert str(caught.value).split("\n")[0] == (
        f"dataset.train: labels are integers in {whole}, strings in {plain}"
    )
    missing = write(tmp_path / "e.parquet", pa.nulls(2))
    with pytest.raises(BadDataError, match=r"e\.parquet row 0: no label \(in all 2 rows\)"):
        index(plain, missing)


def hugging_face(path: Path, labels: list[int], names: Any) -> str:
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    cells = pa.array([png(n) for n in range(len(labels))], pa.binary())
    table = pa.table({"image": cells, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return str(path)


def test_files_that_name_their_integers_differently_are_told(tmp_path: Path) -> None:
    train = hugging_face(tmp_path / "a.parquet", [0, 1], ["cat", "dog"])
    same = hugging_face(tmp_path / "b.parquet", [0, 1], ["Cat", "dog", "owl"])
    other = hugging_face(tmp_path / "c.parquet", [0, 1], ["dog", "cat"])
    assert index(train, test=[same]).notes == ()
    assert index(train, test=[other]).notes == (
        f'class 0 is "cat" by the metadata of {train} and "dog" by that of {other}: labels of one '
        "of them are probably mixed up",
    )
    [note] = index(train, classes=["dog", "cat"]).notes
    assert note.startswith(f'class 0 is "cat" by the metadata of {train} and "dog" by that of data')


def test_names_in_metadata_that_are_none() -> None:
    for content in (b"", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": null}}}'):
        assert claimed({b"huggingface": content}, "label") == ()
    assert claimed(None, "label") == ()
    old = {"info": {"features": {"label": {"names": {"0": "cat", "1": "dog"}}}}}
    assert claimed({b"huggingface": json.dumps(old).encode()}, "label") == ("cat", "dog")
    decomposed = unicodedata.normalize("NFD", "\u00e4lg")
    assert disagreement([("a", ("\u00e4lg",)), ("b", (decomposed,))]) == ""
