"""Leases: who holds one, who may take it over, and what is left behind."""

import json
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from graftwork.operators.errors import RunHeld
from graftwork.operators.store import Store, lease
from graftwork.operators.store.lease import held, process_start
from tests.processes import started

NAME = {"ab" * 32: "l2p order 1993 seed 0"}
FILE = f"leases/{'ab' * 32}.json"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return Store(f"memory://leases-{tmp_path.name}-{random.random()}")


def record(store: Store, **changes: object) -> dict[str, object]:
    """A lease as another process would have written it, put into the store."""
    body = {
        "what": "l2p order 1993 seed 0",
        "host": "elsewhere",
        "machine": "elsewhere",
        "pid": 4711,
        "started": "1",
        "nonce": "other",
        "since": "2026-11-22 20:10:25 UTC",
    } | changes
    store.blobs.replace(FILE, json.dumps(body).encode())
    return body


def grow_old(store: Store, seconds: float) -> None:
    """As if the lease had got its last sign of life that long ago."""
    if store.url.startswith("memory://"):
        found = MemoryFileSystem.store[f"/{store.url.removeprefix('memory://')}/{FILE}"]
        found.modified -= timedelta(seconds=seconds)
        return
    path = Path(store.url, FILE)
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_a_lease_is_there_while_it_is_held_and_gone_afterwards(store: Store) -> None:
    with held(store, NAME):
        body = json.loads(store.blobs.get(FILE) or b"")
        assert (body["pid"], body["what"]) == (os.getpid(), "l2p order 1993 seed 0")
        assert body["started"] == process_start(os.getpid())
    assert store.blobs.files("leases") == {}
    with pytest.raises(OSError, match="disk"), held(store, NAME):
        raise OSError("disk")
    assert store.blobs.files("leases") == {}


def test_nothing_to_hold_writes_nothing(store: Store) -> None:
    with held(store, {}):
        assert store.blobs.files("leases") == {}


def test_a_live_lease_is_refused_and_all_others_are_given_back(store: Store) -> None:
    body = record(store)
    with (
        pytest.raises(RunHeld) as caught,
        held(store, {"0" * 64: "first", **NAME}),
    ):
        pass
    assert caught.value.exit_code == 7
    assert str(caught.value) == (
        "l2p order 1993 seed 0 is being trained by elsewhere/4711 since 2026-11-22 20:10:25 UTC; "
        "wait for it, or run again after it ended"
    )
    assert list(store.blobs.files("leases")) == [FILE]
    assert json.loads(store.blobs.get(FILE) or b"") == body


def test_a_process_holds_it_against_itself(store: Store) -> None:
    with held(store, NAME), pytest.raises(RunHeld), held(store, NAME):
        pass


def test_a_process_that_ended_holds_nothing(store: Store) -> None:
    with started([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        dead = {"machine": lease.machine(), "pid": child.pid, "started": process_start(child.pid)}
        record(store, **dead)
        with pytest.raises(RunHeld), held(store, NAME):
            pass
    with held(store, NAME):
        assert json.loads(store.blobs.get(FILE) or b"")["pid"] == os.getpid()


def test_a_zombie_is_dead() -> None:
    with started([sys.executable, "-c", ""]) as child:
        while process_start(child.pid) is not None:  # not waited for yet: it stays in the table
            time.sleep(0.01)
        assert child.wait() == 0


def test_another_process_with_its_number_holds_nothing(store: Store) -> None:
    record(store, machine=lease.machine(), pid=os.getpid(), started="0")
    with held(store, NAME):
        pass
    assert store.blobs.files("leases") == {}


@pytest.mark.parametrize(("age", "free"), [(30.0, False), (90.0, True)])
def test_silence_is_judged_by_the_clock_of_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch, age: float, free: bool
) -> None:
    record(store)
    grow_old(store, age)
    # A clock that is a day ahead must not matter; nothing here may ask it.
    monkeypatch.setattr(lease.time, "time", lambda: pytest.fail("local time"))
    if free:
        with held(store, NAME):
            assert json.loads(store.blobs.get(FILE) or b"")["pid"] == os.getpid()
    else:
        with pytest.raises(RunHeld), held(store, NAME):
            pass


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_what_is_no_lease_is_held_by_nobody(store: Store, damage: bytes) -> None:
    store.blobs.replace(FILE, damage)
    with held(store, NAME):
        assert json.loads(store.blobs.get(FILE) or b"")["pid"] == os.getpid()


def test_signs_of_life_keep_it_young(store: Store) -> None:
    with held(store, NAME, beat=0.02):
        grow_old(store, 90.0)
        deadline = time.monotonic() + 5
        while lease._silent(store.blobs, FILE):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lease_that_was_taken_over_is_left_alone(store: Store) -> None:
    with held(store, NAME, beat=0.02):
        body = record(store)
        time.sleep(0.1)
        assert json.loads(store.blobs.get(FILE) or b"") == body
    assert json.loads(store.blobs.get(FILE) or b"") == body
