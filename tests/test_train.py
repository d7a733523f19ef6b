"""Chains of tasks through the real store, without Ray: trained, cached, resumed, predicted."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork import methods
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Task, shared, trains
from graftwork.operators import live
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.backbones import loading
from graftwork.operators.data import dataset
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import BadDataError, DamagedStage, Diverged, IncompatibleError
from graftwork.operators.formats import predictions, selection
from graftwork.operators.images import pixels
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.fitting import FitParameters
from graftwork.operators.parameters.hints import FitHints
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import class_order
from graftwork.operators.training import loop, snapshots
from graftwork.operators.training.rows import TaskRows
from graftwork.operators.training.settings import Log, Settings
from graftwork.pipelines.planning.plan import Plan
from tests import pngs
from tests.pngs import compute, of

TRAIN, TEST = pngs.rows(3, 0), pngs.rows(2, 5000)
FINETUNE = {"epochs": 2, "batch_size": 4}
ORDER = list(class_order(pngs.CLASSES, 1993))
"""Classes by arrival, two in each task."""


class Killed(BaseException):
    """What nothing catches: the process is gone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), TRAIN, TEST)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    """An undisturbed run of three tasks."""
    store = Store(str(tmp_path_factory.mktemp("whole")))
    made = pngs.plan(store, folder)
    compute(made.stages, store)
    return store, made


def state_of(store: Store, stage: Stage) -> bytes:
    return store.read("train", stage.key, "state.safetensors")


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def index_of(store: Store, made: Plan, split: str) -> SplitIndex:
    key = getattr(made.data.sources[0], split).stage().key
    return dataset.read_index(store.read("dataset", key, "index.parquet"))


def of_tasks(labels: np.ndarray, last: int, first: int = 0) -> np.ndarray:
    """Rows of the tasks from the first to the last one, task by task."""
    tasks = (ORDER[2 * number : 2 * number + 2] for number in range(first, last + 1))
    return np.concatenate([np.flatnonzero(np.isin(labels, classes)) for classes in tasks])


def arrived(labels: np.ndarray) -> list[int]:
    """Class numbers by arrival."""
    return [ORDER.index(label) for label in labels.tolist()]


def encoded(folder: Path, split: str) -> list[bytes]:
    return pq.read_table(folder / f"{split}.parquet")["image"].to_pylist()


def network(made: Plan) -> Any:
    return loading.load(made.backbone.model, made.backbone.weights, "token")


def by_hand(made: Plan, folder: Path, seed: int = 0) -> list[tuple[State, Log]]:
    """The chain of `made` by the loop alone: no stage, no store."""
    [run] = made.runs
    method = methods.build(run.method.name, run.method.hyperparameters)
    train, images = made.data.sources[0].train, encoded(folder, "train")
    done: list[tuple[State, Log]] = []
    for number in range(3):
        rows = of_tasks(train.labels, number, number)
        given = TaskRows(
            [images[row] for row in rows],
            digests=train.digests[rows],
            samples=train.stored().at(rows).sample_ids(),
            name=str,
            targets=torch.tensor(arrived(train.labels[rows])),
            query=None,
            preprocessing=made.preprocessing,
            seed=seed,
            task=number,
        )
        state, log = loop.train_task(
            method,
            network(made),
            Task(
                index=number,
                count=3,
                current=(2 * number, 2 * number + 1),
                before=2 * number,
                seen=2 * number + 2,
            ),
            given,
            done[-1][0] if done else None,
            Settings(seed=seed),
        )
        done.append((state, log))
    return done


# --- a chain ----------------------------------------------------------------------------------


def test_a_run_is_stored_and_a_second_one_computes_nothing(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    again = compute(made.stages, store)
    assert [done.key for done in again] == [stage.key for stage in made.stages]
    assert all(done.reused for done in again)
    for stage in made.stages:
        store.verify(stage.operator, stage.key)
    assert store.blobs.files(snapshots.FOLDER) == {}


def test_states_are_those_of_the_loop(whole: tuple[Store, Plan], folder: Path) -> None:
    store, made = whole
    for stage, (state, log) in zip(of(made, "train"), by_hand(made, folder), strict=True):
        assert same(load_tensors(state_of(store, stage)), state)
        facts = store.manifest("train", stage.key)["facts"]
        assert facts["epochs"] == log.epochs
        assert (facts["steps"], facts["images_forwarded"]) == (log.steps, log.images_forwarded)
        assert facts["steps"] == 4  # six images in batches of four, twice
        assert facts["images_forwarded"] == 12 == stage.hints["images"]
        assert facts["trainable_parameters"] == log.trainable
        assert facts["state_bytes"] == sum(t.numel() * t.element_size() for t in state.values())


def test_predictions_are_those_of_the_network(whole: tuple[Store, Plan], folder: Path) -> None:
    store, made = whole
    [run] = made.runs
    test, images = index_of(store, made, "test"), encoded(folder, "test")
    inputs = given_pixels(made, images)
    method = methods.build("finetune", run.method.hyperparameters)
    for number, (stage, model) in enumerate(
        zip(of(made, "predict"), of(made, "train"), strict=True)
    ):
        task = Task(index=number, count=3, current=(), before=2 * number, seen=2 * number + 2)
        learner, _ = loop.open_learner(
            method, network(made), task, load_tensors(state_of(store, model)), Settings(seed=0)
        )
        rows = of_tasks(test.labels, number)
        with torch.no_grad():
            scores = learner.eval().logits(inputs[rows], None)
        table = predictions.read(store, "predict", stage.key)
        assert table["sample"].tolist() == list(range(4 * (number + 1)))
        assert table["label"].tolist() == arrived(test.labels[rows])
        assert set(table["task_trained"].tolist()) == {number}
        assert len(set(table["predicted"].tolist())) > 1
        assert table["predicted"].tolist() == scores.argmax(1).tolist()
        own = [place // 4 for place in range(len(rows))]
        assert table["true_task"].tolist() == own
        halves = scores.view(len(rows), -1, 2)[torch.arange(len(rows)), own].argmax(1)
        within = [2 * t + c for t, c in zip(own, halves.tolist(), strict=True)]
        assert table["predicted_in_task"].tolist() == within
        facts = store.manifest("predict", stage.key)["facts"]
        assert facts == {"images_forwarded": len(rows)}
        kept = load_tensors(store.read("predict", stage.key, "scores.safetensors"))
        assert kept.keys() == {"scores"}
        torch.testing.assert_close(kept["scores"], scores)
        assert stage.hints["images"] == len(rows)


def given_pixels(made: Plan, images: list[bytes]) -> torch.Tensor:
    return pixels.normalise(pixels.prepare(images, made.preprocessing), made.preprocessing)


def test_the_evaluation_puts_predictions_together(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    [evaluate] = of(made, "evaluate")
    parts = [predictions.read(store, "predict", stage.key) for stage in of(made, "predict")]
    table = predictions.read(store, "evaluate", evaluate.key)
    for name in table:
        assert np.array_equal(table[name], np.concatenate([part[name] for part in parts]))
    assert [len(part["sample"]) for part in parts] == [4, 8, 12]
    whole_file = pq.read_table(
        io.BytesIO(store.read("evaluate", evaluate.key, "predictions.parquet"))
    )
    assert set(whole_file["order"].to_pylist()) == {"1993"}
    assert set(whole_file["seed"].to_pylist()) == {0}
    curve = [100 * float((p["predicted"] == p["label"]).mean()) for p in parts]
    summary = json.loads(store.read("evaluate", evaluate.key, "summary.json"))
    assert summary["curve"] == pytest.approx(curve)

    facts = store.manifest("evaluate", evaluate.key)["facts"]
    assert facts["a_last"] == pytest.approx(curve[-1])
    chain = [store.manifest("train", stage.key) for stage in of(made, "train")]
    made_by = [store.manifest("predict", stage.key) for stage in of(made, "predict")]
    assert facts["forwards"] == 3 * 12 + 4 + 8 + 12
    assert facts["seconds_fitting"] == pytest.approx(sum(m["seconds"] for m in [*chain, *made_by]))
    assert facts["state_bytes"] == chain[-1]["facts"]["state_bytes"]
    assert facts["trainable_parameters"] == chain[-1]["facts"]["trainable_parameters"]
    assert facts["fit"] == []
    assert [task["epochs"] for task in facts["training"]] == [m["facts"]["epochs"] for m in chain]


def test_a_chain_says_how_far_it_is(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder)
    compute(of(made, "dataset"), store)
    heard: list[live.Facts] = []
    with live.sink(heard.append, interval=0.0):
        compute(of(made, "train")[:2], store)
    assert [tuple(f[n] for n in ("task", "epoch", "step")) for f in heard] == [
        (task, epoch, step) for task in (1, 2) for epoch in (1, 2) for step in (1, 2)
    ]
    assert all((f["tasks"], f["epochs"], f["steps"]) == (3, 2, 2) for f in heard)


def test_predictions_do_not_depend_on_the_order_of_test_images(
    whole: tuple[Store, Plan], tmp_path: Path
) -> None:
    store, made = whole
    order = np.random.default_rng(0).permutation(len(TEST))
    turned = pngs.plan(store, pngs.data(tmp_path, TRAIN, [TEST[row] for row in order]))
    assert [s.key for s in of(turned, "train")] == [s.key for s in of(made, "train")]
    compute(turned.stages, store)

    def decided(of_plan: Plan) -> dict[tuple[int, bytes], tuple[int, ...]]:
        test = index_of(store, of_plan, "test")
        digests = test.digests[of_tasks(test.labels, 2)]
        found = {}
        for stage in of(of_plan, "predict"):
            table = predictions.read(store, "predict", stage.key)
            for row, sample in enumerate(table["sample"].tolist()):
                about = tuple(int(table[name][row]) for name in table if name != "sample")
                found[about[0], digests[sample].tobytes()] = about
        return found

    assert decided(turned) == decided(made)
    assert len(decided(made)) == 4 + 8 + 12


@pytest.mark.parametrize("walk", ["tasks", "stream"])
def test_a_method_that_decides_by_the_batch_gets_one_task_after_the_other(
    whole: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch, walk: str
) -> None:
    """Fine-tuning does not look at its neighbours: whatever the batches are, it decides alike."""
    store, made = whole
    last = of(made, "predict")[-1]
    voting = replace(last, parameters={**last.parameters, "vote_batch": 5, "walk": walk})
    shown: list[list[int]] = []
    batch = TaskRows.batch
    monkeypatch.setattr(
        TaskRows, "batch", lambda self, rows, *more: shown.append(rows) or batch(self, rows, *more)
    )
    compute([voting], store)
    table = predictions.read(store, "predict", last.key)
    again = predictions.read(store, "predict", voting.key)
    assert all(np.array_equal(table[name], again[name]) for name in table)
    assert len(set(table["predicted"].tolist())) > 1
    columns = arrived(index_of(store, made, "test").labels)
    if walk == "stream":
        assert [len(rows) for rows in shown] == [5, 5, 2]
        # Class by class in the order learned, hence one task after the other.
        assert [row for rows in shown for row in rows] == sorted(range(12), key=columns.__getitem__)
        return
    # A loader for every task of two classes with two images each, in the data set's order.
    own = [[row for row in range(12) if columns[row] // 2 == task] for task in range(3)]
    assert shown == own
    assert max(map(len, own)) == 4


# --- interruptions ----------------------------------------------------------------------------


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After so many snapshots the process dies, one number per attempt; none are left: never."""
    after: list[int] = []
    keep = snapshots.keep
    count = 0

    def kept(*arguments: Any) -> None:
        nonlocal count
        keep(*arguments)
        count += bool(after)
        if after and count == after[0]:
            count = 0
            after.pop(0)
            raise Killed

    monkeypatch.setattr(snapshots, "keep", kept)
    yield after


@pytest.mark.parametrize("deaths", [[1], [2], [3], [4], [1, 1, 1, 1], [2, 1]], ids=str)
def test_a_killed_task_goes_on_from_its_snapshot(
    deaths: list[int], whole: tuple[Store, Plan], store: Store, folder: Path, killing: list[int]
) -> None:
    reference, _ = whole
    made = pngs.plan(store, folder, "resources.train.checkpoint_minutes=0")
    first, second, _ = of(made, "train")
    compute([*of(made, "dataset"), first], store)
    killing += deaths
    for number, _ in enumerate(deaths):
        with pytest.raises(Killed):
            compute([second], store)
        assert not store.has("train", second.key)
        found = snapshots.find(store, second.key)
        assert found is not None
        steps = sum(deaths[: number + 1])
        assert found.counts == [steps, [4, 6, 10, 12][steps - 1]]
    [done] = compute([second], store)
    assert not done.reused
    assert state_of(store, second) == state_of(reference, second)
    names = ("epochs", "steps", "images_forwarded", "trainable_parameters", "state_bytes")
    expected = reference.manifest("train", second.key)["facts"]
    assert {n: done.facts[n] for n in names} == {n: expected[n] for n in names}
    if sum(deaths) == 4:
        assert done.facts["images_per_second"] == 0  # all of them by the process before
    assert snapshots.find(store, second.key) is None


def test_steps_before_the_snapshot_are_not_taken_again(
    store: Store, folder: Path, killing: list[int]
) -> None:
    made = pngs.plan(store, folder, "resources.train.checkpoint_minutes=0")
    compute(of(made, "dataset"), store)
    first = of(made, "train")[0]
    killing.append(3)
    with pytest.raises(Killed):
        compute([first], store)
    heard: list[live.Facts] = []
    with live.sink(heard.append, interval=0.0):
        compute([first], store)
    assert [(facts["epoch"], facts["step"]) for facts in heard] == [(2, 2)]


def test_a_damaged_snapshot_costs_time_alone(
    whole: tuple[Store, Plan], store: Store, folder: Path, killing: list[int]
) -> None:
    made = pngs.plan(store, folder, "resources.train.checkpoint_minutes=0")
    compute(of(made, "dataset"), store)
    first = of(made, "train")[0]
    killing.append(3)
    with pytest.raises(Killed):
        compute([first], store)
    data = bytearray(store.blobs.get(snapshots.name(first.key)) or b"")
    data[len(data) // 2] ^= 1
    store.blobs.replace(snapshots.name(first.key), bytes(data))
    heard: list[live.Facts] = []
    with live.sink(heard.append, interval=0.0):
        compute([first], store)
    assert len(heard) == 4
    assert state_of(store, first) == state_of(whole[0], first)
    assert snapshots.find(store, first.key) is None


def test_rare_snapshots_are_not_taken_in_a_short_task(
    store: Store, folder: Path, killing: list[int]
) -> None:
    made = pngs.plan(store, folder, "resources.train.checkpoint_minutes=60")
    killing.append(1)
    compute([*of(made, "dataset"), of(made, "train")[0]], store)


# --- what is wrong ----------------------------------------------------------------------------


def class_folders(folder: Path, rows: list[pngs.Row]) -> Path:
    for number, (image, label, _) in enumerate(rows):
        path = folder / f"class{label}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


@pytest.mark.parametrize("operator", ["train", "predict"])
@pytest.mark.parametrize("image", ["other", "truncated", "gone"])
def test_an_image_that_changed_since_it_was_indexed_is_named(
    operator: str, image: str, store: Store, tmp_path: Path
) -> None:
    split, rows = {"train": ("train", TRAIN), "predict": ("test", TEST)}[operator]
    places = {"train": TRAIN, "test": TEST} | {split: rows}
    data = {name: str(class_folders(tmp_path / name, part)) for name, part in places.items()}
    made = pngs.plan(store, tmp_path, dataset=data)
    compute(of(made, "dataset"), store)
    stage = of(made, operator)[0]
    if operator == "predict":
        compute(of(made, "train")[:1], store)
    victim = Path(stage.hints["places"]["files"][1])
    if image == "gone":
        victim.unlink()
    else:
        content = victim.read_bytes()
        victim.write_bytes(pngs.png(777) if image == "other" else content[:-30])
    with pytest.raises(BadDataError) as caught:
        compute([stage], store)
    says = {
        "other": f"image {victim} changed since it was indexed; run again",
        "truncated": f"image {victim} changed since it was indexed; run again",
        "gone": f"{victim}: not found",
    }
    assert str(caught.value) == says[image]
    assert not store.has(operator, stage.key)


def test_an_image_that_never_could_be_decoded_is_named(store: Store, tmp_path: Path) -> None:
    """Indexing reads headers only."""
    bad = pngs.png(5)[:-40]
    made = pngs.plan(store, pngs.data(tmp_path, [(bad, 0, "a"), *TRAIN], TEST))
    compute(of(made, "dataset"), store)
    first = ORDER.index(0)
    stage = next(s for s in of(made, "train") if first in s.parameters["images"]["classes"])
    before = of(made, "train")[: stage.parameters["task"]["index"]]
    compute(before, store)
    with pytest.raises(BadDataError) as caught:
        compute([stage], store)
    assert str(caught.value).startswith(f"{tmp_path / 'train.parquet'} row 0: truncated or damaged")
    assert str(caught.value).endswith("leave it out with dataset.on_bad_image: skip")


def test_a_damaged_state_is_found_by_whoever_reads_it(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder)
    first, second, _ = of(made, "train")
    compute([*of(made, "dataset"), first], store)
    [file] = Path(store.url, "train", first.key).glob("state.safetensors.*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for stage in (second, of(made, "predict")[0]):
        with pytest.raises(DamagedStage) as caught:
            compute([stage], store)
        assert (caught.value.operator, caught.value.stage_key) == ("train", first.key)
        assert "state.safetensors has sha256" in caught.value.reason


def test_training_that_diverges_names_stage_step_and_images(store: Store, folder: Path) -> None:
    wild = {"finetune": FINETUNE | {"lr": 1e30}}
    made = pngs.plan(store, folder, "resources.train.checkpoint_minutes=0", methods=[wild])
    first = of(made, "train")[0]
    compute(of(made, "dataset"), store)
    with pytest.raises(Diverged) as caught:
        compute([first], store)
    message = str(caught.value)
    assert message.startswith("train finetune order 1993 seed 0 task 1/3: task 0, epoch 1, step 2")
    assert "lower lr" in message and f"{folder / 'train.parquet'} row " in message
    assert len(message.splitlines()) == 1
    # The one before the step that failed stays, and fails in the same way.
    found = snapshots.find(store, first.key)
    assert found is not None and (found.epoch, found.step) == (0, 1)
    with pytest.raises(Diverged) as again:
        compute([first], store)
    assert str(again.value) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(
    value: float, whole: tuple[Store, Plan], store: Store, folder: Path
) -> None:
    reference, made = whole
    pngs.plan(store, folder)
    first = of(made, "train")[0]
    compute(of(made, "dataset"), store)
    state = load_tensors(state_of(reference, first))
    state["head.bias"][1] = value
    result = Result(files={"state.safetensors": save_tensors(state)}, facts={})
    store.commit(first.assignment(), result, 0.0)
    stage = of(made, "predict")[0]
    with pytest.raises(Diverged) as caught:
        compute([stage], store)
    row = min(stage.hints["places"]["runs"])[1]
    assert str(caught.value) == (
        f"predict finetune order 1993 seed 0 task 1/3: scores of {folder / 'test.parquet'} "
        f"row {row} are NaN or infinite"
    )


def test_other_weights_than_planned_are_refused(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder)
    first = of(made, "train")[0]
    compute(of(made, "dataset"), store)
    other = replace(first, parameters={**first.parameters, "backbone": "0" * 64})
    with pytest.raises(IncompatibleError, match="changed since the plan: expected 000000000000"):
        compute([other], store)


# --- other streams and contracts --------------------------------------------------------------


def test_joint_trains_once_and_answers_for_every_task(store: Store, folder: Path) -> None:
    made = pngs.plan(
        store,
        folder,
        methods=[{"joint": FINETUNE | {"lr": 0.03, "backbone_lr": 1e-3, "epochs": 6}}],
    )
    compute(made.stages, store)
    [model], [stage] = of(made, "train"), of(made, "predict")
    table = predictions.read(store, "predict", stage.key)
    test = index_of(store, made, "test")
    learner, _ = loop.open_learner(
        methods.build("joint", made.runs[0].method.hyperparameters),
        network(made),
        Task(index=0, count=1, current=tuple(range(6)), before=0, seen=6),
        load_tensors(state_of(store, model)),
        Settings(seed=0),
    )
    with torch.no_grad():
        scores = learner.eval().logits(given_pixels(made, encoded(folder, "test")), None)
    for number in range(3):
        rows = of_tasks(test.labels, number)
        own = table["task_trained"] == number
        assert table["sample"][own].tolist() == list(range(len(rows)))
        assert table["label"][own].tolist() == arrived(test.labels[rows])
        chosen = scores[rows, : 2 * number + 2].argmax(1).tolist()
        assert table["predicted"][own].tolist() == chosen
        assert len(set(chosen)) > 1
    assert store.manifest("predict", stage.key)["facts"]["images_forwarded"] == 12


@pytest.mark.parametrize(
    "given",
    [
        {"magmax_independent": FINETUNE | {"lr": 1e-3}},
        {"esn": FINETUNE | {"prompt_length": 2, "candidates": "fast"}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_tasks_side_by_side_are_those_of_the_loop(
    given: dict[str, Any], store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder, methods=[given])
    first, *others = of(made, "train")
    joins = of(made, "join")
    # Whichever expert is done first; those that share something follow the first join.
    compute([*of(made, "dataset"), first, joins[0], *others[::-1], *joins[1:]], store)
    method = methods.build(made.runs[0].method.name, made.runs[0].method.hyperparameters)
    states: list[State] = []
    for expert, join in zip([first, *others], joins, strict=True):
        task = pngs.task_of(expert)
        rows, settings = pngs.training_rows(join, store), Settings(seed=0)
        start = shared(method, states[0]) if states else None
        state, log = loop.train_task(trains(method), network(made), task, rows, start, settings)
        assert same(load_tensors(state_of(store, expert)), state)
        assert store.manifest("train", expert.key)["facts"]["trainable_parameters"] == log.trainable
        before = states[-1] if states else None
        joined, log = loop.join_task(method, network(made), task, rows, before, state, settings)
        assert same(load_tensors(store.read("join", join.key, "state.safetensors")), joined)
        facts = store.manifest("join", join.key)["facts"]
        assert facts == {
            "images_forwarded": 6 if task.index and method.card.shared else 0,
            "state_bytes": sum(t.numel() * t.element_size() for t in joined.values()),
        }
        states.append(joined)

    compute(made.stages, store)
    test, images = index_of(store, made, "test"), given_pixels(made, encoded(folder, "test"))
    for number, stage in enumerate(of(made, "predict")):
        task = pngs.task_of(stage)
        learner, _ = loop.open_learner(
            method, network(made), task, states[number], Settings(seed=0)
        )
        rows = of_tasks(test.labels, number)
        with torch.no_grad():
            scores = learner.eval().logits(images[rows], None)
        table = predictions.read(store, "predict", stage.key)
        assert table["predicted"].tolist() == scores.argmax(1).tolist()

    [evaluate] = of(made, "evaluate")
    facts = store.manifest("evaluate", evaluate.key)["facts"]
    every = [*of(made, "train"), *joins, *of(made, "predict")]
    manifests = [store.manifest(stage.operator, stage.key) for stage in every]
    assert facts["seconds_fitting"] == pytest.approx(sum(m["seconds"] for m in manifests))
    assert facts["forwards"] == sum(m["facts"]["images_forwarded"] for m in manifests)
    assert facts["state_bytes"] == manifests[5]["facts"]["state_bytes"]
    trained = [m["facts"] for m in manifests[:3]]
    assert facts["trainable_parameters"] == max(f["trainable_parameters"] for f in trained)
    assert [task["epochs"] for task in facts["training"]] == [f["epochs"] for f in trained]


L2P = FINETUNE | {"augmentation": "none", "pool_size": 4, "top_n": 2, "prompt_length": 2}


def test_queries_are_the_cached_features_of_the_rows(store: Store, folder: Path) -> None:
    plain = pngs.plan(store, folder)
    made = pngs.plan(store, folder, "features.dtype=float32", methods=[{"l2p": L2P}])
    compute([*of(made, "dataset"), *of(made, "features")], store)
    for stage in of(plain, "train"):
        assert pngs.training_rows(stage, store).query is None
    inputs = given_pixels(made, encoded(folder, "train"))
    with torch.inference_mode():
        frozen = loading.embedder(network(made), "token")(inputs)
    labels = made.data.sources[0].train.labels
    for number, stage in enumerate(of(made, "train")):
        images = pngs.training_rows(stage, store)
        rows = of_tasks(labels, number, number)
        assert images.query is not None and images.query.dtype == torch.float32
        assert torch.allclose(images.query, frozen[rows], rtol=0, atol=1e-5)
        assert images.targets.tolist() == arrived(labels[rows])
        # Every shard that holds rows of the task, and no other.
        held = {f"features train {shard + 1}/5" for shard in rows // 4}
        assert {shard.label for shard in stage.reads["features"]} == held


def test_cached_and_computed_queries_train_alike(store: Store, folder: Path) -> None:
    """The cache saves forward passes; what is learnt is the same up to rounding."""
    made = pngs.plan(store, folder, "features.dtype=float32", methods=[{"l2p": L2P}])
    compute([*of(made, "dataset"), *of(made, "features")], store)

    def asking(stage: Stage, cached: bool, **inputs: tuple[Stage, ...]) -> Stage:
        away = () if cached else ("query", "features")
        return replace(
            stage,
            parameters={k: v for k, v in stage.parameters.items() if k not in away},
            inputs={**stage.inputs, **inputs},
            reads={k: v for k, v in stage.reads.items() if k not in away},
        )

    def chain(cached: bool) -> tuple[list[State], list[predictions.Table], int]:
        states, tables, forwarded = [], [], 0
        model: tuple[Stage, ...] = ()
        for one, other in zip(of(made, "train"), of(made, "predict"), strict=True):
            model = (asking(one, cached, previous=model),)
            answers = asking(other, cached, model=model)
            forwarded += sum(
                done.facts["images_forwarded"] for done in compute([*model, answers], store)
            )
            states.append(load_tensors(state_of(store, model[0])))
            tables.append(predictions.read(store, "predict", answers.key))
        return states, tables, forwarded

    cached, computed = chain(True), chain(False)
    assert cached[2] * 2 == computed[2]
    for one, other in zip(cached[0], computed[0], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    for one, other in zip(cached[1], computed[1], strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("order", [["x", "y"], ["y", "x"]], ids="".join)
def test_a_domain_incremental_chain(order: list[str], store: Store, tmp_path: Path) -> None:
    domains = ("x", "y")
    folder = pngs.data(tmp_path, pngs.rows(1, 0, domains), pngs.rows(1, 5000, domains))
    scenario = {"kind": "domain_incremental", "orders": [order]}
    made = pngs.plan(store, folder, "dataset.domain=domain", scenario=scenario)
    compute(made.stages, store)
    assert len(of(made, "train")) == 2
    for number, stage in enumerate(of(made, "predict")):
        table = predictions.read(store, "predict", stage.key)
        assert len(table["sample"]) == 6 * (number + 1)
        # All classes are of every task: to know the task tells nothing.
        assert np.array_equal(table["predicted"], table["predicted_in_task"])
        test = index_of(store, made, "test")
        places = [domains.index(name) for name in order]
        rows = np.concatenate([np.flatnonzero(test.domains == place) for place in places])
        assert table["true_task"].tolist() == [0] * 6 + [1] * 6 * number
        assert table["label"].tolist() == test.labels[rows][: len(table["label"])].tolist()


def test_an_adapted_method_is_fitted_on_both_features(store: Store, folder: Path) -> None:
    given = [
        {"aper_finetune": FINETUNE},
        {"ranpac": {"projection_dim": 0, "first_session": "finetune", **FINETUNE}},
    ]
    made = pngs.plan(store, folder, "features.dtype=float32", methods=given)
    compute(made.stages, store)
    aper, ranpac = made.runs
    session = aper.own[0]
    learner, _ = loop.open_learner(
        methods.build("first_session", session.parameters["method"]["hyperparameters"]),
        network(made),
        Task(index=0, count=1, current=(0, 1), before=0, seen=2),
        load_tensors(state_of(store, session)),
        Settings(seed=0),
    )
    inputs = given_pixels(made, encoded(folder, "train"))
    frozen = loading.embedder(network(made), "token")
    with torch.inference_mode():
        adapted, plain = learner.eval().features(inputs), frozen(inputs)
    assert not torch.allclose(adapted, plain, atol=1e-3)

    def read(work: Assignment) -> tuple[np.ndarray, np.ndarray]:
        """The features that a fit reads, and the rows that they are of."""
        tasks = from_json(FitParameters, work.parameters).tasks
        given = from_json(FitHints, work.hints).selection
        rows = selection.joined(selection.of(work, store, given, tasks))
        found = selection.matrix(work, store, given, rows)
        assert found is not None
        return found, rows.position

    labels = index_of(store, made, "train").labels
    matrices = [read(run.model.assignment()) for run in (aper, ranpac)]
    # A fit for all orders takes all rows at once, the other one task by task.
    assert matrices[0][1].tolist() == list(range(len(TRAIN)))
    assert matrices[1][1].tolist() == of_tasks(labels, 2).tolist()
    both = torch.cat([plain, adapted], dim=1)
    for (found, rows), seen in zip(matrices, (both, adapted), strict=True):
        assert np.allclose(found, seen[rows], atol=1e-5)
    # SimpleCIL's prototypes are the classes' mean rows.
    state = load_tensors(store.read("fit", aper.model.key, "state.safetensors"))
    means = np.stack([matrices[0][0][labels == label].mean(axis=0) for label in range(6)])
    assert np.allclose(state["0/prototypes"].numpy(), means, rtol=0, atol=1e-5)
    facts = store.manifest("evaluate", aper.evaluate.key)["facts"]
    trained, fitted = (store.manifest(s.operator, s.key) for s in aper.own)
    assert facts["state_bytes"] == sum(m["facts"]["state_bytes"] for m in (trained, fitted))
    assert facts["trainable_parameters"] == trained["facts"]["trainable_parameters"] > 0
    assert facts["training"][0]["epochs"] == trained["facts"]["epochs"]
    assert len(facts["fit"]) == len(fitted["facts"]["tasks"])


def test_a_table_of_predictions_that_is_none_is_damage(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    stage = replace(of(made, "predict")[0], parameters={"another": 1})
    store.commit(stage.assignment(), Result(files={"predictions.parquet": b"PAR1"}), 0.0)
    with pytest.raises(DamagedStage, match=r"predictions\.parquet: "):
        predictions.read(store, "predict", stage.key)
