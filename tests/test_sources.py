"""Places of images: found in a fixed order, described in few bytes, read back in that order."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftwork.operators.data import digests, digits, sources, tables
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.files import access


def content(number: int) -> bytes:
    return f"image {number}".encode() * (1 + number % 3)


def write_table(path: Path, numbers: range, **options: Any) -> str:
    cells = pa.array([content(n) for n in numbers], pa.binary())
    pq.write_table(pa.table({"image": cells, "more": pa.array(list(numbers))}), path, **options)
    return str(path)


def places(*files: str, rows: list[tuple[int, int]]) -> sources.Places:
    file, row = np.array(rows).T
    return sources.Places(
        kind="parquet",
        image="image",
        files=files,
        file=file.astype(np.int32),
        row=row.astype(np.int64),
    )


def test_hints_are_runs(tmp_path: Path) -> None:
    rows = [(0, 3), (0, 4), (0, 5), (0, 9), (2, 0), (2, 1)]
    hints = places("a", "b", "c", rows=rows).hints(1, 6)
    assert hints == {
        "kind": "parquet",
        "image": "image",
        "files": ["a", "c"],
        "runs": [[0, 4, 6], [0, 9, 10], [1, 0, 2]],
    }
    assert places("a", rows=rows[:1]).hints(0, 0)["runs"] == []
    whole = places("a", rows=[(0, n) for n in range(100_000)]).hints(5, 99_999)
    assert whole["runs"] == [[0, 5, 99_999]]
    assert len(json.dumps(whole)) < 100


def test_read_is_the_rows_in_order(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.parquet", range(1000), row_group_size=300)
    second = write_table(tmp_path / "b.parquet", range(1000, 1100))
    rows = [(0, n) for n in (0, 1, 7, 299, 300, 555, 556, 999)] + [(1, n) for n in range(40, 60)]
    found = places(first, second, rows=rows)
    expected = [content(n + 1000 * file) for file, n in rows]
    assert list(sources.read(found.hints(0, len(rows)))) == expected
    assert list(sources.read(found.hints(3, 12))) == expected[3:12]
    assert found.name(3) == f"{first} row 299"
    assert list(sources.read(found.hints(0, 0))) == []


def test_row_groups_without_wanted_rows_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_table(tmp_path / "a.parquet", range(1000), row_group_size=100)
    groups = []
    original = tables._group

    def counted(file: Any, group: int, leaf: str, rows: np.ndarray) -> Any:
        groups.append(group)
        return original(file, group, leaf, rows)

    monkeypatch.setattr(tables, "_group", counted)
    images = list(tables.read_images(url, "image", [(150, 160), (730, 740)]))
    assert images == [content(n) for n in (*range(150, 160), *range(730, 740))]
    assert groups == [1, 7]


def test_reading_streams(tmp_path: Path) -> None:
    cells = pa.array([bytes(20_000)] * 4000, pa.binary())  # 80 MB in one row group
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"image": cells}), path, compression="none", use_dictionary=False)
    del cells
    pa.default_memory_pool().release_unused()
    before, most = pa.total_allocated_bytes(), 0
    for _ in sources.read(places(str(path), rows=[(0, n) for n in range(4000)]).hints(0, 4000)):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 40e6


def test_locate_keeps_the_order_given_and_sorts_globs(tmp_path: Path) -> None:
    b, a, c = (write_table(tmp_path / f"{n}.parquet", range(3)) for n in "bac")
    assert [s.url for s in sources.locate([c, str(tmp_path / "[ab].parquet")])] == [c, a, b]
    odd = write_table(tmp_path / "x[1].parquet", range(3))  # a name, not a pattern
    assert [s.url for s in sources.locate([odd])] == [odd]
    assert sources.locate([f"file://{a}"])[0].url == a


def test_relative_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "a b.parquet", range(3))
    monkeypatch.chdir(tmp_path)
    assert sources.locate(["a b.parquet"])[0].url == str(tmp_path / "a b.parquet")
    assert access.absolute("s3://bucket/x") == "s3://bucket/x"


def test_identity_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = access.identity(str(path))
    assert access.identity(str(path)) == first
    path.write_bytes(b"two")
    assert access.identity(str(path)) != first
    with pytest.raises(ConfigError, match="not found"):
        access.identity(str(tmp_path / "b"))


def test_folder_listing(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpeg", "a/deep/x.webp", "a/z.jpg", ".hidden/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("a/.hidden.png", "a/readme.txt", "top.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    [source] = sources.locate([str(tmp_path)])
    assert source.files == ("a/deep/x.webp", "a/z.jpg", "b/10.jpeg", "b/2.PNG")
    assert source.classes == ("a", "b", "empty")
    (tmp_path / "a/z.jpg").write_bytes(b"y")
    assert sources.locate([str(tmp_path)])[0].identity != source.identity


def test_memory_filesystem_equals_local(tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    for name in ("b/2.png", "b/10.png", "a/x.png", "a/.h.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
        remote.pipe_file(f"/sources-test/set/{name}", name.encode())
    [local], [far] = sources.locate([str(tmp_path)]), sources.locate(["memory://sources-test/set"])
    assert far.files == local.files
    assert far.classes == local.classes
    hints = {"kind": "files", "files": [f"{far.url}/{name}" for name in far.files]}
    assert list(sources.read(hints)) == [name.encode() for name in far.files]
    write_table(tmp_path / "t.parquet", range(50))
    for name in ("2", "1"):
        remote.pipe_file(f"/sources-test/t{name}.parquet", (tmp_path / "t.parquet").read_bytes())
    found = sources.locate(["memory://sources-test/t*.parquet"])
    assert [s.url for s in found] == [f"memory:///sources-test/t{n}.parquet" for n in "12"]
    read = sources.read(places(found[0].url, rows=[(0, 7), (0, 30)]).hints(0, 2))
    assert list(read) == [content(7), content(30)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing.parquet", "missing.parquet: not found"),
        ("none-*.parquet", "none-*.parquet: nothing matches"),
        ("flat", "flat: holds no class folders; give a folder with one folder per class"),
        ("loop", "symlink loop at "),
        ("circle", "symlink loop at "),
        ("memory://sources-test/absent.parquet", "absent.parquet: not found"),
    ],
)
def test_places_that_are_not_there(tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "loop/cat").mkdir(parents=True)
    os.symlink(tmp_path / "loop", tmp_path / "loop/cat/again")
    (tmp_path / "circle/cat").mkdir(parents=True)
    os.symlink(tmp_path / "circle/cat/1.png", tmp_path / "circle/cat/2.png")
    os.symlink(tmp_path / "circle/cat/2.png", tmp_path / "circle/cat/1.png")
    with pytest.raises(BadDataError) as caught:
        sources.locate([entry if "://" in entry else str(tmp_path / entry)])
    assert message in str(caught.value)


def test_forbidden_urls_are_config_errors() -> None:
    for url in ("http://x/y.parquet", "filecache::s3://b/x", "~/x.parquet"):
        with pytest.raises(ConfigError):
            sources.locate([url])


def test_read_names_what_is_gone(tmp_path: Path) -> None:
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    with pytest.raises(BadDataError, match=r"link\.png: dangling symlink to .*gone\.png"):
        list(sources.read({"kind": "files", "files": [str(tmp_path / "link.png")]}))
    url = str(tmp_path / "null.parquet")
    pq.write_table(pa.table({"image": pa.array([b"x", None], pa.binary())}), url)
    with pytest.raises(BadDataError, match=r"null\.parquet row 1: no image bytes"):
        list(sources.read(places(url, rows=[(0, 0), (0, 1)]).hints(0, 2)))
    with pytest.raises(BadDataError, match="has 2 rows, fewer than indexed"):
        list(sources.read(places(url, rows=[(0, 5)]).hints(0, 1)))


def test_a_damaged_page_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, range(500), write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(content(100) + b"") + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(BadDataError, match=r"a\.parquet: "):
        list(sources.read(places(str(path), rows=[(0, 0), (0, 499)]).hints(0, 2)))


def test_digests_name_the_first_change() -> None:
    expected = np.arange(96, dtype=np.uint8).reshape(3, 32)
    found = expected.copy()
    digests.check_digests(expected, found, "abc".__getitem__)
    found[1, 5] += 1
    with pytest.raises(BadDataError, match="image b changed since it was indexed"):
        digests.check_digests(expected, found, "abc".__getitem__)
    whole = digests.digest_of(expected)
    assert whole == digests.digest_of([row.tobytes() for row in expected])
    assert whole != digests.digest_of(found)


def test_digits_are_written_the_same_way_everywhere() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert len(digits.encode(pixels)) == 140
    hints = {"kind": "digits", "files": ["test"], "runs": [[0, 2, 5]]}
    assert list(sources.read(hints)) == list(digits.images("test")[2:5])
