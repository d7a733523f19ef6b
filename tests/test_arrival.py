"""Streams that grow: what earlier tasks are known by, and what comes out, does not change."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from graftwork import methods
from graftwork.methods.contracts.fitted import Rows
from graftwork.operators.formats import features, predictions, states
from graftwork.operators.keys import canonical, digest
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.planning.runs import Run
from tests import pngs
from tests.pngs import compute, of
from tests.test_promptfusion import BESIDE, FUSION
from tests.test_text import BACKBONE, COOP, ZSCL

NAMES = ("bee", "cat", "dog", "eel", "fox", "ant")
"""Names of the labels of `pngs.rows`; the last one sorts first."""
ANT = 5
TRAIN, TEST = 0, 5000
"""Seeds of the images."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "replay", "tests.test_exemplars:Replay")
        yield


def images(labels: Iterable[int], seed: int, domains: Sequence[str] = ("x",)) -> list[pngs.Row]:
    """Two images of each class in each domain, classes in the given order."""
    every = pngs.rows(2, seed, domains)
    return [row for label in labels for row in every if row[1] == label]


def incremental(
    store: Store,
    folder: Path,
    arrival: Sequence[int],
    others: Sequence[int] = (),
    ants: str = "first",
    **sections: Any,
) -> Plan:
    """The plan of tasks of two classes each.

    Args:
        arrival: labels in the order in which they arrive.
        others: labels of the data set that no task has.
        ants: where their images stand among those of the other classes, "first" or "last"; these
            are in the order of the labels.
    """
    rank = -1 if ants == "first" else ANT
    labels = sorted([*arrival, *others], key=lambda label: rank if label == ANT else label)
    names = sorted(NAMES[label] for label in labels)
    order = [names.index(NAMES[label]) for label in [*arrival, *others]]
    pngs.data(folder, images(labels, TRAIN), images(labels, TEST), NAMES)
    scenario = {"kind": "class_incremental", "increment": 2, "orders": [order]}
    if others:
        scenario["tasks"] = (len(arrival) + 1) // 2
    return made(store, folder, scenario=scenario, **sections)


def by_domain(store: Store, folder: Path, domains: Sequence[str], **sections: Any) -> Plan:
    """The plan of a task for each domain, with all classes in each."""
    train, test = (
        # Those of the domain that sorts first stand first.
        sorted(images(range(6), seed, domains), key=lambda row: row[2])
        for seed in (TRAIN, TEST)
    )
    pngs.data(folder, train, test, NAMES)
    scenario = {"kind": "domain_incremental", "orders": [list(domains)]}
    return made(store, folder, "dataset.domain=domain", scenario=scenario, **sections)


def made(store: Store, folder: Path, *overrides: str, **sections: Any) -> Plan:
    # Through JSON: YAML would write an object that occurs twice as one.
    return pngs.plan(store, folder, *overrides, **json.loads(json.dumps(sections)))


EPOCH = {"epochs": 1, "batch_size": 4}
ON_VIT: dict[str, Any] = {
    "methods": [
        "simplecil",
        {"ranpac": {"projection_dim": 8}},
        {"aper_finetune": EPOCH},
        {"finetune": EPOCH},
        {"l2p": {**EPOCH, "augmentation": "none", "pool_size": 4, "top_n": 2, "prompt_length": 2}},
        {"replay": EPOCH},
        {"replay": {**EPOCH, "exemplar_selection": "random", "exemplar_budget": "per_class"}},
        {"joint": EPOCH},
        {"magmax_independent": EPOCH},
        {"esn": {**EPOCH, "prompt_length": 2, "candidates": "fast"}},
    ],
    "merge": [{"ties": {"of": "finetune"}}, {"fisher": {"of": "finetune", "images": 3}}],
    "ensemble": [{"mean_prob": {"of": ["simplecil", "finetune"]}}],
}
ON_CLIP: dict[str, Any] = {
    "backbone": BACKBONE,
    "vit": BESIDE,
    "methods": ["zs_clip", COOP, ZSCL, {"proof": {**EPOCH, "exemplars": 12}}, FUSION],
}
CHAIN = {"train": 2, "predict": 2}
SIDE_BY_SIDE = {**CHAIN, "join": 2}
MERGED = {"merge": 2, "predict": 2}
SAME: Mapping[str, Mapping[str, int]] = {
    "simplecil": {},
    "ranpac": {},
    # The first session, on the first task.
    "aper_finetune": {"train": 1},
    "finetune": CHAIN,
    "l2p": CHAIN,
    "replay": {**CHAIN, "exemplars": -1},
    "replay random": {**CHAIN, "exemplars": -1},
    # Trains on all tasks at once.
    "joint": {},
    "magmax_independent": SIDE_BY_SIDE,
    "esn": SIDE_BY_SIDE,
    "ties": MERGED,
    "fisher": {**MERGED, "statistics": 2},
    "mean_prob": {},
    "zs_clip": {},
    "coop": CHAIN,
    "zscl": CHAIN,
    "proof": {**CHAIN, "exemplars": -1},
    "promptfusion": {"train": 4, "predict": 4, "score": 4, "blend": 2, "exemplars": -1},
}
"""Stages of a run's first two tasks that are the same in a stream that goes on, by operator; -1
stands for exemplars of all classes of all tasks but the last one of the shorter stream."""

RANKED = {"class": 4, "task": 2, "domain": 6}
"""What grows, with its number of classes of all tasks but the last."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plans of a stream of two tasks or more, and of one that goes on after the second task."""
    store = Store(str(tmp_path_factory.mktemp("store")))

    @cache
    def plans(growth: str, network: str) -> tuple[Plan, Plan]:
        one, two = (tmp_path_factory.mktemp(growth) for _ in range(2))
        sections = dict(ON_VIT if network == "vit" else ON_CLIP)
        if network == "clip":
            pngs.data(one / "reference", images([0], 9000), images([0], 9000))
            sections["reference"] = {
                "images": str(one / "reference" / "test.parquet"),
                "texts": ["a river", "snow"],
            }
        if growth == "domain":
            return (
                by_domain(store, one, ["x", "y"], **sections),
                by_domain(store, two, ["x", "y", "a"], **sections),
            )
        arrival = [3, 1, 0, 4, 2] if growth == "class" else [3, 1, 0, 4]
        return (
            incremental(store, one, arrival, **sections),
            incremental(store, two, [*arrival, ANT], **sections),
        )

    return plans


def runs_of(plan: Plan) -> dict[str, Run]:
    """Runs by the beginning of their label: a method that stands twice shows its settings."""
    found: dict[str, Run] = {}
    for run in plan.runs:
        name = run.method.name.partition(" of ")[0]
        found[f"{name} random" if name in found else name] = run
    return found


def stages_of(run: Run) -> list[Stage]:
    """The stages of a run, and of the exemplars that it reads; no indexes and no features."""
    ranks = [rank for stage in run.own for rank in stage.reads.get("exemplars", ())]
    return list({stage.key: stage for stage in (*run.own, *ranks, run.evaluate)}.values())


def known_by(stage: Stage) -> str:
    """What the key of a stage holds, without the number of tasks."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            left = {k: bare(v) for k, v in value.items()}
            if "current" in left:  # what a method may know of a task
                left.pop("count", None)
            return left
        return [bare(each) for each in value] if isinstance(value, list) else value

    inputs = {role: list(map(known_by, stages)) for role, stages in stage.inputs.items()}
    return digest([stage.operator, bare(stage.preimage["parameters"]), inputs])


def number_of(stage: Stage) -> int:
    """The last task that a stage is about."""
    given = stage.parameters
    return given["after"][-1] if "after" in given else given["task"]["index"]


CASES = [
    (growth, network, label)
    for growth in RANKED
    for network, sections in (("vit", ON_VIT), ("clip", ON_CLIP))
    for label in SAME
    if (label in ("zs_clip", "coop", "zscl", "proof", "promptfusion")) == (sections is ON_CLIP)
]


@pytest.mark.parametrize(("growth", "network", "label"), CASES)
def test_stages_of_earlier_tasks_are_the_same(
    growth: str, network: str, label: str, grown: Any
) -> None:
    plans = grown(growth, network)
    shorter, longer = (runs_of(plan)[label] for plan in plans)
    others = {known_by(stage): stage for stage in stages_of(longer)}
    same = [stage for stage in stages_of(shorter) if known_by(stage) in others]
    wanted = {op: RANKED[growth] if n < 0 else n for op, n in SAME[label].items()}
    assert Counter(stage.operator for stage in same) == wanted
    assert all(number_of(stage) < 2 for stage in same if stage.operator != "exemplars")
    for stage in same:
        # A class more in the last task leaves the number of tasks as it is.
        if growth == "class" or stage.operator == "exemplars" or label == "aper_finetune":
            assert stage.key == others[known_by(stage)].key
    # Where a stage is about all tasks, what its key holds of the first ones is the same.
    stages = [(shorter.evaluate, longer.evaluate)]
    if label == "ranpac":
        stages.append((shorter.model, longer.model))
    for stage, other in stages:
        one, two = stage.parameters["tasks"], other.parameters["tasks"]
        assert one[:2] == two[:2] and one != two


@pytest.mark.parametrize("network", ["vit", "clip"])
@pytest.mark.parametrize("growth", ["class", "task"])
def test_no_key_holds_the_digest_of_a_whole_data_set(growth: str, network: str, grown: Any) -> None:
    """In an order in which no number is the data set's own."""
    for plan in grown(growth, network):
        whole = [split.digest for split in (plan.data.sources[0].train, plan.data.sources[0].test)]
        for stage in plan.stages:
            if stage.operator not in ("dataset", "fit"):  # a separable method is fitted on all rows
                text = canonical(stage.preimage)
                assert not any(each in text for each in whole), stage.label


def test_where_images_stand_in_the_data_changes_no_key_but_where_it_is_their_order(
    tmp_path: Path,
) -> None:
    store, arrival = Store(str(tmp_path / "store")), [3, 1, 0, 4, ANT]
    first, last = (
        runs_of(incremental(store, tmp_path / place, arrival, ants=place, **ON_VIT))
        for place in ("first", "last")
    )
    for label in ("ranpac", "finetune", "l2p", "magmax_independent", "esn", "ties", "fisher"):
        one, two = first[label], last[label]
        assert [s.key for s in stages_of(one)] == [s.key for s in stages_of(two)]
    # Images of several tasks are trained on in the order of the data set.
    for label, same in (("replay", 2), ("joint", 0)):
        trained = [
            [stage.key for stage in runs[label].own if stage.operator == "train"]
            for runs in (first, last)
        ]
        assert [one == two for one, two in zip(*trained, strict=True)].count(True) == same


def test_full_shards_of_features_stay_where_images_are_appended(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    given = ["simplecil", {"aper_finetune": EPOCH}]
    shorter, longer = (
        incremental(store, tmp_path / name, arrival, ants="last", methods=given)
        for name, arrival in (("one", [3, 1, 0, 4, 2]), ("two", [3, 1, 0, 4, 2, ANT]))
    )
    # Ten rows of a split, four to a shard; of the frozen backbone and the adapted one.
    one, two = ({stage.key: stage for stage in of(plan, "features")} for plan in (shorter, longer))
    assert (len(one), len(two)) == (12, 12)
    same = Counter(one[key].label.rpartition("/")[0] for key in one.keys() & two.keys())
    groups = [f"{kind}features {split}" for kind in ("", "adapted ") for split in ("train", "test")]
    assert same == {f"{group} {number}": 1 for group in groups for number in (1, 2)}


# --- results ----------------------------------------------------------------------------------


def files_of(store: Store, stage: Stage) -> dict[str, bytes]:
    """All files that are stored of a stage."""
    names = store.manifest(stage.operator, stage.key)["files"]
    return {name: bytes(store.read(stage.operator, stage.key, name)) for name in names}


FITTED = ["slda", "acil", "fecam", "joint_linear"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Store, Plan]]:
    """The same two tasks of a data set of four classes, and of one of six, in stores of their own.

    The two further classes are the one that sorts first and one in the middle, and their images
    stand before and between the others.
    """
    found = []
    sections = {**ON_VIT, "methods": [*ON_VIT["methods"], *FITTED]}
    for arrival, others in (([3, 1, 0, 4], []), ([3, 1, 0, 4], [ANT, 2])):
        folder = tmp_path_factory.mktemp("data")
        store = Store(str(tmp_path_factory.mktemp("store")))
        plan = incremental(store, folder, arrival, others, **sections)
        compute(plan.stages, store)
        found.append((store, plan))
    return found


def test_equal_keys_have_equal_results(both: list[tuple[Store, Plan]]) -> None:
    (one, small), (two, large) = both
    held = {stage.key for stage in large.stages}
    same = [stage for stage in small.stages if stage.key in held]
    for stage in same:
        assert files_of(one, stage) == files_of(two, stage), stage.label
    count = Counter(stage.operator for stage in same)
    # Ranks of the images of the first task, for both selections.
    assert count["exemplars"] == 2 * 2
    for operator in ("train", "join", "predict", "merge", "statistics"):
        assert count[operator] == len(of(small, operator)) == len(of(large, operator)) > 0
    # Three separable methods are fitted on all rows, whether a task has them or not.
    assert (count["fit"], len(of(small, "fit"))) == (4, 7)


def test_predictions_do_not_depend_on_what_no_task_has(both: list[tuple[Store, Plan]]) -> None:
    tables = []
    for store, plan in both:
        assert all(run.stream.classes == ("eel", "cat", "bee", "fox") for run in plan.runs)
        tables.append([predictions.read(store, "evaluate", r.evaluate.key) for r in plan.runs])
    assert [run.stream.ids for _, plan in both for run in plan.runs[:1]] == [
        (2, 1, 0, 3), (4, 2, 1, 5)
    ]  # fmt: skip
    for one, two in zip(*tables, strict=True):
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
        assert one["label"].tolist() == [1, 1, 0, 0] * 2 + [2, 2, 3, 3]
        assert one["true_task"].tolist() == [0] * 8 + [1] * 4
    assert len(tables[0]) == 17


@pytest.mark.parametrize("label", ["simplecil", "fecam"])
def test_one_fit_for_all_orders_predicts_by_the_columns_of_the_order(
    label: str, both: list[tuple[Store, Plan]]
) -> None:
    for (store, plan), ids in zip(both, ([2, 1, 0, 3], [4, 2, 1, 5]), strict=True):
        run, labels = runs_of(plan)[label], plan.data.sources[0].test.labels
        shards = run.evaluate.reads["features"]
        every = np.concatenate([features.shard(store, s.operator, s.key) for s in shards])
        # Task by task, in each one in the order of the data set.
        tasks = [np.flatnonzero(np.isin(labels, ids[n : n + 2])) for n in (0, 2)]
        rows = torch.from_numpy(every[np.concatenate(tasks)].astype(np.float32))
        [state] = states.load_states(store, "fit", run.model.key)
        method: Any = methods.build(label, run.method.hyperparameters)
        scores = method.logits(state, rows, 0)[:, ids]
        chosen = [scores[:4, :2].argmax(dim=1), scores.argmax(dim=1)]
        table = predictions.read(store, "evaluate", run.evaluate.key)
        assert table["predicted"].tolist() == torch.cat(chosen).tolist()
        assert len(set(table["predicted"].tolist())) > 1


def test_sums_of_a_class_are_those_of_the_domains_so_far(tmp_path: Path) -> None:
    """One process keeps the sums of both orders' runs."""
    store = Store(str(tmp_path / "store"))
    train, test = (images(range(6), seed, ["x", "y"]) for seed in (TRAIN, TEST))
    pngs.data(tmp_path, train, test, NAMES)
    scenario = {"kind": "domain_incremental", "orders": [["x", "y"], ["y", "x"]]}
    given: dict[str, Any] = {"scenario": scenario, "methods": ["slda", "simplecil"]}
    plan = made(store, tmp_path, "dataset.domain=domain", **given)
    compute(plan.stages, store)
    split = plan.runs[0].stream.tasks[0].train.parts[0].split
    held = [features.shard(store, "features", s.key) for s in plan.runs[0].model.reads["features"]]
    every = torch.from_numpy(np.concatenate(held).astype(np.float32))
    for run, places in zip(plan.runs, [(0, 1), (1, 0)] * 2, strict=True):
        method: Any = methods.build(run.method.name, run.method.hyperparameters)
        found = states.load_states(store, "fit", run.model.key)
        sums = []
        for number, state in enumerate(found):
            own = np.flatnonzero(split.domains == places[number])
            sums.append(
                method.statistics(
                    Rows(
                        features=every[own],
                        labels=torch.from_numpy(split.labels[own].astype(np.int64)),
                        samples=torch.from_numpy(split.stored().at(own).sample_ids()),
                        num_classes=6,
                    ),
                    0,
                )
            )
            total = sums[0] if number == 0 else method.add(*sums)
            expected = method.solve(total, sums[-1], range(6), 0)
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(state[name], tensor)
        assert len(found) == 2


def test_sums_of_another_run_in_the_process_are_not_those_of_other_names(tmp_path: Path) -> None:
    """The same images with another name for one class: its text is another one."""
    folder = pngs.data(tmp_path / "data", images(range(6), TRAIN), images(range(6), TEST))
    states = {}
    for place, names in (("one", "abcdef"), ("one", "xbcdef"), ("two", "xbcdef")):
        store = Store(str(tmp_path / place))
        given = f"dataset.classes={json.dumps(list(names))}"
        plan = made(store, folder, given, backbone=BACKBONE, methods=["zs_clip"])
        compute(plan.stages, store)
        [fit] = of(plan, "fit")
        states[place, names] = load_tensors(store.read("fit", fit.key, "state.safetensors"))
    texts = {about: state["0/texts"] for about, state in states.items()}
    assert torch.equal(texts["one", "xbcdef"], texts["two", "xbcdef"])
    changed = (texts["one", "abcdef"] != texts["one", "xbcdef"]).any(dim=1)
    assert changed.tolist() == [True] + [False] * 5


def test_a_class_that_is_tested_before_it_is_trained(tmp_path: Path) -> None:
    """Class 4 is trained in the second domain alone, class 1 in the first one alone."""
    store = Store(str(tmp_path / "store"))
    every = images(range(6), TRAIN, ["x", "y"])
    train = [row for row in every if (row[1], row[2]) not in ((4, "x"), (1, "y"))]
    pngs.data(tmp_path, train, images(range(6), TEST, ["x", "y"]))
    scenario = {"kind": "domain_incremental", "orders": [["x", "y"]]}
    given = ["simplecil", {"finetune": EPOCH}, {"joint": EPOCH}, {"replay": EPOCH}]
    plan = made(store, tmp_path, "dataset.domain=domain", scenario=scenario, methods=given)
    compute(plan.stages, store)
    assert plan.runs[0].stream.ids == (0, 1, 2, 3, 5, 4)
    assert plan.runs[0].stream.untested == {}
    shown = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    # Test images stand class by class, in both domains; those of class 4 come with the second task.
    later = [label for label in (0, 1, 2, 3, 5, 5, 4) for _ in range(2)]
    for run in plan.runs:
        table = predictions.read(store, "evaluate", run.evaluate.key)
        assert table["label"].tolist() == [*shown, *shown, *later]
        assert table["true_task"].tolist() == [0] * 10 + [0] * 10 + [1] * 14
        assert table["task_trained"].tolist() == [0] * 10 + [1] * 24
        assert max(table["predicted"][:10]) < 5
        # Both tasks have five classes: what is not of the own one is not decided for.
        first = table["predicted_in_task"][table["true_task"] == 0]
        assert max(first) < 5
    first, second = of(plan, "train")[:2]
    assert first.parameters["images"]["classes"] == [0, 1, 2, 3, 4]
    assert second.parameters["images"]["classes"] == [0, 2, 3, 4, 5]
    short = {**scenario, "tasks": 1}
    plan = made(store, tmp_path, "dataset.domain=domain", scenario=short, methods=["simplecil"])
    assert plan.runs[0].stream.untested == {"4": 2}
    compute(plan.stages, store)
    table = predictions.read(store, "evaluate", plan.runs[0].evaluate.key)
    assert table["label"].tolist() == shown
