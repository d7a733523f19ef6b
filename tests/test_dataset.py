"""The index: order, digests, limits, every error, and a memo that alters nothing."""

import hashlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftwork.operators.data import dataset, labels, scan, sources
from graftwork.operators.data.index_file import encode_index
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.keys import canonical
from graftwork.operators.parquet.values import Column
from graftwork.operators.stages.dataset import run
from graftwork.operators.store import memo


class Memo(memo.Memo):
    """A memo in memory that counts what it is asked."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.hits = 0

    def get(self, preimage: Mapping[str, Any]) -> bytes | None:
        found = self.entries.get(canonical(preimage))
        self.hits += found is not None
        return found

    def put(self, preimage: Mapping[str, Any], content: bytes) -> None:
        self.entries[canonical(preimage)] = content


def png(number: int, size: int = 4) -> bytes:
    """An image of its own for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path, numbers: Any, values: Any, images: Any = None, **columns: Any
) -> dict[str, Any]:
    """A Parquet file with labels `values`, and the description that reads it as both splits."""
    cells = pa.array([png(n) for n in numbers], pa.binary()) if images is None else images
    pq.write_table(pa.table({"image": cells, "label": values, **columns}), path)
    return {"train": [str(path)], "test": [str(path)]}


def index(description: Mapping[str, Any], memo: Memo | None = None) -> dataset.Dataset:
    return dataset.index(description, memo or Memo(), threads=2)


def problems(description: Mapping[str, Any], tmp_path: Path) -> list[str]:
    with pytest.raises(BadDataError) as caught:
        index(description)
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


def read(split: dataset.Split) -> list[bytes]:
    return list(sources.read(split.places(0, len(split))))


def assert_same(a: dataset.Dataset, b: dataset.Dataset) -> None:
    assert (a.classes, a.domains, a.bad_images) == (b.classes, b.domains, b.bad_images)
    for one, other in ((a.train, b.train), (a.test, b.test)):
        assert np.array_equal(one.digests, other.digests)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.domains, other.domains)
        assert one.stage().key == other.stage().key
        assert one.stage().hints == other.stage().hints
        assert one.places(0, len(one)) == other.places(0, len(other))
        assert [a.dtype for a in (one.digests, one.labels, one.domains)] == ["u1", "i4", "i4"]


def test_source_order_digests_and_labels(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", range(5), np.array([2, 0, 1, 2, 0], np.uint8))
    write(tmp_path / "0.parquet", range(5, 8), np.array([1, 1, 0], np.int64))
    both = [str(tmp_path / "1.parquet"), str(tmp_path / "0.parquet")]
    found = index({"train": both, "test": [str(tmp_path / "?.parquet")]})
    assert found.classes == ("0", "1", "2")
    assert found.domains == ("",)
    assert found.train.labels.tolist() == [2, 0, 1, 2, 0, 1, 1, 0]
    assert found.test.labels.tolist() == [1, 1, 0, 2, 0, 1, 2, 0]
    assert [d.tobytes() for d in found.train.digests] == [
        hashlib.sha256(png(n)).digest() for n in range(8)
    ]
    assert read(found.train)[3:6] == [png(3), png(4), png(5)]
    assert read(found.test) == [png(n) for n in (5, 6, 7, 0, 1, 2, 3, 4)]
    joined = b"".join(d.tobytes() for d in found.train.digests[2:5])
    assert found.train.images_digest(2, 5) == hashlib.sha256(joined).hexdigest()


def test_equal_images_stay_as_they_stand(tmp_path: Path) -> None:
    """In two classes, in two domains, in a class twice, and in both splits: every row counts."""
    numbers, values, style = [0, 1, 0, 2, 2, 1, 3], [0, 0, 1, 1, 1, 0, 0], [*"xxxxyyy"]
    train = write(tmp_path / "a.parquet", numbers, values, style=style)["train"]
    test = write(tmp_path / "b.parquet", [2, 9, 2], [0, 0, 1], style=[*"xyx"])["train"]
    memo = Memo()
    description = {"train": train, "test": test, "domain": "style"}
    found = index(description, memo)
    digest = {n: np.frombuffer(hashlib.sha256(png(n)).digest(), np.uint8) for n in range(10)}
    assert np.array_equal(found.train.digests, [digest[n] for n in numbers])
    assert found.train.labels.tolist() == values
    assert found.train.domains.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert read(found.train) == [png(n) for n in numbers]
    assert np.array_equal(found.test.digests, [digest[n] for n in (2, 9, 2)])
    assert found.test.labels.tolist() == [0, 0, 1]
    assert_same(index(description, memo), found)
    limited = index(description | {"limit_per_class": {"train": 1}}, memo)
    assert read(limited.train) == [png(0), png(0), png(2), png(1)]
    assert limited.train.labels.tolist() == [0, 1, 1, 0]


def test_equal_images_in_folders_stay_as_they_stand(tmp_path: Path) -> None:
    files = {"ant/1.png": png(0), "ant/2.png": png(0), "bee/1.png": png(0)}
    root = folder(tmp_path / "set", files)
    found = index({"train": [root], "test": [root]})
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 0, 1]
    assert len({digest.tobytes() for digest in found.train.digests}) == 1
    assert found.train.places(0, 3)["files"] == [f"{root}/{name}" for name in files]


def test_hugging_face_struct(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in range(6)], kind)
    values = np.arange(6) % 2
    nested = index(write(tmp_path / "a.parquet", None, values, cells))
    assert read(nested.train) == [png(n) for n in range(6)]
    assert (
        nested.train.digest == index(write(tmp_path / "b.parquet", range(6), values)).train.digest
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_string_labels_are_numbered_by_name(tmp_path: Path, kind: Any) -> None:
    values = pa.array(["dog", "ant", "cat", "dog"])
    if kind == "dictionary":  # with a name that no row uses, as a filtered table has
        codes = pa.array([3, 0, 2, 3], pa.int8())
        values = pa.DictionaryArray.from_arrays(codes, ["ant", "bee", "cat", "dog"])
    else:
        values = values.cast(kind)
    description = write(tmp_path / "a.parquet", range(4), values)
    found = index(description)
    assert found.classes == ("ant", "cat", "dog")
    assert found.train.labels.tolist() == [2, 0, 1, 2]
    given = index(description | {"classes": ["dog", "cat", "ant"]})
    assert given.train.labels.tolist() == [0, 2, 1, 0]
    assert problems(description | {"classes": ["dog", "cat"]}, tmp_path) == [
        'a.parquet row 1: label "ant" is not among the classes',
    ]


def test_class_names_from_a_file(tmp_path: Path) -> None:
    description = write(tmp_path / "a.parquet", range(4), np.arange(4) % 2)
    (tmp_path / "classes.json").write_bytes(b'\xef\xbb\xbf["zebra",\r\n"ant"]')
    found = index(description | {"classes": str(tmp_path / "classes.json")})
    assert found.classes == ("zebra", "ant")
    # Names are for people: the same images and numbers are the same stage.
    assert found.train.stage().key == index(description).train.stage().key
    for text, message in (
        ("{}", "must be a list of names"),
        ('["a", "a"]', '"a" occurs twice'),
        ("[1]", "must be a list of names"),
        ("[", "Expecting value"),
    ):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            index(description | {"classes": str(tmp_path / "classes.json")})


def test_domains(tmp_path: Path) -> None:
    description = write(
        tmp_path / "a.parquet", range(4), [0, 1, 0, 1], style=["photo", "art", "art", "photo"]
    )
    found = index(description | {"domain": "style"})
    assert found.domains == ("art", "photo")
    assert found.train.domains.tolist() == [1, 0, 0, 1]
    assert found.train.stage().parameters["domains"] == ["art", "photo"]
    assert found.train.stage().key != index(description).train.stage().key
    write(tmp_path / "a.parquet", range(4), [0, 1, 0, 1], style=[10, 9, 9, 10])
    assert index(description | {"domain": "style"}).domains == ("9", "10")


def test_limit_per_class_takes_the_first(tmp_path: Path) -> None:
    description = write(tmp_path / "a.parquet", range(9), [1, 0, 0, 1, 1, 2, 0, 2, 1])
    found = index(description | {"limit_per_class": {"train": 2, "test": None}})
    assert found.train.labels.tolist() == [1, 0, 0, 1, 2, 2]
    assert read(found.train) == [png(n) for n in (0, 1, 2, 3, 5, 7)]
    assert found.train.places(0, 6)["runs"] == [[0, 0, 4], [0, 5, 6], [0, 7, 8]]
    assert len(found.test) == 9


def test_limit_per_class_counts_within_each_domain(tmp_path: Path) -> None:
    values = [0, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    style = ["x", "x", "x", "x", "y", "y", "y", "y", "x", "y"]
    description = write(tmp_path / "a.parquet", range(10), values, style=style)
    description |= {"limit_per_class": {"train": 2, "test": 1}}
    found = index(description | {"domain": "style"})
    assert read(found.train) == [png(n) for n in (0, 1, 3, 4, 5, 6, 8, 9)]
    assert found.train.domains.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert read(found.test) == [png(n) for n in (0, 3, 4, 5)]
    assert read(index(description).train) == [png(n) for n in (0, 1, 3, 5)]


def test_a_memo_of_limits_by_class_alone_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a memo answers the same description and the same sources with other rows."""
    style = ["x", "x", "y", "y"]
    description = write(tmp_path / "a.parquet", range(4), [0, 0, 0, 0], style=style)
    description |= {"domain": "style", "limit_per_class": {"train": 1, "test": 1}}
    memo = Memo()
    with monkeypatch.context() as before:
        before.setattr(dataset, "VERSION", 1)
        before.setattr(labels, "first_of_each", lambda *_: np.arange(1))
        assert len(index(description, memo).train) == 1
    assert read(index(description, memo).train) == [png(0), png(2)]


def test_appended_data_leaves_earlier_images_in_place(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", range(6), np.arange(6) % 3)
    description = {"train": [str(tmp_path / "*.parquet")], "test": [str(tmp_path / "0.parquet")]}
    memo = Memo()
    before = index(description, memo)
    write(tmp_path / "1.parquet", range(6, 10), np.arange(4) % 3)
    memo.hits = 0
    after = index(description, memo)
    assert memo.hits == 1  # the old file is not read again: one entry serves train and test
    assert np.array_equal(after.train.digests[:6], before.train.digests)
    assert after.train.images_digest(0, 6) == before.train.images_digest(0, 6)
    assert after.test.stage().key == before.test.stage().key
    assert after.train.stage().key != before.train.stage().key


def folder(root: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def test_a_folder_and_a_table_with_the_same_images_are_the_same(tmp_path: Path) -> None:
    files = {"cat/2.png": png(2), "ant/9.png": png(0), "ant/x.png": png(1), "cat/3.png": png(3)}
    root = folder(tmp_path / "set", files)
    found = index({"train": [root], "test": [root]})
    assert found.classes == ("ant", "cat")
    assert read(found.train) == [png(n) for n in range(4)]
    table = index(write(tmp_path / "a.parquet", range(4), ["ant", "ant", "cat", "cat"]))
    assert table.train.stage().key == found.train.stage().key
    remote = fsspec.filesystem("memory")
    for name, data in files.items():
        remote.pipe_file(f"/dataset-test/{name}", data)
    far = index({"train": ["memory://dataset-test"], "test": [root]})
    assert far.train.stage().key == found.train.stage().key
    assert read(far.train) == read(found.train)


def test_several_folders_keep_their_order(tmp_path: Path) -> None:
    first = folder(tmp_path / "1", {"b/1.png": png(1), "c/2.png": png(2)})
    second = folder(tmp_path / "0", {"a/3.png": png(3), "b/4.png": png(4)})
    memo = Memo()
    description = {"train": [first, second], "test": [second]}
    found = index(description, memo)
    assert found.classes == ("a", "b", "c")
    assert found.train.labels.tolist() == [1, 2, 0, 1]
    assert read(found.train) == [png(n) for n in (1, 2, 3, 4)]
    assert_same(index(description, memo), found)


def test_another_pillow_looks_at_skipped_images_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one version cannot decode the next one may, and the other way round."""
    description = write(tmp_path / "a.parquet", range(6), np.arange(6) % 3)
    description |= {"on_bad_image": "skip"}
    memo = Memo()
    index(description, memo)
    monkeypatch.setattr(scan, "version", lambda name: f"another {name}")

    def refuse(data: bytes | None, max_pixels: int | None = None) -> Image.Image:
        if data == png(4):
            raise BadDataError("no longer understood")
        return decode(data, max_pixels)

    decode = scan.codec.rgb
    monkeypatch.setattr(scan.codec, "rgb", refuse)
    found = index(description, memo)
    assert len(found.train) == 5
    assert [bad["reason"] for bad in found.bad_images] == ["no longer understood"] * 2


@pytest.mark.parametrize("kind", ["table", "folder", "digits", "skip"])
def test_a_memo_hit_equals_a_fresh_index(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        root = folder(tmp_path / "set", {f"c{n % 3}/{n}.png": png(n) for n in range(20)})
        description: dict[str, Any] = {"train": [root], "test": [root]}
    elif kind == "digits":
        description = {"builtin": "digits", "limit_per_class": {"train": 3, "test": 2}}
    else:
        style = ["x", "y"] * 10
        description = write(tmp_path / "a.parquet", range(20), np.arange(20) % 3, style=style)
        description |= {"domain": "style"}
        if kind == "skip":
            cells = pa.array([png(n) if n != 7 else b"?" for n in range(20)], pa.binary())
            write(tmp_path / "a.parquet", None, np.arange(20) % 3, cells, style=style)
            description |= {"on_bad_image": "skip"}
    memo = Memo()
    first = index(description, memo)
    second = index(description, memo)
    assert memo.hits >= 1
    assert_same(second, first)
    assert_same(index(description, Memo()), first)
    assert json.loads(json.dumps(first.train.stage().hints)) == first.train.stage().hints


def test_a_changed_file_is_no_memo_hit(tmp_path: Path) -> None:
    memo = Memo()
    description = write(tmp_path / "a.parquet", range(4), [0, 1, 0, 1])
    before = index(description, memo)
    write(tmp_path / "a.parquet", range(4), [0, 1, 1, 0])
    after = index(description, memo)
    assert after.train.labels.tolist() == [0, 1, 1, 0]
    assert after.train.images_digest(0, 4) == before.train.images_digest(0, 4)


def test_a_memo_in_another_format_is_computed_again(tmp_path: Path) -> None:
    memo = Memo()
    description = write(tmp_path / "a.parquet", range(4), [0, 1, 0, 1])
    first = index(description, memo)
    other = pa.schema([("digest", pa.binary())])
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, other) as writer:
        writer.write_table(pa.table([pa.array([b"x"])], schema=other))
    memo.entries = dict.fromkeys(memo.entries, sink.getvalue())
    assert_same(index(description, memo), first)


# --- labels that cannot be used -----------------------------------------------------------------


def test_missing_and_mistyped_columns_of_all_files_at_once(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", range(2), [0, 1])["train"]
    test = write(tmp_path / "b.parquet", range(2), [0.5, 1.0])["train"]
    description = {"train": train, "test": test, "image": "img", "label": "y"}
    assert problems(description, tmp_path) == [
        'dataset.image: a.parquet: no column "img"; there are: image, label',
        'dataset.label: a.parquet: no column "y"; there are: image, label',
        'dataset.image: b.parquet: no column "img"; there are: image, label',
        'dataset.label: b.parquet: no column "y"; there are: image, label',
    ]
    assert problems({"train": train, "test": test}, tmp_path) == [
        'dataset.label: b.parquet row 0: column "label" has 0.5, which is no label'
    ]
    assert problems({"train": train, "test": train, "image": "label", "label": "image"}, tmp_path)[
        :2
    ] == [
        'dataset.image: a.parquet: column "label" is int64; images are binary, '
        "or struct {bytes, path}",
    ]
    said = problems({"train": train, "test": train, "label": "image", "domain": "image"}, tmp_path)
    assert said[:2] == [
        'dataset.label: a.parquet: column "image" holds the images; name another',
        'dataset.domain: a.parquet: column "image" holds the images; name another',
    ]


@pytest.mark.parametrize(
    ("train", "test", "classes", "expected"),
    [
        (
            [0, 1, 5, 7],
            [0, 1],
            ["a", "b"],
            ["train.parquet row 2: label 5 out of range 0..1 (in all 2 rows)"],
        ),
        (
            [0, -1, 1],
            [-3, 0],
            None,
            [
                "train.parquet row 1: label -1 out of range 0 and up",
                "test.parquet row 0: label -3 out of range 0 and up",
            ],
        ),
        (
            [0, 1, None],
            [None, 0, None],
            None,
            [
                "train.parquet row 2: no label",
                "test.parquet row 0: no label (in all 2 rows)",
            ],
        ),
        ([0, 1], [0, 2], None, ["test has images of class 2, train has none"]),
        (
            [0, 3],
            [0],
            None,
            [
                "class 1 has no training images (in all 2 classes); "
                "class numbers must be 0, 1, 2, ... without gaps; "
                "list all classes in dataset.classes if some are to have no images"
            ],
        ),
        (
            [0, 10**12],
            [0],
            None,
            [
                "class 1 has no training images (in all 999999999999 classes); "
                "class numbers must be 0, 1, 2, ... without gaps; "
                "list all classes in dataset.classes if some are to have no images"
            ],
        ),
        (
            [0, 3],
            [0, 1],
            None,
            [
                "test has images of class 1, train has none",
                "class 2 has no training images; class numbers must be 0, 1, 2, ... without gaps; "
                "list all classes in dataset.classes if some are to have no images",
            ],
        ),
        (
            [0, 2],
            [0, 1],
            ["a", "b", "c", "d"],
            ['test has images of class 1 ("b"), train has none'],
        ),
        (
            ["a", "c"],
            ["a", "b"],
            ["a", "b", "c", "d"],
            ['test has images of class 1 ("b"), train has none'],
        ),
        ([], [], ["a"], ["train: no images"]),
        (["x"], [0], None, ["labels are integers in one split and strings in the other"]),
        (
            ["x"],
            ["x", "y", "z"],
            None,
            ['test has images of class 1 ("y"), train has none (in all 2 classes)'],
        ),
        ([], [], None, ["train: no images"]),
    ],
)
def test_labels_that_cannot_be_used(
    tmp_path: Path, train: Any, test: Any, classes: Any, expected: list[str]
) -> None:
    kind = None if train else pa.int64()
    write(tmp_path / "train.parquet", range(len(train)), pa.array(train, kind))
    write(tmp_path / "test.parquet", range(len(test)), pa.array(test, kind))
    description = {
        "train": [str(tmp_path / "train.parquet")],
        "test": [str(tmp_path / "test.parquet")],
        "classes": classes,
    }
    assert problems(description, tmp_path) == expected


def test_files_of_one_split_must_agree(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", range(2), [0, 1])["train"]
    second = write(tmp_path / "b.parquet", range(2), ["x", "y"])["train"]
    assert problems({"train": first + second, "test": first}, tmp_path) == [
        "dataset.train: labels are integers in a.parquet, strings in b.parquet"
    ]
    root = folder(tmp_path / "set", {"x/1.png": png(1)})
    assert problems({"train": [*first, root], "test": first}, tmp_path) == [
        "dataset.train: needs Parquet files or folders, not both or neither"
    ]
    assert (
        "needs Parquet files"
        in problems({"train": [root], "test": [root], "domain": "d"}, tmp_path)[0]
    )


def test_domains_that_cannot_be_used(tmp_path: Path) -> None:
    description = write(tmp_path / "a.parquet", range(3), [0, 1, 0], style=["x", None, None])
    expected = "a.parquet row 1: no domain (in all 2 rows)"
    assert problems(description | {"domain": "style"}, tmp_path) == [expected]


def test_an_empty_class_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", {"ant/1.png": png(1), "cat/2.png": png(2)})
    (tmp_path / "set/bee").mkdir()
    description = {"train": [root], "test": [root]}
    assert problems(description, tmp_path) == [
        'class 1 ("bee") has no training images; '
        "list all classes in dataset.classes if some are to have no images"
    ]
    for names in (["ant", "cat"], ["cat", "bee", "dog", "ant"]):
        found = index(description | {"classes": names})
        assert found.classes == tuple(names)
        assert [found.classes[label] for label in found.train.labels] == ["ant", "cat"]


@pytest.mark.parametrize("text", [False, True])
def test_listed_classes_may_have_no_images(tmp_path: Path, text: bool) -> None:
    """Neither in the middle nor at the end; others have none to be tested on."""
    names = ["ant", "bee", "cat", "dog", "elk"]

    def cells(numbers: list[int]) -> Any:
        return [names[n] for n in numbers] if text else numbers

    train = write(tmp_path / "a.parquet", range(6), cells([3, 0, 2, 3, 2, 0]))["train"]
    test = write(tmp_path / "b.parquet", range(6, 8), cells([3, 0]))["train"]
    memo = Memo()
    description = {"train": train, "test": test, "classes": names}
    found = index(description, memo)
    assert found.classes == found.train.classes == found.test.classes == tuple(names)
    assert found.train.labels.tolist() == [3, 0, 2, 3, 2, 0]
    assert found.test.labels.tolist() == [3, 0]
    assert found.train.parameters().classes == found.test.parameters().classes == 5
    assert_same(index(description, memo), found)
    result = run(found.test.stage().assignment(), SimpleNamespace(memo=memo))
    assert result.facts["classes"] == {"ant": 1, "bee": 0, "cat": 0, "dog": 1, "elk": 0}
    limited = index(description | {"limit_per_class": {"train": 1}}, memo)
    assert limited.train.labels.tolist() == [3, 0, 2]


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"label,image\n1,2\n" * 10)
    (tmp_path / "b.parquet").write_bytes(b"")
    description = {"train": [str(tmp_path / "a.parquet")], "test": [str(tmp_path / "b.parquet")]}
    lines = problems(description, tmp_path)
    assert [line.partition(": not a readable")[0] for line in lines] == ["a.parquet", "b.parquet"]


def test_an_extension_type_is_refused_before_it_is_read(tmp_path: Path) -> None:
    class Pickled(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.binary(), "graftwork.test")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, *_: Any) -> "Pickled":
            return cls()

        def __arrow_ext_scalar_class__(self) -> Any:
            raise AssertionError("a value was looked at")

    pa.register_extension_type(Pickled())  # type: ignore[arg-type]
    try:
        storage = pa.array([b"x", b"y"], pa.binary())
        cells = pa.ExtensionArray.from_storage(Pickled(), storage)
        description = write(tmp_path / "a.parquet", None, cells, storage)
        assert 'column "label" is extension<graftwork.test' in problems(description, tmp_path)[0]
        description = write(tmp_path / "a.parquet", None, [0, 1], cells)
        assert 'column "image" is extension<graftwork.test' in problems(description, tmp_path)[0]
        data = io.BytesIO()
        pq.write_table(pa.table({"sample": cells}), data)
        with pytest.raises(ValueError, match="unexpected columns"):
            dataset.read_index(data.getvalue())
    finally:
        pa.unregister_extension_type("graftwork.test")


# --- images that cannot be used -----------------------------------------------------------------


def bad_table(tmp_path: Path) -> dict[str, Any]:
    whole = Image.effect_noise((64, 64), 50)
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    cells = [png(0), None, b"", b"text", buffer.getvalue()[:500], png(5, 40), png(6), png(7)]
    return write(tmp_path / "a.parquet", None, [0, 1, 0, 1] * 2, pa.array(cells, pa.binary()))


def test_bad_images_are_all_named(tmp_path: Path) -> None:
    good = write(tmp_path / "b.parquet", range(2), [0, 1])
    description = bad_table(tmp_path) | {"test": good["test"], "max_pixels": 1024}
    # Row 4 is truncated behind its header: only decoding tells.
    assert problems(description, tmp_path) == [
        "a.parquet row 1: no image bytes",
        "a.parquet row 2: empty (0 bytes)",
        "a.parquet row 3: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
        "a.parquet row 4: 64x64 = 4096 pixels, more than max_pixels 1024",
        "a.parquet row 5: 40x40 = 1600 pixels, more than max_pixels 1024",
        "5 unusable images; on_bad_image: skip leaves them out",
    ]


def test_skipped_images_are_listed(tmp_path: Path) -> None:
    good = write(tmp_path / "b.parquet", range(2), [0, 1])
    found = index(bad_table(tmp_path) | {"test": good["test"], "on_bad_image": "skip"})
    assert [(b["row"], b["reason"][:9]) for b in found.bad_images] == [
        (1, "no image "),
        (2, "empty (0 "),
        (3, "not PNG, "),
        (4, "truncated"),
    ]
    assert {b["file"] for b in found.bad_images} == {str(tmp_path / "a.parquet")}
    assert read(found.train) == [png(0), png(5, 40), png(6), png(7)]
    assert found.train.labels.tolist() == [0, 1, 0, 1]


def test_a_class_whose_images_are_all_bad(tmp_path: Path) -> None:
    cells = pa.array([png(0), b"?"], pa.binary())
    description = write(tmp_path / "a.parquet", None, [0, 1], cells) | {"on_bad_image": "skip"}
    assert problems(description, tmp_path)[:2] == [
        "class 1 has no training images",
        "a.parquet row 1: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
    ]
    # To list it is not to say that its images may be lost.
    assert problems(description | {"classes": ["ant", "bee", "cat"]}, tmp_path)[:2] == [
        'class 1 ("bee") has no training images',
        "a.parquet row 1: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
    ]
    test = write(tmp_path / "b.parquet", range(2), [0, 1])["test"]
    assert problems(description | {"test": test}, tmp_path)[0] == (
        "test has images of class 1, train has none"
    )
    nothing = pa.array([b"?", b"?"], pa.binary())
    train = write(tmp_path / "c.parquet", None, [0, 1], nothing)["train"]
    assert problems(description | {"train": train, "test": test}, tmp_path)[0] == "train: no images"


def test_bad_image_files(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", {"a/1.png": png(1), "a/2.jpg": b"text", "a/3.webp": b""})
    (tmp_path / "set/a/4.png").symlink_to(tmp_path / "gone.png")
    assert problems({"train": [root], "test": [root]}, tmp_path)[:3] == [
        "set/a/2.jpg: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
        "set/a/3.webp: empty (0 bytes)",
        "set/a/4.png: dangling symlink to gone.png",
    ]
    found = index({"train": [root], "test": [root], "on_bad_image": "skip"})
    assert len(found.bad_images) == 6
    assert found.bad_images[0]["row"] is None
    assert read(found.train) == [png(1)]


def test_many_bad_images_are_counted(tmp_path: Path) -> None:
    cells = pa.array([b"?"] * 30, pa.binary())
    lines = problems(write(tmp_path / "a.parquet", None, [0] * 30, cells), tmp_path)
    assert len(lines) == 22
    assert lines[-2:] == [
        "... and 40 more images",
        "60 unusable images; on_bad_image: skip leaves them out",
    ]


# --- the stage ----------------------------------------------------------------------------------


def test_run_stores_what_was_planned(tmp_path: Path) -> None:
    style = ["x", "y", "x", "x"]
    description = write(tmp_path / "a.parquet", range(4), [1, 0, 1, 1], style=style)
    found = index(description | {"domain": "style"})
    store = SimpleNamespace(memo=Memo())
    result = run(found.train.stage().assignment(), store)
    assert set(result.files) == {"index.parquet"}
    assert result.facts["classes"] == {"0": 1, "1": 3}
    assert result.facts["domains"] == {"x": 3, "y": 1}
    stored = dataset.read_index(bytes(result.files["index.parquet"]))
    assert np.array_equal(stored.digests, found.train.digests)
    assert stored.labels.tolist() == [1, 0, 1, 1]
    assert stored.domains.tolist() == [0, 1, 0, 0]
    rows = np.array([2, 0])
    first = [int.from_bytes(hashlib.sha256(png(n)).digest()[:8], "little") for n in (2, 0)]
    assert stored.at(rows).sample_ids().view(np.uint64).tolist() == first
    write(tmp_path / "a.parquet", range(4), [1, 0, 0, 1], style=style)
    with pytest.raises(BadDataError, match="dataset train: the data changed since the run"):
        run(found.train.stage().assignment(), store)


def test_every_bit_flip_in_a_stored_index_is_noticed(tmp_path: Path) -> None:
    found = index(write(tmp_path / "a.parquet", range(40), np.arange(40) % 4))
    data = encode_index(found.train.stored())
    generator = np.random.default_rng(0)
    # All pages; the footer, which the store's own checksum covers, has none.
    start, stop = 4, len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(generator.integers(start, stop))] ^= 1 << int(generator.integers(8))
        try:
            after = dataset.read_index(bytes(damaged))
        except ValueError:
            continue
        assert np.array_equal(after.digests, found.train.digests)
        assert np.array_equal(after.labels, found.train.labels)
        assert np.array_equal(after.domains, found.train.domains)


def test_the_key_holds_no_place(tmp_path: Path) -> None:
    a = index(write(tmp_path / "a.parquet", range(4), [0, 1, 0, 1])).train.stage()
    b = index(write(tmp_path / "b.parquet", range(4), [0, 1, 0, 1])).train.stage()
    assert a.key == b.key
    assert str(tmp_path) not in canonical(a.preimage)
    swapped = index(write(tmp_path / "b.parquet", [1, 0, 2, 3], [0, 1, 0, 1])).train.stage()
    assert swapped.key != a.key


# --- built-in digits ----------------------------------------------------------------------------


def test_digits_are_the_same_everywhere() -> None:
    found = index({"builtin": "digits"})
    assert (len(found.train), len(found.test)) == (1437, 360)
    assert found.classes[:3] == ("zero", "one", "two")
    assert found.test.labels[:4].tolist() == [0, 5, 0, 5]
    assert found.train.digest == DIGITS_TRAIN
    assert found.test.digest == DIGITS_TEST
    pixels = np.asarray(Image.open(io.BytesIO(read(found.test)[0])))
    assert pixels.shape == (8, 8)
    assert pixels[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    with pytest.raises(ConfigError, match='unknown "cifar"'):
        index({"builtin": "cifar"})


DIGITS_TRAIN = "3a5fa231f63acddfcf15100e9d6edda39a49076b2d8017300b484d45a3e55e5f"
DIGITS_TEST = "b95ab9c8fa6c2baed6e8b5880c6c7f09e9f1a29f25e23c8f89df3bba2dea2048"


# --- size ---------------------------------------------------------------------------------------


def test_a_million_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1_000_000
    values = np.random.default_rng(0).permutation(np.arange(count) % 1000)
    cells = pa.array([b""], pa.binary()).take(pa.array(np.zeros(count, np.int8)))
    description = write(tmp_path / "a.parquet", None, values.astype(np.int16), cells)

    def no_image(
        splits: Mapping[str, scan.Table], kept: Mapping[str, np.ndarray], *_: Any, **__: Any
    ) -> dict[str, scan.Scan]:
        places = {split: table.places.at(kept[split]) for split, table in splits.items()}
        return {
            split: scan.Scan(places=own, digests=np.zeros((len(own), 32), np.uint8), bad={})
            for split, own in places.items()
        }

    monkeypatch.setattr(scan, "images", no_image)
    memo = Memo()
    started = time.perf_counter()
    first = index(description | {"limit_per_class": {"test": 2}}, memo)
    fresh = time.perf_counter() - started
    started = time.perf_counter()
    again = index(description | {"limit_per_class": {"test": 2}}, memo)
    hit = time.perf_counter() - started
    assert_same(again, first)
    # Two and one second on an idle machine; a tenfold margin still tells a loop over rows.
    assert fresh < 20
    assert hit < 10
    assert len(canonical(first.train.places(0, count))) < 300


@pytest.mark.parametrize("domains", [1, 4])
def test_first_of_each_is_a_loop_over_rows(domains: int) -> None:
    random = np.random.default_rng(0)
    # Numbers as an index has them: their products must not leave 32 bits.
    values = random.integers(0, 7, 500).astype(np.int32) * 300_000_000
    places = random.integers(0, domains, 500).astype(np.int32) * 1000
    seen: dict[tuple[int, int], int] = {}
    expected = []
    for row, group in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= 9:
            expected.append(row)
    assert len(expected) == 9 * 7 * domains
    assert labels.first_of_each(values, places, 9).tolist() == expected
    assert labels.first_of_each(values, places, None).tolist() == list(range(500))
    assert labels.first_of_each(values[:0], places[:0], 9).tolist() == []


def test_join_merges_names() -> None:
    none = np.zeros(2, dtype=bool)
    a = Column(values=np.array([0, 1]), names=("x", "b"), null=none)
    b = Column(values=np.array([1, 0]), names=("a", "x"), null=none)
    joined = labels.join([a, b])
    assert joined is not None
    assert joined.names == ("a", "b", "x")
    assert joined.values.tolist() == [2, 1, 2, 0]
