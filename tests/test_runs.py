"""Planning of methods that train: keys, columns, chains, predictions and adapted features."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from graftwork import methods
from graftwork.cluster.execution.chain_groups import Chains
from graftwork.cluster.execution.executor import chain_leases
from graftwork.cluster.execution.graph import needed
from graftwork.cluster.execution.schedule import Schedule
from graftwork.operators import catalogue
from graftwork.operators.backbones import loading
from graftwork.operators.data.dataset import Split
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import ConfigError, GraftworkError, IncompatibleError
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import StreamTask, class_order, task_sizes
from graftwork.operators.streams.scenario import tasks as tasks_of_scenario
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.expand import make_runs
from graftwork.pipelines.planning.methods import Method, method_of
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.planning.shared import Shared
from tests import pngs
from tests.pngs import of

DOMAINS = ("x", "y")
TRAIN, TEST = pngs.rows(2, 0, DOMAINS), pngs.rows(1, 5000, DOMAINS)
OPERATORS = ("dataset", "features", "train", "join", "predict", "fit", "evaluate")
TRAINED = {"train", "predict", "evaluate"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), TRAIN, TEST)


def stream(store: Store, folder: Path, domains: bool, **sections: Any) -> Plan:
    """The plan of a class-incremental or a domain-incremental stream."""
    if not domains:
        return pngs.plan(store, folder, **sections)
    scenario = {"kind": "domain_incremental"}
    return pngs.plan(store, folder, "dataset.domain=domain", scenario=scenario, **sections)


def keys(made: Plan, operator: str) -> list[str]:
    return [stage.key for stage in of(made, operator)]


def differing(before: Plan, after: Plan) -> set[str]:
    """Operators of which a key is another."""
    return {operator for operator in OPERATORS if keys(before, operator) != keys(after, operator)}


def changed(before: Plan, after: Plan) -> set[str]:
    """Operators of which a key is another, none of which is what it was."""
    found = differing(before, after)
    for operator in found - {"dataset", "features"}:
        assert not set(keys(before, operator)) & set(keys(after, operator)), operator
    return found


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("methods=[{finetune: {epochs: 2, batch_size: 4, lr: 0.5}}]", TRAINED),
        ("methods=[{finetune: {epochs: 3, batch_size: 4}}]", TRAINED),
        ("methods=[{finetune: {epochs: 2, batch_size: 5}}]", TRAINED),
        ("methods=[{finetune: {epochs: 2, batch_size: 4, augmentation: none}}]", TRAINED),
        ("seeds=[1]", TRAINED),
        ("scenario.orders=[7]", TRAINED),
        ("scenario.increment=3", TRAINED),
        ("backbone.precision=bf16", TRAINED),
        ("resources.train.compile=true", TRAINED),
        ("resources.train.gpus=1", TRAINED),
        ("resources.extract.gpus=1", {"predict", "evaluate"}),
        ("backbone.preprocessing.resize=18", TRAINED),
        ("backbone.preprocessing.mean=[0, 0, 0]", TRAINED),
        ("dataset.limit_per_class={train: 3, test: null}", {"dataset"} | TRAINED),
        ("dataset.limit_per_class={train: null, test: 1}", {"dataset", "predict", "evaluate"}),
        # What a trained method does not read.
        ("features.dtype=float32", set()),
        ("features.shard_size=5", set()),
        # What changes no result.
        ("resources.train={workers: 2, cpus: 2, checkpoint_minutes: 0}", set()),
        ("resources.extract={cpus: 2, batch_size: 3}", set()),
        ("resources.fit={cpus: 2}", set()),
        ("dataset.on_bad_image=skip", set()),
        ("dataset.max_pixels=100000", set()),
        ("dataset.classes=[a, b, c, d, e, f]", set()),
        ("pipeline=other", set()),
    ],
)
def test_a_key_changes_with_what_changes_the_result(
    override: str, expected: set[str], store: Store, folder: Path
) -> None:
    assert changed(pngs.plan(store, folder), pngs.plan(store, folder, override)) == expected


def test_other_weights_are_another_training(store: Store, folder: Path, tmp_path: Path) -> None:
    before = pngs.plan(store, folder)
    weights = dict(loading.load(pngs.MODEL, "random", "token").state_dict())
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    assert changed(before, pngs.plan(store, folder, f"backbone.weights={path}")) == set()
    weights["norm.bias"] = weights["norm.bias"] + 1e-6
    save_file(weights, path)
    assert changed(before, pngs.plan(store, folder, f"backbone.weights={path}")) == TRAINED


def test_places_are_in_no_key(store: Store, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    before, after = pngs.plan(store, folder), pngs.plan(store, moved)
    assert changed(before, after) == set()
    assert str(moved) in str(of(after, "train")[0].hints["places"])


def with_image(rows: Sequence[pngs.Row], number: int) -> list[pngs.Row]:
    """The rows with another image of the same class at one place."""
    _, label, domain = rows[number]
    return [*rows[:number], (pngs.png(99_000, label=label), label, domain), *rows[number + 1 :]]


METHODS: dict[str, Any] = {"methods": ["simplecil", {"finetune": {"epochs": 1}}]}


def shards(made: Plan, split: str) -> list[Stage]:
    """The shards of the frozen backbone's features that a plan reads."""
    return [s for s in of(made, "features") if s.label.startswith(f"features {split} ")]


def kept(before: Plan, after: Plan, operator: str) -> list[bool]:
    """Of each stage of an operator, whether its key is what it was."""
    pairs = zip(keys(before, operator), keys(after, operator), strict=True)
    return [one == two for one, two in pairs]


@pytest.mark.parametrize(("number", "task"), [(9, 0), (15, 1), (4, 2)])
def test_a_training_image_changes_its_shard_and_what_is_trained_from_its_task_on(
    number: int, task: int, store: Store, folder: Path, tmp_path: Path
) -> None:
    assert class_order(6, 1993).index(TRAIN[number][1]) // 2 == task
    before = pngs.plan(store, folder, **METHODS)
    other = pngs.data(tmp_path, with_image(TRAIN, number), TEST)
    after = pngs.plan(store, other, **METHODS)
    assert differing(before, after) == set(OPERATORS) - {"join"}
    train, test = (made.data.sources[0] for made in (before, after))
    assert train.test.stage().key == test.test.stage().key
    assert train.train.stage().key != test.train.stage().key
    for split, expected in (("train", [number // 4]), ("test", [])):
        pairs = zip(shards(before, split), shards(after, split), strict=True)
        assert [n for n, (one, two) in enumerate(pairs) if one.key != two.key] == expected
    # A key knows the tasks before it, through what was trained on them, and no later one.
    earlier = [place < task for place in range(3)]
    assert kept(before, after, "train") == kept(before, after, "predict") == earlier
    assert kept(before, after, "fit") == [False]
    assert kept(before, after, "evaluate") == [False, False]


@pytest.mark.parametrize(("number", "task"), [(5, 0), (7, 1), (2, 2)])
def test_a_test_image_changes_predictions_from_its_task_on_and_no_training(
    number: int, task: int, store: Store, folder: Path, tmp_path: Path
) -> None:
    assert class_order(6, 1993).index(TEST[number][1]) // 2 == task
    before = pngs.plan(store, folder, **METHODS)
    after = pngs.plan(store, pngs.data(tmp_path, TRAIN, with_image(TEST, number)), **METHODS)
    assert differing(before, after) == {"dataset", "features", "predict", "evaluate"}
    assert shards(before, "train") == shards(after, "train")
    assert kept(before, after, "predict") == [place < task for place in range(3)]
    assert kept(before, after, "evaluate") == [False, False]


def test_images_that_no_task_reads_are_in_no_key(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    """Of a stream that ends after two tasks: data of the classes that it never reaches."""
    unread = class_order(6, 1993)[4]
    given = {
        name: next(n for n, row in enumerate(rows) if row[1] == unread)
        for name, rows in (("train", TRAIN), ("test", TEST))
    }
    other = pngs.data(tmp_path, with_image(TRAIN, given["train"]), with_image(TEST, given["test"]))
    sections = {"methods": [{"finetune": {"epochs": 1}}, "slda", "simplecil"]}
    before, after = (
        pngs.plan(store, place, "scenario.tasks=2", **sections) for place in (folder, other)
    )
    # SimpleCIL is fitted once on all classes: that fit is another, and its evaluation.
    assert differing(before, after) == {"dataset", "features", "fit", "evaluate"}
    assert kept(before, after, "fit") == [True, False]
    assert kept(before, after, "evaluate") == [True, True, False]


def test_runs_that_begin_alike_share_the_beginning(store: Store, folder: Path) -> None:
    orders = [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 2, 3], [1, 0, 2, 3, 4, 5]]
    made = pngs.plan(
        store, folder,
        scenario={"kind": "class_incremental", "increment": 2, "orders": orders},
    )  # fmt: skip
    chains = [[s.key for s in run.own if s.operator == "train"] for run in made.runs]
    predicted = [[s.key for s in run.own if s.operator == "predict"] for run in made.runs]
    for parts in (chains, predicted):
        assert parts[0][0] == parts[1][0]
        assert len({key for part in parts for key in part}) == 8
    # Columns stand in the order learned: the same classes in another order are another training.
    assert chains[0][0] != chains[2][0]


# --- columns ----------------------------------------------------------------------------------


def tasks_of(made: Plan) -> list[dict[str, Any]]:
    return [stage.parameters["task"] for stage in of(made, "train")]


def asked(made: Plan) -> tuple[StreamTask, ...]:
    """The tasks that a spec with one class order asks for, in the data set's numbers."""
    given, dataset = made.spec.scenario, made.data.sources[0]
    assert given is not None and given.kind is not None
    classes, step = dataset.classes, given.increment
    sizes = None if step is None else task_sizes(len(classes), given.initial, step)
    return tasks_of_scenario(given.kind, classes, dataset.domains, sizes, given.orders[0])


def rows_of(split: Split, task: StreamTask) -> np.ndarray:
    return np.flatnonzero(
        np.isin(split.labels, task.classes) & np.isin(split.domains, task.domains)
    )


def named(split: Split, rows: np.ndarray, classes: list[int], domains: list[int]) -> str:
    """The digest of some rows under the numbers by arrival."""
    index = SplitIndex(
        digests=split.digests[rows],
        labels=np.array([classes.index(c) for c in split.labels[rows].tolist()], np.int32),
        domains=np.array([domains.index(d) for d in split.domains[rows].tolist()], np.int32),
    )
    return index.digest


def check_columns(made: Plan) -> None:
    """What a stage says of columns and rows agrees with the data, whatever the stream is."""
    tasks, train = asked(made), made.data.sources[0].train
    learned: list[int] = []
    domains: list[int] = []
    for number, (stage, task) in enumerate(zip(of(made, "train"), tasks, strict=True)):
        before = len(learned)
        learned += [c for c in task.classes if c not in learned]
        domains += [d for d in task.domains if d not in domains]
        current = sorted(learned.index(c) for c in task.classes)
        assert stage.parameters["images"] == {
            "rows": named(train, rows_of(train, task), learned, domains), "classes": current,
        }  # fmt: skip
        assert stage.parameters["task"] == {
            "index": number,
            "current": current,
            "before": before,
            "seen": len(learned),
        }
        assert [s.key for s in stage.inputs["previous"]] == [
            s.key for s in of(made, "train")[max(0, number - 1) : number]
        ]


def test_columns_of_a_class_incremental_stream(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder)
    check_columns(made)
    assert [task["current"] for task in tasks_of(made)] == [[0, 1], [2, 3], [4, 5]]
    assert [(task["before"], task["seen"]) for task in tasks_of(made)] == [(0, 2), (2, 4), (4, 6)]
    assert made.runs[0].stream.ids == class_order(6, 1993)


def test_columns_with_an_initial_task_and_a_rest(store: Store, folder: Path) -> None:
    sizes, order = {"initial": 3, "increment": 2}, [5, 0, 3, 1, 4, 2]
    scenario = {"kind": "class_incremental", **sizes, "orders": [order]}
    made = pngs.plan(store, folder, scenario=scenario)
    check_columns(made)
    assert [task["current"] for task in tasks_of(made)] == [[0, 1, 2], [3, 4], [5]]
    assert of(made, "train")[1].parameters["images"]["classes"] == [3, 4]
    assert made.runs[0].stream.ids == tuple(order)


def test_columns_of_a_domain_incremental_stream(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder, "dataset.domain=domain",
                     scenario={"kind": "domain_incremental", "orders": [["y", "x"]]})  # fmt: skip
    check_columns(made)
    assert [(task["before"], task["seen"]) for task in tasks_of(made)] == [(0, 6), (6, 6)]
    tasks = made.runs[0].stream.tasks
    assert [task.name for task in tasks] == ["y", "x"]
    assert [set(task.train.index.domains.tolist()) for task in tasks] == [{0}, {1}]


def test_classes_without_images_in_a_domain_are_not_current(store: Store, tmp_path: Path) -> None:
    """The contract of trained methods: every current class has training images now."""
    some = [row for row in TRAIN if row[1:] not in ((4, "x"), (0, "y"), (1, "y"))]
    made = pngs.plan(
        store, pngs.data(tmp_path, some, TEST), "dataset.domain=domain",
        scenario={"kind": "domain_incremental"},
    )  # fmt: skip
    tasks, stream = tasks_of(made), made.runs[0].stream
    # Class 4 comes with the second domain, and has the last number.
    assert stream.ids == (0, 1, 2, 3, 5, 4)
    assert [task["current"] for task in tasks] == [[0, 1, 2, 3, 4], [2, 3, 4, 5]]
    assert [(task["before"], task["seen"]) for task in tasks] == [(0, 5), (5, 6)]
    labels, domains = made.data.sources[0].train.labels, made.data.sources[0].train.domains
    for number, (task, stage) in enumerate(zip(tasks, of(made, "train"), strict=True)):
        present = sorted(stream.ids.index(c) for c in set(labels[domains == number].tolist()))
        assert present == task["current"] == stage.parameters["images"]["classes"]
    # Nobody can know it before: its image of the first domain is asked for after the second.
    tested = [
        [label for label in task.test.index.labels.tolist() if label == 5] for task in stream.tasks
    ]
    assert tested == [[], [5, 5]]


@pytest.mark.parametrize("domains", [False, True])
def test_a_stage_is_given_the_images_of_its_task(domains: bool, store: Store, folder: Path) -> None:
    made = stream(store, folder, domains)
    for operator, rows in (("train", TRAIN), ("predict", TEST)):
        seen: set[int] = set()
        for stage, task in zip(of(made, operator), asked(made), strict=True):
            own = {
                row
                for row, (_, label, domain) in enumerate(rows)
                if label in task.classes and (not domains or DOMAINS.index(domain) in task.domains)
            }
            seen = own if operator == "train" else seen | own
            places = stage.hints["places"]["runs"]
            found = [row for _, start, stop in places for row in range(start, stop)]
            assert found == sorted(seen)
            assert stage.hints["images"] == len(seen) * (2 if operator == "train" else 1)


# --- chains and predictions -------------------------------------------------------------------


def test_every_run_is_a_chain_of_its_own(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder, "seeds=[0, 1]", "scenario.orders=[1, 2]")
    assert len(made.runs) == 4
    names = [{s.chain for s in run.own if s.operator == "train"} for run in made.runs]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 4
    assert not any(s.chain for s in made.stages if s.operator != "train")
    for run in made.runs:
        assert [s.operator for s in run.own] == ["train"] * 3 + ["predict"] * 3
        assert run.model == run.own[2]
        assert run.evaluate.inputs["model"] == run.own[:3]
        assert run.evaluate.inputs["predictions"] == run.own[3:]


def test_resources_are_those_of_the_group(store: Store, folder: Path) -> None:
    made = pngs.plan(
        store, folder, "resources.train={workers: 3, cpus: 2, gpus: 1, checkpoint_minutes: 7}",
        "resources.extract={cpus: 4}",
    )  # fmt: skip
    for stage in of(made, "train"):
        assert (stage.resources.workers, stage.resources.cpus, stage.resources.gpus) == (3, 2, 1)
        assert stage.hints["checkpoint_minutes"] == 7
        assert stage.parameters["numerics"]["device"] == "cuda"
    for stage in of(made, "predict"):
        assert (stage.resources.workers, stage.resources.cpus, stage.resources.gpus) == (1, 4, 0)
        assert stage.parameters["numerics"]["device"] == "cpu"


def test_predictions_after_a_task_read_its_model(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder)
    for number, (stage, model) in enumerate(
        zip(of(made, "predict"), of(made, "train"), strict=True)
    ):
        assert stage.inputs == {"model": (model,)}
        assert stage.reads == {"dataset": (made.data.sources[0].test.stage(),)}
        assert stage.parameters["after"] == [number]
        tasks, test = asked(made)[: number + 1], made.data.sources[0].test
        assert stage.parameters["tasks"] == [
            {
                "rows": named(test, rows_of(test, task), list(class_order(6, 1993)), [0]),
                "classes": [2 * place, 2 * place + 1],
                "seen": 2 * place + 2,
            }
            for place, task in enumerate(tasks)
        ]
        assert stage.parameters["vote_batch"] is None
        for name in ("method", "seed", "task", "backbone", "preprocessing"):
            assert stage.parameters[name] == model.parameters[name]


@pytest.mark.parametrize("domains", [False, True])
def test_joint_trains_once_and_predicts_all(domains: bool, store: Store, folder: Path) -> None:
    made = stream(store, folder, domains, methods=[{"joint": {"epochs": 2}}])
    [train], [predict], [run] = of(made, "train"), of(made, "predict"), made.runs
    count = len(run.stream.tasks)
    assert train.parameters["task"] == {
        "index": 0, "current": list(range(6)), "before": 0, "seen": 6,
    }  # fmt: skip
    order = list(range(6)) if domains else list(class_order(6, 1993))
    assert run.stream.ids == tuple(order)
    every = np.arange(len(TRAIN))
    assert train.parameters["images"] == {
        "rows": named(made.data.sources[0].train, every, order, [0, 1]), "classes": list(range(6)),
    }  # fmt: skip
    assert train.hints["images"] == 2 * len(TRAIN)
    assert predict.parameters["after"] == list(range(count))
    assert len(predict.parameters["tasks"]) == count
    assert predict.hints["images"] == len(TEST)
    assert predict.hints["places"]["runs"] == [[0, 0, len(TEST)]]


# --- tasks side by side -----------------------------------------------------------------------

ALONE: dict[str, Any] = {"methods": [{"magmax_independent": {"epochs": 2, "batch_size": 4}}]}
SHARING: dict[str, Any] = {"methods": [{"esn": {"epochs": 2, "batch_size": 4, "prompt_length": 2}}]}


@pytest.mark.parametrize("given", [ALONE, SHARING], ids=["alone", "sharing"])
def test_experts_are_joined_one_after_the_other(
    given: dict[str, Any], store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder, **given)
    [run] = made.runs
    trains, joins, predicts = (of(made, name) for name in ("train", "join", "predict"))
    assert run.own == (*trains, *joins, *predicts)
    assert run.model == joins[2]
    assert run.evaluate.inputs["model"] == tuple(joins)
    assert run.evaluate.inputs["experts"] == tuple(trains)
    assert len({stage.chain for stage in trains}) == 3
    assert not any(stage.chain for stage in [*joins, *predicts])
    shared = given is SHARING
    for number, (expert, join, predict) in enumerate(zip(trains, joins, predicts, strict=True)):
        assert "previous" not in expert.inputs
        assert expert.inputs.get("first", ()) == ((joins[0],) if shared and number else ())
        assert join.inputs["expert"] == (expert,)
        assert join.inputs["previous"] == tuple(joins[max(0, number - 1) : number])
        assert predict.inputs["model"] == (join,)
        for name in ("method", "seed", "task", "images", "backbone", "preprocessing"):
            assert join.parameters[name] == expert.parameters[name]
        assert join.hints["places"] == expert.hints["places"]


def taken(schedule: Schedule) -> list[Stage]:
    """All stages that may start now."""
    return list(iter(lambda: schedule.take(0.0), None))


def finish(schedule: Schedule, chains: Chains[int], stages: Sequence[Stage]) -> None:
    for stage in stages:
        schedule.finish(stage.key)
        chains.finished(stage.key)


@pytest.mark.parametrize(
    ("cpus", "running"), [(3, [["1"], ["2"], ["3"]]), (2, [["1"], ["2"]]), (1, [["1"]])]
)
def test_experts_are_ready_at_once_and_run_as_many_as_there_is_room_for(
    cpus: int, running: list[list[str]], store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder, **ALONE)
    plan = needed(made.targets, lambda stage: False)
    groups: list[list[str]] = []

    def start(stages: list[Stage]) -> int:
        groups.append([stage.label.partition(" task ")[2][0] for stage in stages])
        return len(groups) - 1

    schedule, chains = Schedule(plan), Chains(plan, cpus, 0, start)
    datasets = taken(schedule)
    assert {stage.operator for stage in datasets} == {"dataset"}
    finish(schedule, chains, datasets)
    experts = taken(schedule)
    assert experts == of(made, "train")
    for stage in experts:
        chains.submit(stage)
    assert groups == running
    # The last one to start is the first to end: its predictions wait for the joins before.
    schedule.finish(experts[2].key)
    assert taken(schedule) == []
    schedule.finish(experts[0].key)
    assert taken(schedule) == of(made, "join")[:1]
    # Each holds a lease of its own, so that a second run may train what is left.
    assert set(chain_leases(plan)) == {stage.key for stage in experts}


def test_experts_that_share_something_wait_for_the_first_task_alone(
    store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder, **SHARING)
    schedule = Schedule(needed(made.targets, lambda stage: False))
    for stage in taken(schedule):
        schedule.finish(stage.key)
    first, *others = of(made, "train")
    assert taken(schedule) == [first]
    schedule.finish(first.key)
    [join] = taken(schedule)
    assert join == of(made, "join")[0]
    schedule.finish(join.key)
    assert [s for s in taken(schedule) if s.operator == "train"] == others


# --- queries ----------------------------------------------------------------------------------


def described(name: str, card: dict[str, Any] | None = None, **given: Any) -> Method:
    facts, problems = catalogue.method(name, given)
    assert not problems
    facts["card"] = facts["card"] | (card or {})
    return method_of(name, name, facts)


def shared_of(made: Plan) -> Shared:
    return Shared(
        spec=made.spec,
        data=made.data,
        backbone=made.backbone,
        preprocessing=made.preprocessing,
    )


def planned(made: Plan, method: Method) -> Run:
    shared = shared_of(made)
    [run] = make_runs(shared, [method], beside=shared)
    return run


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("augmentation", ["none", "lamda"])
def test_query_features_are_read_where_the_card_says_so(
    query: bool, augmentation: str, store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder)
    method = described("finetune", {"query": query}, epochs=3, augmentation=augmentation)
    run = planned(made, method)
    cached = query and augmentation == "none"
    kind, order = to_json(shared_of(made).kind()), class_order(6, 1993)
    for number, stage in enumerate(run.own):
        split = "train" if stage.operator == "train" else "test"
        wanted = query if split == "test" else cached
        assert stage.parameters.get("query") == (kind if wanted else None)
        # Shards of four rows: one of each class to train on, and one of two classes to test.
        place = number % 3
        numbers = {
            "train": sorted(order[2 * place : 2 * place + 2]),
            "test": sorted({label // 2 for label in order[: 2 * place + 2]}),
        }[split]
        every = shared_of(made).features(getattr(made.data.sources[0], split))
        found = stage.reads.get("features", ())
        assert found == (tuple(every[n] for n in numbers) if wanted else ())
        starts = [(0, 4 * n) for n in numbers] if wanted else []
        assert stage.hints["selection"]["shards"] == [list(start) for start in starts]
        if split == "train":
            # Of augmented images the query has to be computed: every image twice.
            passes = 3 * (2 if query and not cached else 1)
            assert stage.hints["images"] == 8 * passes


def test_a_trained_method_need_not_have_the_well_known_fields(store: Store, folder: Path) -> None:
    method = replace(described("finetune"), hyperparameters={"lr": 0.1})
    run = planned(pngs.plan(store, folder), method)
    plain = AUGMENTATIONS["none"].to_json()
    for stage in run.own:
        if stage.operator == "train":
            assert stage.hints["images"] == 8
            assert stage.parameters["augmentation"] == plain
            assert "memory" not in stage.parameters
        else:
            assert stage.parameters["vote_batch"] is None


def test_queries_of_another_precision_are_another_training(store: Store, folder: Path) -> None:
    method = described("finetune", {"query": True}, augmentation="none")
    one, two = (
        planned(pngs.plan(store, folder, *overrides), method)
        for overrides in ((), ("features.dtype=float32",))
    )
    assert not {s.key for s in one.own} & {s.key for s in two.own}


@pytest.mark.parametrize("name", [name for name in methods.METHODS])
def test_the_card_of_every_registered_method_is_followed(
    name: str, store: Store, folder: Path
) -> None:
    made = pngs.plan(store, folder)
    method = described(name)
    run = planned(made, method)
    operators = {stage.operator for stage in run.own}
    expected = {
        "fitted": {"fit"},
        "trained": {"train", "predict"},
        "adapted": {"fit", "train"} if method.trains else {"fit"},
        "fused": {"train", "predict", "score", "blend"},
    }
    joins = {"join"} if method.facts.independent else set()
    assert operators == expected[method.facts.contract] | joins
    if method.facts.contract == "trained":
        predicts = [stage for stage in run.own if stage.operator == "predict"]
        assert all(bool(s.reads.get("features")) == method.facts.query for s in predicts)
        assert all(("query" in s.parameters) == method.facts.query for s in predicts)
        assert len(predicts) == (1 if method.facts.upper_bound else 3)


WALKS = {
    "instance": None,
    "batch_vote": "tasks",
    "batch_vote_pilot": "stream",
    "batch_mean": "stream",
}
"""Values of `eval_selection` -> how the reference cuts its test batches."""


def test_a_vote_is_taken_in_batches_of_the_reference(store: Store, folder: Path) -> None:
    voting = [
        name
        for name in methods.METHODS
        if any(field.name == "eval_selection" for field in methods.fields(name))
    ]
    assert voting
    made = pngs.plan(store, folder)
    for name in voting:
        [kind] = [field.type for field in methods.fields(name) if field.name == "eval_selection"]
        for selection in kind.split(" | "):
            walk = WALKS[selection]
            method = described(name, eval_selection=selection, batch_size=7)
            assert method.facts.batch_information_at_test is (walk is not None)
            run = planned(made, method)
            found = {batches_of(s) for s in run.own if s.operator == "predict"}
            assert found == {(None, None) if walk is None else (7, walk)}


@pytest.mark.parametrize(("name", "size"), [("dualprompt", 7), ("hide_prompt", 24)])
def test_scrambled_prefixes_are_tested_in_batches_of_the_reference(
    store: Store, folder: Path, name: str, size: int
) -> None:
    made = pngs.plan(store, folder)
    for layout, wanted in (("correct", (None, None)), ("scrambled", (size, "tasks"))):
        method = described(name, kv_layout=layout, batch_size=7)
        assert method.facts.batch_information_at_test is (layout == "scrambled")
        run = planned(made, method)
        assert {batches_of(s) for s in run.own if s.operator == "predict"} == {wanted}
        assert (run.served is None) is (layout == "scrambled")


def batches_of(stage: Stage) -> tuple[int | None, str | None]:
    """Size of the batches that a prediction decides by, and how they are cut."""
    return stage.parameters["vote_batch"], stage.parameters.get("walk")


# --- adapted methods --------------------------------------------------------------------------

SESSION = {"epochs": 1, "batch_size": 4, "lr": 0.02, "augmentation": "flip"}


def session_of(run: Run) -> Stage:
    [stage] = [stage for stage in run.own if stage.operator == "train"]
    return stage


@pytest.fixture(scope="module")
def adapted(store: Store, folder: Path) -> tuple[Plan, Run, Run, Run]:
    """APER, RanPAC with the same first session, and RanPAC without one."""
    made = pngs.plan(
        store, folder,
        methods=[
            {"aper_finetune": SESSION},
            {"ranpac": {"first_session": "finetune", "projection_dim": 8, **SESSION}},
            {"ranpac": {"projection_dim": 8}},
        ],
    )  # fmt: skip
    aper, ranpac, plain = made.runs
    return made, aper, ranpac, plain


def test_aper_reads_frozen_and_adapted_features(adapted: tuple[Plan, Run, Run, Run]) -> None:
    made, run, _, _ = adapted
    for stage, split in ((run.model, "train"), (run.evaluate, "test")):
        assert stage.reads["features"] == tuple(shards(made, split))
        found = stage.reads["adapted"]
        assert len(found) == len(shards(made, split)) == {"train": 6, "test": 3}[split]
        for shard, frozen in zip(found, shards(made, split), strict=True):
            assert shard.inputs["graft"] == (session_of(run),)
            assert shard.label == f"adapted {frozen.label}"
            same = {k: v for k, v in shard.parameters.items() if k != "graft"}
            assert same == frozen.parameters
            assert shard.hints["places"] == frozen.hints["places"]
    assert run.evaluate.inputs["first_session"] == (session_of(run),)
    assert run.model.parameters["method"]["name"] == "simplecil"
    # In the key the features are what they depend on, and the session that made the second kind.
    kind = to_json(shared_of(made).kind())
    first, second = run.model.parameters["features"]
    assert first == kind and {k: v for k, v in second.items() if k != "graft"} == kind
    graft = second["graft"]
    assert {name: session_of(run).parameters[name] for name in graft} == graft
    assert set(graft) == {"method", "task", "seed"}
    assert run.model.inputs == {"graft": (session_of(run),)}


def test_ranpac_reads_adapted_features_alone(adapted: tuple[Plan, Run, Run, Run]) -> None:
    made, _, run, plain = adapted
    assert "features" not in run.model.reads and "features" not in run.evaluate.reads
    assert ["graft" in kind for kind in run.model.parameters["features"]] == [True]
    assert run.model.parameters["method"]["name"] == "ranpac"
    assert plain.model.reads["features"] == tuple(shards(made, "train"))
    assert "adapted" not in plain.model.reads and plain.model.inputs == {}
    assert plain.model.parameters["features"] == [to_json(shared_of(made).kind())]
    assert plain.own == (plain.model,)
    assert plain.evaluate.inputs["first_session"] == ()


def test_methods_share_a_first_session_and_what_it_sees(
    adapted: tuple[Plan, Run, Run, Run],
) -> None:
    made, aper, ranpac, _ = adapted
    assert session_of(aper).key == session_of(ranpac).key
    assert len(of(made, "train")) == 1
    for one, two in ((aper.model, ranpac.model), (aper.evaluate, ranpac.evaluate)):
        assert one.reads["adapted"] == two.reads["adapted"]
    # Each image goes through each of two networks once.
    graft = [s for s in of(made, "features") if "graft" in s.parameters]
    assert sum(made.images(s) for s in graft) == len(TRAIN) + len(TEST)
    assert len(of(made, "features")) == 2 * len(graft)


def test_a_first_session_is_one_task_of_the_first_classes(
    adapted: tuple[Plan, Run, Run, Run],
) -> None:
    made, aper, _, _ = adapted
    stage, classes = session_of(aper), class_order(6, 1993)[:2]
    assert stage.parameters["method"]["name"] == "first_session"
    rows = np.flatnonzero(np.isin(made.data.sources[0].train.labels, classes))
    assert stage.parameters["images"] == {
        "rows": named(made.data.sources[0].train, rows, list(classes), [0]), "classes": [0, 1],
    }  # fmt: skip
    assert stage.parameters["task"] == {
        "index": 0, "current": [0, 1], "before": 0, "seen": 2,
    }  # fmt: skip
    assert stage.inputs["previous"] == ()
    assert stage.reads == {"dataset": (made.data.sources[0].train.stage(),)}


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("scenario.orders=[7]", set()),
        ("seeds=[1]", set()),
        ("methods.0.aper_finetune.lr=0.5", set()),
        ("methods.0.aper_finetune.epochs=2", set()),
        ("methods.0.aper_finetune.augmentation=lamda", set()),
        ("scenario={kind: class_incremental, initial: 2, increment: 3, orders: [1993]}",
         {"train", "adapted", "fit"}),
        ("features.dtype=float32", {"train"}),
        # Fit and evaluation name the kind of features; how these are cut is no matter of theirs.
        ("features.shard_size=7", {"train", "fit", "evaluate"}),
        ("resources.train={workers: 2, cpus: 2}", {"train", "adapted", "fit", "evaluate"}),
        ("resources.fit.cpus=2", {"train", "adapted", "fit", "evaluate"}),
    ],
)  # fmt: skip
def test_a_first_session_stays_while_the_first_task_does(
    override: str, kept: set[str], store: Store, folder: Path
) -> None:
    def parts(*overrides: str) -> dict[str, set[str]]:
        made = pngs.plan(store, folder, *overrides, methods=[{"aper_finetune": SESSION}])
        graft = {s.key for s in of(made, "features") if "graft" in s.parameters}
        names = ("train", "fit", "evaluate")
        return {"adapted": graft, **{name: set(keys(made, name)) for name in names}}

    before, after = parts(), parts(override)
    assert {name for name in before if before[name] == after[name]} == kept
    assert all(not before[name] & after[name] for name in before if name not in kept)


# --- what is refused --------------------------------------------------------------------------


def refused(store: Store, folder: Path, *overrides: str, **sections: Any) -> GraftworkError:
    with pytest.raises((ConfigError, IncompatibleError)) as caught:
        pngs.plan(store, folder, *overrides, **sections)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


NO_CROP = "backbone.preprocessing={mean: [0, 0, 0], std: [1, 1, 1]}"


@pytest.mark.parametrize("name", ["finetune", "aper_finetune"])
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("backbone.precision=fp16", "backbone.precision: {} trains in fp32 or bf16, got fp16"),
        (
            "features.pooling=avg",
            "features.pooling: {} reads the backbone's own pooling, token, got avg",
        ),
        (
            NO_CROP,
            "backbone.preprocessing: augmentation lamda of {} needs a crop size; "
            "set preprocessing.crop",
        ),
    ],
)
def test_what_a_method_that_trains_cannot_have_is_one_line(
    name: str, override: str, says: str, store: Store, folder: Path
) -> None:
    error = refused(store, folder, override, methods=["simplecil", name])
    assert isinstance(error, ConfigError)
    assert str(error).endswith(says.format(name))
    # Without training it is fine.
    assert pngs.plan(store, folder, override, methods=["simplecil"]).runs


def test_no_crop_is_needed_without_augmentation(store: Store, folder: Path) -> None:
    plain = [{"finetune": {"augmentation": "none"}}]
    assert pngs.plan(store, folder, NO_CROP, methods=plain).runs
    flips = [{"finetune": {"augmentation": "flip"}}]
    assert "augmentation flip" in str(refused(store, folder, NO_CROP, methods=flips))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("test_resnet", "expected a timm VisionTransformer, got ResNet"),
        ("test_vit_relpos", "expected a timm VisionTransformer, got VisionTransformerRelPos"),
        (pngs.PARALLEL, "expected timm's Block with timm's Attention, got"),
    ],
)
def test_networks_without_standard_blocks_are_refused(
    model: str, what: str, store: Store, folder: Path
) -> None:
    network = {"model": model, "weights": "random"}
    steps: dict[str, Any] = {"features": {"pooling": "avg"}} if model != pngs.PARALLEL else {}
    error = refused(store, folder, backbone=network, methods=["slda", "finetune"], **steps)
    assert isinstance(error, IncompatibleError)
    message = str(error)
    assert f"finetune trains on ViTs with timm's standard blocks, not on {model}: " in message
    assert what in message
    assert pngs.plan(store, folder, backbone=network, methods=["slda"], **steps).runs


def test_a_method_with_a_first_session_only_if_asked_is_only_then_refused(
    store: Store, folder: Path
) -> None:
    half = "backbone.precision=fp16"
    assert pngs.plan(store, folder, half, methods=["ranpac"]).runs
    asked = [{"ranpac": {"first_session": "adapter"}}]
    assert "ranpac trains in fp32 or bf16" in str(refused(store, folder, half, methods=asked))


def test_what_an_augmentation_does_is_in_the_key(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pngs.plan(store, folder)
    other = replace(AUGMENTATIONS["lamda"], flip=0.25)
    monkeypatch.setattr(trained, "AUGMENTATIONS", {**AUGMENTATIONS, "lamda": other})
    assert changed(before, pngs.plan(store, folder)) == TRAINED
