"""Online streams: one pass in sections, steps on each batch, the mask, and what is measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graftwork.methods.baselines.finetune import Finetune
from graftwork.methods.contracts.trained import Task, trains
from graftwork.methods.parts.heads import cross_entropy, current_cross_entropy
from graftwork.operators.errors import ConfigError
from graftwork.operators.formats import features, predictions
from graftwork.operators.parameters.training import SinglePass
from graftwork.operators.store import Store
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Settings
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.planning.runs import Run
from tests import pngs, tiny
from tests import test_conformance as conformance

# The mask of a batch.


def test_the_mask_leaves_the_classes_of_the_batch() -> None:
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([3, 0, 3, 3, 0, 3])
    task = Task(index=0, current=(0, 1, 2, 3), before=0, seen=5, mask="batch")
    masked = scores.detach().clone()
    masked[:, [1, 2, 4]] = -torch.inf
    for found in (
        cross_entropy(scores, targets, task),
        current_cross_entropy(scores, targets, task),
    ):
        torch.testing.assert_close(found, F.cross_entropy(masked, targets))
    [gradient] = torch.autograd.grad(cross_entropy(scores, targets, task), [scores])
    assert bool((gradient[:, [1, 2, 4]] == 0).all()) and bool((gradient[:, [0, 3]] != 0).all())


# The branches of a fused method learn weights of classes instead.
ONLINE = [
    case
    for case in conformance.CASES
    if not case.method.card.upper_bound and not case.name.startswith("promptfusion")
]


@pytest.mark.parametrize("case", ONLINE, ids=lambda case: case.label)
def test_every_method_knows_the_mask(case: conformance.Case) -> None:
    """On a batch of one class there is nothing to choose from: the mask takes a loss away."""
    [*_, task] = conformance.stream(case)
    pixels = conformance.images(task)
    rows = (pixels.targets == task.current[0]).nonzero()[:, 0].tolist()

    def loss(mask: Any) -> float:
        learner, _ = loop.open_learner(
            trains(case.method),
            conformance.network(case),
            dataclasses.replace(task, mask=mask),
            None,
            Settings(seed=0),
        )
        learner.reference = conformance.reference(case)
        learner.begin()
        torch.manual_seed(0)
        inputs = pixels.normalise(pixels.batch(rows, 0, "none"))
        query = forward.query_of(learner, pixels.query, rows, inputs)
        with torch.no_grad():
            terms = learner.train()(inputs, pixels.targets[rows], query)
        return float(terms["loss"])

    assert loss("batch") < loss("method")


# One pass.


def test_a_single_pass_takes_each_batch_so_many_times() -> None:
    """Three batches of five, five and two, each three times, with an augmentation of its own."""
    task, seen = tiny.task(0), []

    class Images(tiny.TensorImages):
        def batch(self, rows: Any, epoch: int, augmentation: str) -> torch.Tensor:
            seen.append((tuple(rows), epoch))
            return super().batch(rows, epoch, augmentation)

    plain = tiny.images(task)
    images = Images(plain.pixels, plain.targets, plain.query)
    method = Finetune(epochs=4, batch_size=3, augmentation="flip")
    _, log = loop.train_task(
        method, tiny.vit(1), task, images, None, Settings(seed=0),
        single=SinglePass(batch_size=5, times=3),
    )  # fmt: skip
    steps = [each for each in seen if len(each[0]) in (5, 2)][:9]
    assert [len(rows) for rows, _ in steps] == [5, 5, 5, 5, 5, 5, 2, 2, 2]
    assert [epoch for _, epoch in steps] == [0, 1, 2] * 3
    assert all(len({rows for rows, _ in steps[n : n + 3]}) == 1 for n in (0, 3, 6))
    assert sorted(row for n in (0, 3, 6) for row in steps[n][0]) == list(range(12))
    assert (log.steps, len(log.epochs)) == (9, 1)


# The pipeline.


def summary_of(store: Store, run: Run) -> dict[str, Any]:
    return json.loads(store.read("evaluate", run.evaluate.key, "summary.json"))


EVERY = 10


def planned(store: Store, folder: Path, *overrides: str, **sections: Any) -> Plan:
    scenario = {
        "kind": "class_incremental",
        "increment": 2,
        "orders": [3],
        "online": {"every": EVERY, "batch_size": 4, "times": 2, "mask": "batch"},
    }
    methods = ["simplecil", "slda", {"finetune": {"augmentation": "none"}}]
    return pngs.plan(
        store, folder, *overrides, **({"scenario": scenario, "methods": methods} | sections)
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store, Path]:
    """Six classes of six training and three test images, three tasks, sections of ten images."""
    folder = pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(6, 0), pngs.rows(3, 5000))
    store = Store(str(tmp_path_factory.mktemp("store")))
    made = planned(store, folder)
    pngs.compute(made.stages, store)
    return made, store, folder


def test_sections_are_the_tasks(ran: tuple[Plan, Store, Path]) -> None:
    made, _, _ = ran
    tasks = made.runs[0].stream.tasks
    assert [task.name for task in tasks] == [f"{n} images" for n in (10, 20, 30, 36)]
    assert [len(task.train) for task in tasks] == [10, 10, 10, 6]
    # Two classes are half through when the next task's begin; all test images come once.
    assert [task.seen for task in tasks] == [2, 4, 6, 6]
    assert [len(task.test) for task in tasks] == [6, 6, 6, 0]
    assert len(pngs.of(made, "train")) == 4


def test_what_is_fitted_is_evaluated_on_prefixes(ran: tuple[Plan, Store, Path]) -> None:
    """Nearest class means of the images so far, computed here from the cached features."""
    made, store, _ = ran
    run = pngs.run_of(made, "simplecil")
    known: dict[bytes, np.ndarray] = {}
    dataset = made.data.sources[0]
    for split in (dataset.train, dataset.test):
        shards = [s for s in pngs.of(made, "features") if f"features {split.name}" in s.label]
        matrix = np.concatenate([features.shard(store, s.operator, s.key) for s in shards])
        known |= {d.tobytes(): row for d, row in zip(split.digests, matrix, strict=True)}
    table = predictions.read(store, "evaluate", run.evaluate.key)
    rows: list[tuple[np.ndarray, int]] = []
    tested: list[tuple[np.ndarray, int]] = []
    for number, task in enumerate(run.stream.tasks):
        for found, part in ((rows, task.train), (tested, task.test)):
            index = part.index
            found += [
                (known[d.tobytes()].astype(np.float64), int(label))
                for d, label in zip(index.digests, index.labels, strict=True)
            ]
        means = np.stack(
            [np.mean([f for f, label in rows if label == c], axis=0) for c in range(task.seen)]
        )
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        wanted = [int(np.argmax(means @ feature)) for feature, _ in tested]
        assert table["predicted"][table["task_trained"] == number].tolist() == wanted


def test_the_area_under_the_curve_is_the_mean_of_the_accuracies(
    ran: tuple[Plan, Store, Path],
) -> None:
    made, store, _ = ran
    for run in made.runs:
        summary = summary_of(store, run)
        table = predictions.read(store, "evaluate", run.evaluate.key)
        accuracies = []
        for number in range(4):
            own = table["task_trained"] == number
            right = table["label"][own] == table["predicted"][own]
            accuracies.append(100 * right.sum() / (6, 12, 18, 18)[number])
        assert summary["a_auc"] == pytest.approx(np.mean(accuracies))
        # The last section shows no new class: it has no test images of its own.
        assert [row[-1] is None for row in summary["matrix"]] == [False] * 3 + [True]


def test_a_longer_stream_goes_on_from_a_shorter_one(ran: tuple[Plan, Store, Path]) -> None:
    """Stopped after two tasks, the stream has its first two sections in common."""
    made, _, folder = ran
    short = planned(Store(str(folder / "none")), folder, "scenario.tasks=2")
    whole = [s.key for s in pngs.of(made, "train")]
    assert [s.key for s in pngs.of(short, "train")][:2] == whole[:2]


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ([{"finetune": {"epochs": 3}}], r"methods\.0\.finetune\.epochs: not read: an online"),
        ([{"l2p": {"batch_size": 3}}], r"methods\.0\.l2p\.batch_size: not read: an online stream"),
        (["lae"], r"methods\.0\.lae: lae trains all of itself from pass 4 on.*freeze_epochs: 0"),
    ],
)
def test_what_a_single_pass_would_not_read_is_refused(
    ran: tuple[Plan, Store, Path], methods: list[Any], problem: str
) -> None:
    _, store, folder = ran
    with pytest.raises(ConfigError, match=problem):
        planned(store, folder, methods=methods)


def test_what_sees_all_tasks_at_once_keeps_its_epochs(ran: tuple[Plan, Store, Path]) -> None:
    _, store, folder = ran
    made = planned(store, folder, methods=[{"joint": {"epochs": 3, "augmentation": "none"}}])
    [training] = pngs.of(made, "train")
    assert "single" not in training.parameters and "mask" not in training.parameters["task"]


# Few shots and long tails, as they are measured.


def test_few_shots_are_measured_by_base_and_novel(tmp_path: Path) -> None:
    folder = pngs.data(tmp_path / "data", pngs.rows(6, 0), pngs.rows(3, 5000))
    store = Store(str(tmp_path / "store"))
    scenario = {"kind": "class_incremental", "initial": 2, "increment": 2, "few_shot": {"shots": 1}}
    made = planned(store, folder, scenario=scenario, methods=["slda"])
    pngs.compute(made.stages, store)
    [run] = made.runs
    assert [len(task.train) for task in run.stream.tasks] == [12, 2, 2]
    summary = summary_of(store, run)
    table = predictions.read(store, "evaluate", run.evaluate.key)
    last = table["task_trained"] == 2
    right = (table["label"] == table["predicted"])[last]
    base = table["label"][last] < 2
    wanted = [100 * right[base].mean(), 100 * right[~base].mean()]
    found = summary["groups"]
    assert [found["base"][-1], found["novel"][-1]] == pytest.approx(wanted)
    assert found["novel"][0] is None and found["harmonic"][0] is None
    product, total = wanted[0] * wanted[1], sum(wanted)
    assert found["harmonic"][-1] == pytest.approx(2 * product / total if product else 0.0)
    assert "a_auc" not in summary


def test_long_tails_are_measured_by_many_medium_and_few(tmp_path: Path) -> None:
    folder = pngs.data(tmp_path / "data", pngs.rows(8, 0), pngs.rows(3, 5000))
    store = Store(str(tmp_path / "store"))
    tail = {"imbalance": 8, "many": 5, "few": 2}
    scenario = {"kind": "class_incremental", "increment": 3, "long_tailed": tail, "orders": [3]}
    made = planned(store, folder, scenario=scenario, methods=["simplecil"])
    pngs.compute(made.stages, store)
    [run] = made.runs
    # 8 * 8 ** (-i / 5), rounded down.
    sizes = [count for task in run.stream.tasks for count in task.train.blocks.values()]
    assert sizes == [8, 5, 3, 2, 1, 1]
    table = predictions.read(store, "evaluate", run.evaluate.key)
    last = table["task_trained"] == 1
    right, label = (table["label"] == table["predicted"])[last], table["label"][last]
    summary = summary_of(store, run)
    for name, classes in {"many": [0], "medium": [1, 2, 3], "few": [4, 5]}.items():
        wanted = 100 * right[np.isin(label, classes)].mean()
        assert summary["groups"][name][-1] == pytest.approx(wanted)
