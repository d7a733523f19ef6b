"""Files that appear whole and once, on file systems that lack one thing or another."""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import StorageError
from graftwork.operators.files import appear as module
from graftwork.operators.files.appear import appear
from graftwork.operators.keys import digest
from graftwork.operators.store import Store
from graftwork.operators.store.lease import held

Lacks = Callable[..., None]
WAYS = ("links", "renameat2", "claim")


def refuse(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def without(monkeypatch: pytest.MonkeyPatch, way: str, number: int = errno.EPERM) -> None:
    """A file system on which only `way` is left."""
    if way != "links":
        monkeypatch.setattr(os, "link", refuse(number))
    if way == "claim":

        def unsupported(*_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

        monkeypatch.setattr(module, "_renameat2", lambda: unsupported)


def stage(name: str) -> Assignment:
    preimage = {"operator": "fit", "version": 1, "parameters": {"name": name}, "inputs": {}}
    return Assignment(
        key=digest(preimage), preimage=preimage, hints={}, input_operators={}, label=name
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_first_stands_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    without(monkeypatch, way)
    store = Store(str(tmp_path))
    assert store.blobs.put_if_absent("a/x", b"first")
    assert not store.blobs.put_if_absent("a/x", b"second")
    assert store.blobs.get("a/x") == b"first"
    assert os.listdir(tmp_path / "a") == ["x"]


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EINVAL]
)
def test_every_answer_of_a_file_system_without_links_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without(monkeypatch, "renameat2", number)
    (tmp_path / "whole").write_bytes(b"1")
    assert appear(tmp_path / "whole", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_disk_that_fails_is_no_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EIO))
    with pytest.raises(StorageError, match="Input/output error"):
        Store(str(tmp_path)).blobs.put_if_absent("x", b"1")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", ["renameat2", "claim"])
def test_racing_writers_leave_one_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    without(monkeypatch, way)
    store, won = Store(str(tmp_path)), []
    for number in range(20):
        barrier = threading.Barrier(8)

        def write(me: int, name: str = f"r{number}", gate: threading.Barrier = barrier) -> None:
            gate.wait()
            won.append(store.blobs.put_if_absent(f"s/{name}", str(me).encode()))
            store.commit(stage(name), Result(files={"data": str(me).encode()}), 0.1)

        threads = [threading.Thread(target=write, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.verify("fit", stage(f"r{number}").key)
        assert len(os.listdir(tmp_path / "fit" / stage(f"r{number}").key)) == 2
    assert sum(won) == 20


def test_a_claim_of_a_dead_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "claim")
    (tmp_path / "x.claim").touch()
    old = time.time() - module.STALE - 1
    os.utime(tmp_path / "x.claim", (old, old))
    (tmp_path / "whole").write_bytes(b"1")
    assert appear(tmp_path / "whole", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_a_lease_is_held_once_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "claim")
    store = Store(str(tmp_path))
    with held(store, {"chain": "a training"}):
        assert not store.blobs.put_if_absent("leases/chain.json", b"{}")
    assert store.blobs.put_if_absent("leases/chain.json", b"{}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_what_cannot_be_synced_is_stored_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    store = Store(str(tmp_path))
    store.probe()
    assert store.blobs.put_if_absent("x", b"1") and store.blobs.get("x") == b"1"


def test_a_disk_that_fails_to_sync_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(StorageError, match="Input/output error"):
        Store(str(tmp_path)).probe()
    assert os.listdir(tmp_path / "memo") == []


def test_the_longest_names_fit(tmp_path: Path) -> None:
    name = "数" * 83  # 249 bytes of 255
    blobs = Store(str(tmp_path)).blobs
    assert blobs.put_if_absent(f"a/{name}.html", b"1")
    blobs.replace(f"a/{name}.html", b"2")
    assert blobs.get(f"a/{name}.html") == b"2"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    blobs = Store(str(tmp_path)).blobs
    (tmp_path / "a/report.html").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"report\.html: a file where a folder belongs"):
        blobs.replace("a/report.html", b"1")
    (tmp_path / "memo").write_bytes(b"")
    with pytest.raises(StorageError, match="memo: a file where a folder belongs"):
        blobs.put("memo/x", b"1")
    assert os.listdir(tmp_path / "a") == ["report.html"]
