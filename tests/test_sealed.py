"""Sealed tasks: their images may go, and the stream grows on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from graftwork import methods
from graftwork.cluster.execution.graph import needed
from graftwork.operators import housekeeping
from graftwork.operators.assignment import Result
from graftwork.operators.data import presence
from graftwork.operators.data.records import FOLDER, Records
from graftwork.operators.errors import ConfigError, MissingData, StorageError
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.explaining.explain import explain
from graftwork.pipelines.planning import sources
from graftwork.pipelines.planning.plan import Plan
from tests import pngs
from tests.test_listed import EPOCHS, folder_of, listed, planned
from tests.test_text import BACKBONE, COOP

CLOSED: dict[str, Any] = {
    "methods": ["simplecil", {"ranpac": {"projection_dim": 8}}, {"aper_ssf": dict(EPOCHS)}],
    "ensemble": [{"mean_prob": {"of": ["simplecil", "ranpac"]}}],
}
"""Methods that look at no image again: closed forms, one after a first session, and a rule."""
TRAINED: dict[str, Any] = {
    "methods": [
        {"l2p": dict(EPOCHS)},
        {"magmax_independent": dict(EPOCHS)},
        {"finetune": dict(EPOCHS)},
    ],
    "merge": [{"ema": {"of": "finetune"}}],
}
"""Methods whose networks change: each predicts all test images anew."""
TRAIN, TEST = "0-train.parquet", "0-test.parquet"
FILES = [f"{n}-{split}.parquet" for n in range(4) for split in ("train", "test")]


def sealed(count: int, *numbers: int) -> list[dict[str, Any]]:
    return [
        task | ({"sealed": True} if number in numbers else {})
        for number, task in enumerate(listed(count))
    ]


def as_in_a_run(store: Store, folder: Path, count: int, **sections: Any) -> Plan:
    """A plan, recorded and sealed as a run does it."""
    made = planned(store, folder, count, **sections)
    sources.keep(made.sources, store.memo)
    sources.seal(made.sources, made.stages, store.memo)
    return made


def missing(made: Plan, store: Store) -> tuple[Stage, ...]:
    return needed(made.targets, lambda stage: store.has(stage.operator, stage.key)).compute


def digests(made: Plan, store: Store) -> dict[str, dict[str, str]]:
    """sha256 of each file of each stage."""
    manifests = {s.key: store.manifest(s.operator, s.key) for s in made.stages}
    return {
        key: {name: entry["sha256"] for name, entry in manifest["files"].items()}
        for key, manifest in manifests.items()
    }


Case = tuple[Path, Path, dict[str, dict[str, str]]]


def case(base: Path, sections: dict[str, Any]) -> Case:
    """Files of four tasks, a store with three of them, and what all four at once come to."""
    folder, store = folder_of(base), Store(str(base / "store"))
    (base / "kept").mkdir()
    for name in FILES:
        shutil.copy2(folder / name, base / "kept" / name)
    made = as_in_a_run(store, folder, 3, **sections)
    pngs.compute(missing(made, store), store)
    once = Store(str(base / "once"))
    whole = planned(once, folder, 4, **sections)
    pngs.compute(whole.stages, once)
    return folder, base / "store", digests(whole, once)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("closed"), CLOSED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("trained"), TRAINED)


def without(of: Path, names: Sequence[str], to: Path) -> tuple[Path, Store]:
    """The case with some files deleted: the folder where it was, and a copy of its store."""
    for name in FILES:
        (of / name).unlink(missing_ok=True)
        if name not in names:
            shutil.copy2(of / "kept" / name, of / name)
    shutil.copytree(of / "store", to / "store")
    return of, Store(str(to / "store"))


def test_closed_forms_go_on_without_the_images(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    made = as_in_a_run(store, folder, 4, stream=sealed(4, 0), **CLOSED)
    assert explain(made, store).gone == ()
    pngs.compute(missing(made, store), store)
    assert digests(made, store) == closed[2]


def test_trained_methods_go_on_without_the_training_images(trained: Case, tmp_path: Path) -> None:
    gone = [TRAIN, "1-train.parquet"]
    folder, store = without(trained[0], gone, tmp_path)
    made = as_in_a_run(store, folder, 4, stream=sealed(4, 0, 1), **TRAINED)
    assert explain(made, store).gone == ()
    pngs.compute(missing(made, store), store)
    assert digests(made, store) == trained[2]


def test_what_still_needs_the_images_is_refused_by_name(trained: Case, tmp_path: Path) -> None:
    folder, store = without(trained[0], [TRAIN, TEST, "1-test.parquet"], tmp_path)
    made = as_in_a_run(store, folder, 4, stream=sealed(4, 0, 1), **TRAINED)
    needs = missing(made, store)
    first, second = explain(made, store).gone
    # Predictions after the last task read all test images; nothing reads the training images.
    predicts = tuple(stage.label for stage in needs if stage.operator == "predict")
    assert len(predicts) == 4
    assert all("task 4/4" in label for label in predicts)
    assert (first.task, first.key, first.stages) == ("week 0", "stream.0", predicts)
    assert (second.task, second.key, second.stages) == ("week 1", "stream.1", predicts)
    assert (first.files, second.files) == ((str(folder / TEST),), (str(folder / FILES[3]),))
    assert str(first.error()) == (
        f'stream.0: "week 0" is sealed, and 4 stages need images of it that are gone: '
        f"{', '.join(predicts[:3])} and 1 more; missing: {folder / TEST}; "
        "bring them back, or leave out what needs them"
    )


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        # Another backbone's features: those of three shards of the task, two of them training's.
        ({"features": {"shard_size": 4, "pooling": "avg"}}, ["features train", "features test"]),
        ({"methods": [{"joint": dict(EPOCHS)}]}, ["train joint", "predict joint"]),
        ({"methods": [{"finetune": {**EPOCHS, "epochs": 2}}]}, ["train finetune"]),
    ],
)
def test_what_is_new_needs_the_images(
    changes: dict[str, Any], stages: list[str], closed: Case, tmp_path: Path
) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    given = {"methods": ["simplecil"], "stream": sealed(3, 0)} | changes
    [gone] = explain(as_in_a_run(store, folder, 3, **given), store).gone
    for label in stages:
        assert any(each.startswith(label) for each in gone.stages), label
    assert gone.files == (str(folder / TEST), str(folder / TRAIN))


def test_exemplars_need_the_images_of_earlier_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "replay", "tests.test_exemplars:Replay")
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    given: dict[str, Any] = {"methods": [{"replay": dict(EPOCHS)}, {"finetune": dict(EPOCHS)}]}
    for stage in as_in_a_run(store, folder, 3, **given).stages:
        store.commit(stage.assignment(), Result(files={}), 0.0)
    (folder / TRAIN).unlink()
    made = as_in_a_run(store, folder, 4, stream=sealed(4, 0), **given)
    [gone] = explain(made, store).gone
    assert gone.stages == ("train replay order listed seed 0 task 4/4",)


def test_a_cleared_shard_is_refused_only_if_it_is_needed(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    made = as_in_a_run(store, folder, 3, stream=sealed(3, 0), **CLOSED)
    shard = next(s for s in made.stages if s.label == "features train 1/2")
    store.blobs.remove(f"features/{shard.key}")
    # All results are stored: nothing reads it.
    assert explain(made, store).gone == ()
    [gone] = explain(planned(store, folder, 4, stream=sealed(4, 0), **CLOSED), store).gone
    assert gone.stages == ("features train 1/2",)


def test_sources_of_a_sealed_task_are_not_looked_at(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [], tmp_path)
    before = planned(store, folder, 3, **CLOSED)
    pngs.write(folder / TRAIN, [(pngs.png(7), 0, "")], "mn")
    made = planned(store, folder, 3, stream=sealed(3, 0), **CLOSED)
    assert [s.key for s in made.stages] == [s.key for s in before.stages]
    changed = planned(store, folder, 3, **CLOSED)
    assert [s.key for s in made.stages] != [s.key for s in changed.stages]


def test_the_index_of_a_sealed_task_is_stored_from_its_record(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    for stage in pngs.of(planned(store, folder, 3, stream=sealed(3, 0), **CLOSED), "dataset"):
        store.blobs.remove(f"dataset/{stage.key}")
    made = planned(store, folder, 4, stream=sealed(4, 0), **CLOSED)
    assert explain(made, store).gone == ()
    pngs.compute(missing(made, store), store)
    assert digests(made, store) == closed[2]


def test_a_record_is_asked_for(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TEST], tmp_path)
    with pytest.raises(MissingData) as caught:
        planned(store, folder, 3, **CLOSED)
    assert str(caught.value).endswith(
        f"stream.0.test: {folder / TEST}: not found; "
        "sealed: true takes the task as the store has recorded it"
    )
    empty = Store(str(tmp_path / "empty"))
    with pytest.raises(MissingData) as caught:
        planned(empty, folder, 3, **CLOSED)
    assert str(caught.value).endswith(f"stream.0.test: {folder / TEST}: not found")
    says = 'stream.0.sealed: the store has no record of "week 0" as it is described here; run once'
    for other, changes in ((empty, {}), (store, {"limit_per_class": 2})):
        stream = sealed(3, 0)
        stream[0] |= changes
        with pytest.raises(ConfigError, match=says):
            planned(other, folder, 3, **CLOSED, stream=stream)


def test_a_record_is_found_under_every_name_of_a_task(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    other = {
        "name": "other", "domain": "photographs", "only": "n", "sealed": True, "image": "image",
        "train": str(folder / TRAIN), "test": str(folder / TEST), "rename": {"n": "new"},
    }  # fmt: skip
    made = planned(store, folder, 0, stream=[other], methods=["simplecil"])
    assert made.runs[0].stream.classes == ("new",)


def test_a_damaged_record_is_no_record(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [], tmp_path)
    source = planned(store, folder, 3, **CLOSED).sources[0]
    name = f"{FOLDER}/{source.record}"
    data = bytearray(store.blobs.get(name) or b"")
    data[-9] ^= 1
    store.blobs.replace(name, bytes(data))
    with pytest.raises(StorageError, match=f"record {name} is damaged; remove it, and run once"):
        planned(store, folder, 3, stream=sealed(3, 0), **CLOSED)
    for repair in (False, True):
        found = housekeeping.verify(store, repair)
        [damaged] = found["damaged"]
        assert (damaged["operator"], damaged["key"]) == (FOLDER, source.record)
        assert not found["set_aside"]
    # A run that sees the images replaces it.
    sources.keep([source], store.memo)
    assert planned(store, folder, 3, stream=sealed(3, 0), **CLOSED).sources[0].sealed


def test_skipped_images_and_those_held_out_stay_as_they_were(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    rows = [(pngs.png(n, label=n % 2), n % 2, "") for n in range(20)]
    pngs.write(folder / TRAIN, [*rows, (b"no image", 0, "")], "mn")
    task = {**listed(1)[0], "holdout": 0.25, "on_bad_image": "skip"}
    made = as_in_a_run(store, folder, 0, stream=[task], methods=["simplecil"])
    (folder / TRAIN).unlink()
    [found] = planned(
        store, folder, 0, stream=[{**task, "sealed": True}], methods=["simplecil"]
    ).sources
    [before] = made.sources
    assert [e["row"] for e in found.dataset.bad_images] == [20]
    assert found.dataset.bad_images == before.dataset.bad_images
    for one, two in zip(
        (before.dataset.train, before.dataset.test),
        (found.dataset.train, found.dataset.test),
        strict=True,
    ):
        assert one.stage().key == two.stage().key
        assert one.places(0, len(one)) == two.places(0, len(two))
    assert len(found.dataset.test) == 4


def test_an_object_store_keeps_records_and_says_what_is_gone(closed: Case) -> None:
    folder = closed[0]
    memory = fsspec.filesystem("memory")
    base, store = "memory://sealed-tasks", Store("memory://sealed-store")
    stream = listed(2)
    for task in stream:
        for split in ("train", "test"):
            data = (folder / "kept" / task[split]).read_bytes()
            memory.pipe_file(f"/sealed-tasks/{task[split]}", data)
            task[split] = f"{base}/{task[split]}"
    given = {"methods": ["simplecil"], "stream": stream}
    made = as_in_a_run(store, folder, 0, **given)
    memory.rm("/sealed-tasks/0-test.parquet")
    with pytest.raises(MissingData, match="sealed: true takes the task as the store has recorded"):
        planned(store, folder, 0, **given)
    stream[0]["sealed"] = True
    again = as_in_a_run(store, folder, 0, **given)
    assert [s.key for s in again.stages] == [s.key for s in made.stages]
    [gone] = explain(again, store).gone
    assert gone.files == (f"{base}/0-test.parquet",)
    assert gone.stages == ("features test 1/1",)
    [(name, keys)] = Records(store.blobs).sealed()
    assert (name, keys) == (again.sources[0].record, {s.key for s in again.stages})


def test_files_are_asked_for_in_folders_here_and_elsewhere(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    names = [f"{n}.png" for n in range(300)]
    here = [f"{tmp_path}/{name}" for name in names]
    for name in names[:299]:
        (tmp_path / name).touch()
    # A folder with many of them is listed, of one with few each is asked for.
    for name in names[:39]:
        memory.pipe_file(f"/many/{name}", b"")
        memory.pipe_file(f"/few/{name}", b"")
    many = [f"memory://many/{name}" for name in names[:40]]
    few = [f"memory://few/{name}" for name in names[30:40]]
    none = [f"memory://none/{name}" for name in names[:40]]
    found = presence.gone([*here, *many, *few, *none, *here])
    assert found == {here[-1], many[-1], few[-1], *none}
    below = f"{here[0]}/no folder"
    assert presence.gone([below]) == {below}
    assert presence.gone([]) == set()


def test_the_newest_record_wins_and_an_equal_one_is_not_written(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    made = as_in_a_run(store, folder, 1, methods=["simplecil"])
    [file] = (tmp_path / "store" / FOLDER).iterdir()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    as_in_a_run(store, folder, 1, methods=["simplecil"])
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    pngs.write(folder / TRAIN, [(pngs.png(7), 0, "")], "mn")
    as_in_a_run(store, folder, 1, methods=["simplecil"])
    [source] = planned(store, folder, 1, stream=sealed(1, 0), methods=["simplecil"]).sources
    assert (len(source.dataset.train), len(made.sources[0].dataset.train)) == (1, 8)


# --- what the store keeps ---------------------------------------------------------------------


def garbage(store: Store) -> set[str]:
    found = housekeeping.collect(store, days=0, unused=True, delete=False)
    return set(found["files"])


def test_nothing_that_a_sealed_task_lives_on_is_garbage(closed: Case, tmp_path: Path) -> None:
    """No run record is there: without the seal everything goes."""
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    # Features of the same images in another spec, whose shards are cut otherwise.
    (folder / TRAIN).write_bytes((folder / "kept" / TRAIN).read_bytes())
    (folder / TEST).write_bytes((folder / "kept" / TEST).read_bytes())
    other = planned(store, folder, 2, methods=["slda"], features={"shard_size": 3})
    pngs.compute(missing(other, store), store)
    own = planned(store, folder, 3, **CLOSED)
    everything = {name for name in store.blobs.files("") if name.endswith("manifest.json")}
    records = {name for name in store.blobs.files(FOLDER)}
    assert len(records) == 3
    assert garbage(store) >= everything
    assert not garbage(store) & records
    as_in_a_run(store, folder, 3, stream=sealed(3, 0), **CLOSED)
    left = garbage(store)
    assert not left & {f"{s.operator}/{s.key}/manifest.json" for s in own.stages}
    assert not left & set(store.blobs.files(FOLDER))
    # Of the other spec the features of the first task's images stay, in shards of 3, 3, 2 and 3, 1,
    # and a shard of 2 that the sealed spec has, too.
    kept = [s for s in other.stages if f"{s.operator}/{s.key}/manifest.json" not in left]
    sizes = [s.hints["images"] for s in kept if s.operator == "features"]
    assert sorted(sizes) == [1, 2, 2, 3, 3, 3]
    assert {s.operator for s in kept} == {"features", "dataset"}
    lost = [s for s in other.stages if s not in kept]
    assert {s.operator for s in lost} == {"features", "fit", "evaluate"}
    housekeeping.collect(store, days=0, unused=True, delete=True)
    (folder / TRAIN).unlink()
    made = as_in_a_run(store, folder, 4, stream=sealed(4, 0), **CLOSED)
    assert explain(made, store).gone == ()
    pngs.compute(missing(made, store), store)
    assert digests(made, store) == closed[2]


def test_a_damaged_seal_is_named(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    as_in_a_run(store, folder, 1, methods=["simplecil"])
    as_in_a_run(store, folder, 1, stream=sealed(1, 0), methods=["simplecil"])
    [name] = [n for n in store.blobs.files(FOLDER) if n.endswith(".json")]
    assert set(json.loads(store.blobs.get(name) or b"")) == {"stages"}
    store.blobs.replace(name, b"{")
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        garbage(store)


# --- other names ------------------------------------------------------------------------------


def test_another_name_computes_nothing(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    stream = sealed(3, 0)
    stream[0]["rename"] = {"m": "zebra", "n": "m"}
    # Class m came again: now it is another one's name, and has to be given here, too.
    stream[2]["rename"] = {"m": "zebra"}
    made = planned(store, folder, 3, stream=stream, **CLOSED)
    assert missing(made, store) == ()
    assert made.runs[0].stream.classes == ("zebra", "m", "o", "p")
    apart = planned(store, folder, 3, stream=stream, **CLOSED, disjoint_classes=True)
    assert apart.runs[0].stream.classes[:2] == ("week 0/zebra", "week 0/m")


def test_methods_on_clip_read_the_name_from_its_task_on(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    given = {"backbone": BACKBONE, "methods": ["simplecil", "zs_clip", COOP]}
    before = planned(store, folder, 3, **given)
    stream = listed(3)
    stream[1]["rename"] = {"o": "ocelot"}
    after = planned(store, folder, 3, stream=stream, **given)
    runs = list(zip(before.runs, after.runs, strict=True))
    assert [one.model.key == two.model.key for one, two in runs] == [True, False, False]
    for operator in ("dataset", "features"):
        one, two = ([s.key for s in pngs.of(made, operator)] for made in (before, after))
        assert one == two
    trains = zip(pngs.of(before, "train"), pngs.of(after, "train"), strict=True)
    assert [one.key == two.key for one, two in trains] == [True, False, False]


def test_only_names_classes_as_their_source_does(closed: Case, tmp_path: Path) -> None:
    folder, store = without(closed[0], [TRAIN, TEST], tmp_path)
    stream = sealed(1, 0)
    # n is left out, so that its name is free.
    stream[0] |= {"only": "m", "rename": {"m": "n"}}
    made = planned(store, folder, 0, stream=stream, methods=["simplecil"])
    assert made.runs[0].stream.classes == ("n",)


def test_numbers_get_names(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    for split in ("train", "test"):
        rows = [(pngs.png(n, label=label), label, "") for n, label in enumerate((7, 7, 9))]
        pngs.write(folder / f"9-{split}.parquet", rows)
    numbered: dict[str, Any] = {"train": "9-train.parquet", "test": "9-test.parquet"}
    numbered |= {"name": "numbers", "rename": {7: "m", "9": "z"}}
    made = planned(store, folder, 0, stream=[*listed(1), numbered], methods=["simplecil"])
    assert made.runs[0].stream.classes == ("m", "n", "z")


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ({"mm": "x"}, 'stream.0.rename: no class "mm"; did you mean "m"?'),
        ({"m": "n"}, 'stream.0.rename: "m" and "n" would both be "n"; to make one class of them'),
        ({"m": "x", "n": "x"}, '"m" and "n" would both be "x"'),
        ({"m": 3}, "stream.0.rename.m: must be text of 1..200 characters, got 3"),
        ({"m": ""}, "stream.0.rename.m: must be text of 1..200 characters"),
        (["m"], "stream.0.rename: must be a mapping of names to names, got a list of 1"),
    ],
)
def test_bad_names_are_refused(rename: Any, says: str, tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    stream = [{**listed(1)[0], "rename": rename}]
    with pytest.raises(ConfigError) as caught:
        planned(store, folder, 0, stream=stream, methods=["simplecil"])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- reasons ----------------------------------------------------------------------------------


def reasons(made: Plan, store: Store) -> dict[str, str]:
    rows = explain(made, store).stages
    return {row.stage.replace(" order listed seed 0", ""): row.why for row in rows if row.why}


def test_a_plan_says_which_tasks_rows_changed(closed: Case, trained: Case, tmp_path: Path) -> None:
    folder, store = without(trained[0], [], tmp_path)
    before = planned(store, folder, 3, **TRAINED)
    grown = reasons(planned(store, folder, 4, **TRAINED), store)
    for method, operators in (("l2p", ("train", "predict")), ("magmax_independent", ("join",))):
        for operator in operators:
            says = f"no {operator} of {method} for task 4 is stored yet"
            assert grown[f"{operator} {method} task 4/4"] == says
    pngs.write(folder / "1-train.parquet", [(pngs.png(77), 2, "")], "mnopqa")
    after = planned(store, folder, 3, **TRAINED)
    old, new = (made.runs[0].stream.tasks[1].learned.rows[:8] for made in (before, after))
    rows, found = f"task 2: rows {old} -> {new}", reasons(after, store)
    assert found["train l2p task 2/3"] == rows
    assert found["train magmax_independent task 2/3"] == rows
    assert found["train l2p task 3/3"] == "the task before changed"
    assert found["predict l2p task 3/3"] == "model changed"

    folder, store = without(closed[0], [], tmp_path / "closed")
    pngs.write(folder / "1-train.parquet", [(pngs.png(77), 2, "")], "mnopqa")
    pngs.write(folder / "2-test.parquet", [(pngs.png(78), 0, "")], "mnopqa")
    changed = planned(store, folder, 3, **CLOSED)
    found, task = reasons(changed, store), changed.runs[0].stream.tasks[2]
    assert found["fit simplecil"] == rows
    assert found["evaluate simplecil"].startswith("model changed; task 3: rows ")
    assert f"-> {task.tested.rows[:8]}" in found["evaluate simplecil"]
