"""The store: commits are whole, once and checked; every kind of damage is found."""

import errno
import json
import os
import pickle
import random
import threading
from pathlib import Path
from types import ModuleType

import pytest

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import DamagedStage, StorageError
from graftwork.operators.keys import digest, source_digest
from graftwork.operators.store import Store


def order(name: str = "a") -> Assignment:
    preimage = {"operator": "fit", "version": 1, "parameters": {"name": name}, "inputs": {}}
    return Assignment(
        key=digest(preimage), preimage=preimage, hints={}, input_operators={}, label=f"fit {name}"
    )


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return Store(f"memory://store-{tmp_path.name}-{random.random()}")


def commit(store: Store, name: str = "a", data: bytes = b"0123456789") -> Assignment:
    store.commit(order(name), Result(files={"data.bin": data}, facts={"rows": 10}), 0.5)
    return order(name)


def test_committed_stage_reads_back(store: Store) -> None:
    stage = commit(store)
    assert store.has("fit", stage.key)
    assert store.keys("fit") == {stage.key}
    assert store.read("fit", stage.key, "data.bin") == b"0123456789"
    manifest = store.manifest("fit", stage.key)
    assert manifest["facts"] == {"rows": 10}
    assert manifest["preimage"] == stage.preimage
    assert manifest["seconds"] == 0.5
    store.verify("fit", stage.key)


def test_nothing_is_there_before_the_manifest(store: Store) -> None:
    assert store.keys("fit") == set()
    store.blobs.put(f"fit/{'0' * 64}/data.bin.1", b"orphan of a crash")
    assert store.keys("fit") == set()
    assert not store.has("fit", "0" * 64)


def test_the_first_of_two_writers_stands(store: Store) -> None:
    stage = commit(store, data=b"first")
    manifest = store.commit(order(), Result(files={"data.bin": b"second"}), 1.0)
    assert manifest == store.manifest("fit", stage.key)
    assert store.read("fit", stage.key, "data.bin") == b"first"
    assert len(store.blobs.files(f"fit/{stage.key}")) == 2  # the loser left nothing behind


def test_sixteen_racing_writers_leave_one_manifest(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(20):
        barrier = threading.Barrier(16)

        def write(name: str = f"r{number}", barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            commit(store, name)

        threads = [threading.Thread(target=write) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        key = order(f"r{number}").key
        store.verify("fit", key)
        assert len(list((tmp_path / "fit" / key).iterdir())) == 2


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage = commit(store, data=random.Random(0).randbytes(500))
    files = sorted((tmp_path / "fit" / stage.key).iterdir())
    assert len(files) == 2
    rng = random.Random(1)
    for path in files:
        sound = path.read_bytes()
        for _ in range(200):
            flipped = bytearray(sound)
            position = rng.randrange(len(sound) * 8)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(bytes(flipped))
            with pytest.raises(DamagedStage):
                store.verify("fit", stage.key)
        path.write_bytes(sound)
    store.verify("fit", stage.key)


@pytest.mark.parametrize("damage", ["truncate", "remove", "remove manifest"])
def test_truncated_and_missing_files_are_found_and_set_aside(tmp_path: Path, damage: str) -> None:
    store = Store(str(tmp_path))
    stage = commit(store)
    folder = tmp_path / "fit" / stage.key
    [data] = [p for p in folder.iterdir() if p.name != "manifest.json"]
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        (data if damage == "remove" else folder / "manifest.json").unlink()
    with pytest.raises(DamagedStage) as caught:
        store.verify("fit", stage.key)
    assert pickle.loads(pickle.dumps(caught.value)).stage_key == stage.key
    store.quarantine("fit", stage.key)
    assert not store.has("fit", stage.key)
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    commit(store)
    store.verify("fit", stage.key)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage = commit(store)
    path = tmp_path / "fit" / stage.key / "manifest.json"
    manifest = json.loads(path.read_text())
    body = {k: v for k, v in manifest.items() if k != "digest"} | {"schema": 99}
    path.write_text(json.dumps(body | {"digest": digest(body)}))
    with pytest.raises(StorageError, match="schema 99, this program reads up to 1"):
        store.manifest("fit", stage.key)


def test_memo_returns_what_was_put_and_nothing_damaged(store: Store) -> None:
    assert store.memo.get({"kind": "x"}) is None
    store.memo.put({"kind": "x"}, b"one")
    assert store.memo.get({"kind": "x"}) == b"one"
    store.memo.put({"kind": "x"}, b"two")
    assert store.memo.get({"kind": "x"}) == b"two"
    name = f"memo/{digest({'kind': 'x'})}"
    data = store.blobs.get(name)
    assert data is not None
    store.blobs.remove(name)
    store.blobs.put(name, data[:-1] + b"x")
    assert store.memo.get({"kind": "x"}) is None


def test_probe_says_what_is_wrong(tmp_path: Path) -> None:
    Store(str(tmp_path)).probe()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Store(str(tmp_path / "file" / "store")).probe()


def test_store_pickles_as_its_url(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage = commit(store)
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read("fit", stage.key, "data.bin") == b"0123456789"


def test_a_digest_of_sources_sees_every_change_of_every_file(tmp_path: Path) -> None:
    def written(place: str, files: dict[str, str]) -> str:
        package = ModuleType("pack")
        package.__path__ = [str(tmp_path / place / "pack")]
        for name, text in files.items():
            path = tmp_path / place / "pack" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_digest(package)

    files = {"__init__.py": "", "a.py": "a = 1", "deep/er/b.py": "b = 1", "deep/model.json": "{}"}
    whole = written("whole", files)
    assert written("elsewhere", files) == whole
    assert written("compiled", {**files, "deep/__pycache__/b.cpython-311.pyc": "x"}) == whole
    rest = {name: text for name, text in files.items() if name != "deep/er/b.py"}
    others = {
        "edited": {**files, "deep/er/b.py": "b = 2"},
        "removed": rest,
        "renamed": {**rest, "deep/er/c.py": "b = 1"},
        "moved": {**rest, "deep/b.py": "b = 1"},
        "swapped": {**files, "a.py": "b = 1", "deep/er/b.py": "a = 1"},
        "model": {**files, "deep/model.json": "[]"},
        "added": {**files, "deep/er/__init__.py": ""},
    }
    found = {written(place, changed) for place, changed in others.items()}
    assert len(found | {whole}) == len(others) + 1


def test_a_store_that_is_not_there_is_looked_at_and_not_made(tmp_path: Path) -> None:
    looking = Store(str(tmp_path / "none")).for_looking()
    assert looking.memo.get({"a": 1}) is None
    looking.memo.put({"a": 1}, b"found out")
    assert looking.memo.get({"a": 1}) == b"found out"
    assert not looking.has("fit", "0" * 64) and looking.keys("fit") == set()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    stage = commit(store)
    store.memo.put({"a": 1}, b"known")
    before = sorted(tmp_path.rglob("*"))
    looking = store.for_looking()

    opened = os.open

    def read_only(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    assert looking.memo.get({"a": 1}) == b"known"
    looking.memo.put({"a": 1}, b"newer")
    assert looking.memo.get({"a": 1}) == b"newer"
    assert looking.read("fit", stage.key, "data.bin") == b"0123456789"
    with pytest.raises(StorageError, match="no permission: Read-only file system"):
        store.memo.put({"a": 1}, b"newer")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_can_be_written_keeps_what_was_found_out(tmp_path: Path) -> None:
    Store(str(tmp_path)).for_looking().memo.put({"a": 1}, b"found out")
    assert Store(str(tmp_path)).memo.get({"a": 1}) == b"found out"
