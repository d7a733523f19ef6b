"""Snapshots: bit for bit what was kept, or nothing at all; gone with the commit of their stage."""

import hashlib
import json
import math
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.methods.baselines.finetune import Finetune
from graftwork.operators.assignment import Result
from graftwork.operators.errors import StorageError
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.training import loop, snapshots
from graftwork.operators.training.settings import Log, Settings, Snapshot
from tests import tiny


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    folder = str(tmp_path / "store")
    return Store(folder if request.param == "local" else f"memory:/{folder}")


def small(**changes: Any) -> Snapshot:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "head.weight": torch.randn(3, 5, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(2**60),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
        "optimizer/0/step": torch.tensor(17.0),
        "optimizer/0/exp_avg": torch.full((2, 2), math.pi, dtype=torch.float64),
    }
    return Snapshot(
        **{
            "epoch": 3,
            "step": 12,
            "tensors": tensors,
            "log": [{"loss": 0.1 + 0.2, "pull": 1e-300}, {"loss": 2 / 3, "pull": -0.0}],
            "sums": {"loss": 1 / 3},
            "counts": [112, 7168],
            **changes,
        }
    )


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def same(one: Snapshot | None, other: Snapshot) -> bool:
    assert one is not None
    rest = [field.name for field in fields(Snapshot) if field.name != "tensors"]
    plain = all(repr(getattr(one, name)) == repr(getattr(other, name)) for name in rest)
    return plain and same_tensors(one.tensors, other.tensors)


# --- round trip -------------------------------------------------------------------------------


def test_a_snapshot_comes_back_bit_for_bit(store: Store) -> None:
    snapshots.keep(store, "k", small())
    assert same(snapshots.find(store, "k"), small())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "amsgrad"])
def test_a_task_continues_from_the_bytes_of_a_snapshot(optimizer: Any) -> None:
    method = Finetune(epochs=2, batch_size=5, lr=1e-3, optimizer=optimizer)
    task = tiny.task(0)
    settings = Settings(seed=1, every=0.0)
    kept: list[bytes] = []

    def train(resume: Snapshot | None) -> tuple[dict[str, Tensor], Log]:
        return loop.train_task(
            method, tiny.vit(1), task, tiny.images(task), None, settings,
            resume=resume, keep=lambda snapshot: kept.append(snapshots.encode(snapshot)),
        )  # fmt: skip

    whole, log = train(None)
    assert len(kept) == log.steps == 6
    names = {"sgd": {"momentum_buffer"}, "amsgrad": {"step", "exp_avg", "exp_avg_sq"}}
    wanted = names.get(optimizer, {"step", "exp_avg", "exp_avg_sq"})
    for data in (kept[1], kept[2]):  # within an epoch, and at its end
        snapshot = snapshots.decode(data)
        assert snapshot is not None
        found = {name.split("/")[2] for name in snapshot.tensors if name.startswith("optimizer/")}
        assert wanted <= found
        state, again = train(snapshot)
        assert same_tensors(state, whole)
        assert again == log


def test_the_newest_snapshot_replaces_the_one_before(store: Store) -> None:
    for step in range(3):
        snapshots.keep(store, "k", small(step=step))
    found = snapshots.find(store, "k")
    assert found is not None and found.step == 2
    assert list(store.blobs.files(snapshots.FOLDER)) == ["unfinished/k"]


def test_stages_have_snapshots_of_their_own(store: Store) -> None:
    snapshots.keep(store, "one", small(step=1))
    snapshots.keep(store, "other", small(step=2))
    assert same(snapshots.find(store, "one"), small(step=1))
    assert snapshots.find(store, "third") is None


# --- damage -----------------------------------------------------------------------------------


def test_a_flipped_bit_is_no_snapshot() -> None:
    data = snapshots.encode(small())
    draw = random.Random(0)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        assert snapshots.decode(bytes(damaged)) is None, place


def test_a_truncated_or_longer_file_is_no_snapshot() -> None:
    data = snapshots.encode(small())
    for length in range(len(data)):
        assert snapshots.decode(data[:length]) is None
    assert snapshots.decode(data + b"\0") is None
    assert snapshots.decode(data + data) is None


def test_a_damaged_file_in_the_store_is_none(store: Store) -> None:
    data = snapshots.encode(small())
    for damaged in (b"", b"\n", b"\n\n", data[:-1], b"\xff" * 200):
        store.blobs.replace(snapshots.name("k"), damaged)
        assert snapshots.find(store, "k") is None


def sealed(body: bytes) -> bytes:
    """With the right checksum in front: not damaged, but of another program."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_a_snapshot_of_another_version_is_none() -> None:
    _, head, tensors = snapshots.encode(small()).split(b"\n", 2)
    values = json.loads(head)
    others = [
        {**values, "scaler": 1},
        {name: value for name, value in values.items() if name != "sums"},
        {**values, "tensors": {}},
        [1, 2],
        "text",
        None,
    ]
    for other in others:
        assert snapshots.decode(sealed(json.dumps(other).encode() + b"\n" + tensors)) is None
    for body in (b"", b"{", head, head + b"\n", head + b"\n" + tensors[:-1], b"\xff\n" + tensors):
        assert snapshots.decode(sealed(body)) is None
    assert same(snapshots.decode(sealed(head + b"\n" + tensors)), small())


# --- the end ----------------------------------------------------------------------------------


def stage(value: int) -> Stage:
    return Stage(operator="train", parameters={"value": value}, label="train")


def result(of: Stage, content: bytes = b"state") -> Result:
    return Result(
        files={"state.safetensors": content}, facts={}, obsolete=(snapshots.name(of.key),)
    )


def test_the_commit_removes_the_stages_own_snapshot(store: Store) -> None:
    one, other = stage(1), stage(2)
    for each in (one, other):
        snapshots.keep(store, each.key, small())
    store.commit(one.assignment(), result(one), 1.0)
    assert snapshots.find(store, one.key) is None
    assert same(snapshots.find(store, other.key), small())
    store.verify("train", one.key)
    assert store.commit(other.assignment(), result(other), 1.0)["key"] == other.key
    assert store.blobs.files(snapshots.FOLDER) == {}


def test_a_commit_without_a_snapshot_is_as_good(store: Store) -> None:
    store.commit(stage(1).assignment(), result(stage(1)), 1.0)
    assert store.read("train", stage(1).key, "state.safetensors") == b"state"


def test_the_second_of_two_commits_removes_it_as_well(store: Store) -> None:
    """A run that was thought lost may have written another one meanwhile."""
    one = stage(1)
    first = store.commit(one.assignment(), result(one, b"first"), 1.0)
    snapshots.keep(store, one.key, small())
    assert store.commit(one.assignment(), result(one, b"second"), 2.0) == first
    assert snapshots.find(store, one.key) is None
    assert store.read("train", one.key, "state.safetensors") == b"first"


def test_a_commit_that_fails_keeps_the_snapshot(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stage(1)
    snapshots.keep(store, one.key, small())

    def full(name: str, data: bytes) -> bool:
        raise StorageError("store is full")

    monkeypatch.setattr(store.blobs, "put_if_absent", full)
    with pytest.raises(StorageError, match="full"):
        store.commit(one.assignment(), result(one), 1.0)
    assert not store.has("train", one.key)
    assert same(snapshots.find(store, one.key), small())
