"""Which images a command line names, and how they are cut into shards."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftwork.operators.errors import BadDataError
from graftwork.operators.serving import inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.png", "a/1.JPG", "a/b/3.webp", "a/.hidden/4.png", "a/text.txt", "odd"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    pq.write_table(pa.table({"image": pa.array([b"x", None, b"y"], pa.binary())}), "t.parquet")
    return tmp_path


def places(*words: str, size: int = 100) -> list[list[str]]:
    return [[inputs.name(p) for p in s.places] for s in inputs.find(words).shards(size)]


def test_order_is_that_of_the_words(folder: Path) -> None:
    found = places("odd", "a", "t.parquet", "a/*", "a/2.png")
    below = ["a/1.JPG", "a/2.png", "a/b/3.webp"]
    rows = [f"t.parquet row {row}" for row in range(3)]
    assert found == [["odd", *below], rows, [*below, "a/2.png"]]
    assert len(inputs.find(["odd", "a", "t.parquet"])) == 7


def test_shards_hold_what_they_name(folder: Path) -> None:
    shards = list(inputs.find(["a", "t.parquet", str(folder / "odd")]).shards(2))
    assert [len(shard.places) for shard in shards] == [2, 1, 2, 1, 1]
    read = [item for shard in shards for item in shard.read()]
    assert read == [b"a/1.JPG", b"a/2.png", b"a/b/3.webp", b"x", None, b"y", b"odd"]
    assert shards[-1].places == ((str(folder / "odd"), None),)


def test_nothing_found_is_an_error(folder: Path) -> None:
    (folder / "empty").mkdir()
    for word in ("empty", "a/*.txt", "*.gif"):
        with pytest.raises(BadDataError, match="no images found"):
            inputs.find([word])
    with pytest.raises(BadDataError, match=r"^nowhere: not found$"):
        inputs.find(["nowhere"])
