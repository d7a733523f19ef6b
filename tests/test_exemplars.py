"""Exemplars: which images of earlier tasks are kept, and that a task trains on these alone."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from graftwork import methods
from graftwork.methods.contracts import exemplars as fields
from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.exemplars import Budget, Selection
from graftwork.methods.contracts.hyperparameters import HyperparameterError, require
from graftwork.methods.contracts.trained import Learner, Recipe, Task
from graftwork.methods.networks.vit import read_out
from graftwork.methods.parts import optim
from graftwork.methods.parts.heads import linear_head
from graftwork.operators.data import exemplars, sources
from graftwork.operators.data.digests import digest_of
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import ConfigError
from graftwork.operators.formats.ranks import load
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.training import snapshots
from graftwork.operators.training.rows import TaskRows
from graftwork.pipelines.planning.plan import Plan
from tests import pngs
from tests.pngs import compute, of

DOMAINS = ("x", "y")
PER_CLASS = 5
TRAIN, TEST = pngs.rows(PER_CLASS, 0), pngs.rows(1, 5000)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A linear classifier on frozen features, with images of earlier tasks.

    Args:
        epochs: passes over the images.
        batch_size: images per step.
        augmentation: of the training images.
        exemplars: images kept.
        exemplar_budget: of all classes together, or of each.
        exemplar_selection: which ones.
    """

    card: ClassVar[Card] = Card(
        title="Replay", paper="", summary="", memory="", exemplars=12, uses_seed=True,
        contract="trained",
    )  # fmt: skip

    epochs: int = 2
    batch_size: int = 4
    augmentation: Augmentation = "none"
    exemplars: int = 12
    exemplar_budget: Budget = "total"
    exemplar_selection: Selection = "herding"

    def __post_init__(self) -> None:
        require(self, fields.rules(self))

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            optimizer=optim.optimizer("sgd", 0.1),
            schedule=optim.schedule("constant"),
        )

    def learner(self, vit: VisionTransformer, task: Task) -> "ReplayLearner":
        return ReplayLearner(vit, task)


class ReplayLearner(Learner):
    def __init__(self, vit: VisionTransformer, task: Task) -> None:
        super().__init__(vit, task)
        self.head = linear_head(vit.num_features, task.seen)

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(images, query).float(), targets)}

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(read_out(self.network, self.network.forward_features(images)))


@pytest.fixture(scope="module", autouse=True)
def registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "replay", "tests.test_exemplars:Replay")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), TRAIN, TEST)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def planned(store: Store, folder: Path, *overrides: str, **given: Any) -> Plan:
    return pngs.plan(store, folder, *overrides, methods=[{"replay": given}])


# --- herding ----------------------------------------------------------------------------------


def test_herding_is_brute_force() -> None:
    features = np.random.default_rng(0).normal(size=(17, 5)).astype(np.float16)
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found: list[int] = []
    while len(found) < len(rows):
        distance = {
            row: np.linalg.norm(rows.mean(0) - rows[[*found, row]].mean(0))
            for row in range(len(rows))
            if row not in found
        }
        found.append(min(distance, key=distance.__getitem__))
    assert exemplars.herd(features).tolist() == found


def test_herding_does_not_see_lengths_and_takes_the_first_of_equal_rows() -> None:
    features = np.random.default_rng(1).normal(size=(9, 4))
    lengths = np.random.default_rng(2).uniform(0.1, 9, size=(9, 1))
    once = exemplars.herd(features)
    assert np.array_equal(exemplars.herd(features * lengths), once)
    twice = exemplars.herd(np.concatenate([features, features]))
    place = {row: number for number, row in enumerate(twice.tolist())}
    assert all(place[row] < place[row + 9] for row in range(9))
    assert exemplars.herd(np.ones((6, 3))).tolist() == list(range(6))
    assert exemplars.herd(np.zeros((2, 3))).tolist() == [0, 1]


def continuum(features: np.ndarray, count: int) -> set[int]:
    """The rows that continuum 1.2.7 keeps, by its formula, in plain steps of vectors."""
    rows = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-8)
    mean = rows.mean(axis=0)
    kept: list[int] = []
    direction = mean
    for _ in range(1000):
        if len(kept) == min(count, len(rows)):
            break
        best = int((rows @ direction).argmax())
        kept += [best] if best not in kept else []
        direction = direction + mean - rows[best]
    return {*kept, *[row for row in range(len(rows)) if row not in kept][: count - len(kept)]}


@pytest.mark.parametrize("width", [2, 4, 32])
def test_the_first_ranks_of_barycenter_are_continuums_exemplars(width: int) -> None:
    random = np.random.default_rng(width)
    features = random.normal(size=(60, width)) @ random.normal(size=(width, 40))
    order = exemplars.barycenter(features).tolist()
    assert sorted(order) == list(range(60))
    for count in (1, 2, 5, 20, 30):
        assert set(order[:count]) == continuum(features, count)


def test_on_features_with_few_dimensions_barycenter_keeps_others_than_herding() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(500, 8)) @ random.normal(size=(8, 64))
    one, other = (set(f(features)[:50].tolist()) for f in (exemplars.herd, exemplars.barycenter))
    assert len(one - other) > 20


def test_barycenter_ranks_every_row_though_it_may_not_find_it() -> None:
    assert exemplars.barycenter(np.ones((6, 3))).tolist() == list(range(6))
    assert exemplars.barycenter(np.zeros((2, 3))).tolist() == [0, 1]
    many = np.repeat([[1.0, 0.0], [0.9, 0.1]], [3000, 1], axis=0)
    assert sorted(exemplars.barycenter(many).tolist()) == list(range(3001))


def test_a_random_order_follows_from_image_and_seed_alone() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (30, 32)).astype(np.uint8)
    order = exemplars.shuffle(digests, 0)
    assert sorted(order.tolist()) == list(range(30))
    turned = exemplars.shuffle(digests[::-1], 0)
    assert np.array_equal(digests[::-1][turned], digests[order])
    assert not np.array_equal(exemplars.shuffle(digests, 1), order)


# --- the budget -------------------------------------------------------------------------------


def test_the_budget_is_shared_by_the_classes_so_far() -> None:
    first, second = {(2, 0): 3, (4, 0): 50}, {(0, 0): 50}
    assert exemplars.shares([], 20, "total") == {}
    assert exemplars.shares([first], 20, "total") == {(0, (4, 0)): 10, (0, (2, 0)): 3}
    two = exemplars.shares([first, second], 20, "total")
    assert two == {(0, (4, 0)): 6, (0, (2, 0)): 3, (1, (0, 0)): 6}
    assert sum(two.values()) <= 20
    every = exemplars.shares([first, second], 20, "per_class")
    assert every == {(0, (4, 0)): 20, (0, (2, 0)): 3, (1, (0, 0)): 20}


def test_a_class_in_several_domains_shares_its_part_among_them() -> None:
    tasks = [{(0, 0): 50, (1, 0): 50}, {(0, 1): 50}, {(0, 2): 50, (1, 2): 50}]
    found = exemplars.shares(tasks, 20, "total")
    assert found == {
        (0, (0, 0)): 4, (1, (0, 1)): 3, (2, (0, 2)): 3, (0, (1, 0)): 5, (2, (1, 2)): 5
    }  # fmt: skip
    assert sum(found.values()) == 20


def test_a_class_in_several_tasks_shares_its_part_among_them() -> None:
    tasks = [{(0, 0): 50, (0, 1): 50}, {(0, 0): 1}, {(0, 0): 50}]
    found = exemplars.shares(tasks, 10, "per_class")
    assert found == {(0, (0, 0)): 3, (0, (0, 1)): 3, (1, (0, 0)): 1, (2, (0, 0)): 2}


def test_chosen_are_the_first_ranks_of_each_block() -> None:
    labels = np.array([0, 1, 0, 1, 0, 2, 1, 2])
    domains = np.array([0, 0, 0, 1, 0, 0, 1, 0])
    index = SplitIndex(digests=np.zeros((8, 32), np.uint8), labels=labels, domains=domains)
    # Of rows 0, 2, 4; of 1; of 3, 6; of 5, 7.
    ranks = [np.array(places) for places in ([2, 0, 1], [0], [1, 0], [0, 1])]
    most = {(0, 0): 2, (1, 0): 4, (1, 1): 1, (2, 0): 0}
    assert np.flatnonzero(exemplars.chosen(index, ranks, most)).tolist() == [1, 2, 4, 6]


# --- places -----------------------------------------------------------------------------------


def test_a_part_of_the_places_is_read_without_the_rest(tmp_path: Path) -> None:
    places = sources.Places(
        kind="parquet",
        image="image",
        files=("a", "b", "c"),
        file=np.array([0, 0, 0, 2, 2, 2]),
        row=np.array([4, 5, 6, 0, 1, 9]),
    )
    hints = places.hints(0, 6)
    assert sources.count(hints) == 6
    picked = sources.pick(hints, np.array([1, 3, 4]))
    assert picked == places.at(np.array([1, 3, 4])).hints(0, 3)
    assert picked["runs"] == [[0, 5, 6], [1, 0, 2]]
    assert sources.pick(hints, np.arange(6)) == hints
    assert sources.count(sources.pick(hints, np.arange(0))) == 0
    files = sources.Places(
        kind="files", image="", files=("p", "q", "r"), file=np.arange(3), row=np.zeros(3)
    ).hints(0, 3)
    assert sources.pick(files, np.array([0, 2])) == {"kind": "files", "files": ["p", "r"]}
    assert sources.count(files) == 3


# --- stages -----------------------------------------------------------------------------------


def rows_of(made: Plan, label: int) -> np.ndarray:
    """Training rows of a class, by the data set's own number."""
    return np.flatnonzero(made.data.sources[0].train.labels == label)


def ranked(made: Plan, stage: Stage) -> int:
    """The class whose images a stage ranks."""
    digests = made.data.sources[0].train.digests
    images = {digest_of(digests[rows_of(made, label)]): label for label in range(pngs.CLASSES)}
    return images[stage.parameters["images"]]


def ranks_of(store: Store, made: Plan) -> np.ndarray:
    """The rank of each training row; -1 for those that are not ranked."""
    ranks = np.full(len(TRAIN), -1)
    for stage in of(made, "exemplars"):
        ranks[rows_of(made, ranked(made, stage))] = load(store, "exemplars", stage.key)
    return ranks


def test_a_ranking_of_a_class_serves_all_orders_seeds_budgets_and_methods(
    store: Store, folder: Path
) -> None:
    both = [
        {"replay": {"exemplars": 12}},
        {"replay": {"exemplars": 1, "exemplar_budget": "per_class"}},
    ]
    made = pngs.plan(store, folder, "scenario.orders=[1, 2]", "seeds=[0, 1]", methods=both)
    assert len(made.runs) == 8
    shards = {stage.label: stage for stage in of(made, "features")}
    kind = {k: v for k, v in shards["features train 1/8"].parameters.items() if k != "images"}
    stages = {ranked(made, stage): stage for stage in of(made, "exemplars")}
    # Exemplars are of all tasks but the last.
    earlier = [label for run in made.runs for label in run.stream.ids[:4]]
    assert len(stages) == len(of(made, "exemplars")) and stages.keys() == set(earlier)
    for label, stage in stages.items():
        rows = rows_of(made, label)
        images = digest_of(made.data.sources[0].train.digests[rows])
        assert stage.preimage["parameters"] == {
            "selection": "herding", "features": kind, "images": images,
        }  # fmt: skip
        assert stage.preimage["inputs"] == {}
        numbers = sorted(set(rows // 4))
        held = [shards[f"features train {number + 1}/8"] for number in numbers]
        assert stage.reads["features"] == tuple(held)
        assert stage.reads["dataset"] == (made.data.sources[0].train.stage(),)
    for run in made.runs:
        ids = run.stream.ids
        for model in run.models:
            read = model.stage.reads["exemplars"]
            assert read == tuple(stages[label] for label in ids[:4])
    random = planned(store, folder, "seeds=[0, 1]", exemplar_selection="random")
    drawn = of(random, "exemplars")
    assert len({stage.key for stage in drawn}) == 2 * 4
    assert sorted(stage.parameters["seed"] for stage in drawn) == [0] * 4 + [1] * 4
    assert all(stage.reads.keys() == {"dataset"} for stage in drawn)


def test_a_budget_changes_trainings_and_nothing_before_them(store: Store, folder: Path) -> None:
    one, two = planned(store, folder), planned(store, folder, exemplars=13)
    for operator in ("dataset", "features", "exemplars"):
        assert [s.key for s in of(one, operator)] == [s.key for s in of(two, operator)] != []
    assert not {s.key for s in of(one, "train")} & {s.key for s in of(two, "train")}
    train, ids = one.data.sources[0].train, one.runs[0].stream.ids
    rows = np.flatnonzero(np.isin(train.labels, ids[:4]))
    labels = np.array([ids.index(label) for label in train.labels[rows].tolist()], np.int32)
    together = SplitIndex(digests=train.digests[rows], labels=labels, domains=np.zeros_like(labels))
    ranking = dict(of(one, "exemplars")[0].parameters)
    del ranking["images"]
    assert of(one, "train")[1].parameters["memory"] == {
        "earlier": [of(one, "train")[0].parameters["images"]],
        "exemplars": 12,
        "budget": "total",
        "ranking": ranking,
        "order": together.digest,
    }


def test_without_exemplars_there_is_no_memory(store: Store, folder: Path) -> None:
    made = planned(store, folder, exemplars=0)
    assert of(made, "exemplars") == []
    assert all("memory" not in stage.parameters for stage in of(made, "train"))
    [run] = made.runs
    assert run.method.facts.exemplars == 0
    assert planned(store, folder).runs[0].method.facts.exemplars == 12
    assert planned(store, folder, exemplars=30).runs[0].method.facts.exemplars == 30


def test_a_budget_that_leaves_classes_without_an_image_is_refused(
    store: Store, folder: Path
) -> None:
    with pytest.raises(ConfigError, match="replay shares exemplars 3 among 4 classes"):
        planned(store, folder, exemplars=3)
    with pytest.raises(HyperparameterError, match="at least 0, got -1"):
        Replay(exemplars=-1)


def kept_by(store: Store, made: Plan, stage: Stage) -> tuple[list[int], list[int]]:
    """Rows of a task's own images and of its exemplars, by what the worker hands over."""
    rows = pngs.training_rows(stage, store)
    assert isinstance(rows, TaskRows)
    index, ids = made.data.sources[0].train.stored(), made.runs[0].stream.ids
    places = {sample: row for row, sample in enumerate(index.sample_ids())}
    found = np.array([places[sample] for sample in rows._samples])
    assert [ids[column] for column in rows.targets] == index.labels[found].tolist()
    memory = rows.exemplars.numpy()
    return found[~memory].tolist(), found[memory].tolist()


@pytest.mark.parametrize("selection", ["herding", "barycenter", "random"])
def test_a_task_trains_on_its_images_and_the_best_of_earlier_ones(
    selection: str, store: Store, folder: Path
) -> None:
    made = planned(store, folder, exemplar_selection=selection)
    compute(made.stages, store)
    ranks, ids = ranks_of(store, made), made.runs[0].stream.ids
    labels = made.data.sources[0].train.labels
    assert all(sorted(ranks[labels == c].tolist()) == list(range(PER_CLASS)) for c in ids[:4])
    assert set(ranks[np.isin(labels, ids[4:])].tolist()) == {-1}
    for number, stage in enumerate(of(made, "train")):
        own, kept = kept_by(store, made, stage)
        earlier, current = ids[: 2 * number], ids[2 * number : 2 * number + 2]
        assert own == np.flatnonzero(np.isin(labels, current)).tolist()
        share = 12 // max(1, len(earlier))
        assert kept == np.flatnonzero(np.isin(labels, earlier) & (ranks < share)).tolist()
        assert len(kept) == min(share, PER_CLASS) * len(earlier)
        assert store.manifest("train", stage.key)["facts"]["exemplars"] == len(kept)
        assert stage.hints["images"] == 2 * (len(own) + len(kept))
        # Of all that may be kept: which ones are is known to the worker alone.
        assert sources.count(stage.hints["places"]) == np.isin(labels, earlier + current).sum()


def test_another_order_keeps_the_same_images_of_a_class(store: Store, folder: Path) -> None:
    plans = [
        planned(store, folder, f"scenario.orders=[[{o}]]")
        for o in ("0, 1, 2, 3, 4, 5", "1, 0, 5, 4, 3, 2")
    ]
    kept = []
    for made in plans:
        compute([*of(made, "dataset"), *of(made, "features"), *of(made, "exemplars")], store)
        rows = kept_by(store, made, of(made, "train")[1])[1]
        kept.append(rows)
    assert kept[0] == kept[1]


def test_domains_give_exemplars_of_the_domains_before(store: Store, tmp_path: Path) -> None:
    folder = pngs.data(tmp_path, pngs.rows(3, 0, DOMAINS), pngs.rows(1, 5000, DOMAINS))
    made = pngs.plan(
        store, folder, "dataset.domain=domain", scenario={"kind": "domain_incremental"},
        methods=[{"replay": {}}],
    )  # fmt: skip
    compute([*of(made, "dataset"), *of(made, "features"), *of(made, "exemplars")], store)
    rows = pngs.training_rows(of(made, "train")[1], store)
    assert len(rows.targets) == 18 + 12
    assert int(rows.exemplars.sum()) == 12
    assert Counter(rows.targets[rows.exemplars].tolist()) == dict.fromkeys(range(6), 2)


def test_a_killed_task_with_exemplars_goes_on_with_the_same_bits(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(store, folder, "resources.train.checkpoint_minutes=0")
    compute(made.stages, store)
    again = Store(str(tmp_path / "again"))
    first, second, _ = of(made, "train")
    compute([*of(made, "dataset"), *of(made, "features"), *of(made, "exemplars"), first], again)
    keep, count = snapshots.keep, 0

    class Killed(BaseException):
        pass

    def kept(*arguments: Any) -> None:
        nonlocal count
        keep(*arguments)
        count += 1
        if count == 3:
            raise Killed

    monkeypatch.setattr(snapshots, "keep", kept)
    with pytest.raises(Killed):
        compute([second], again)
    compute([second], again)
    one, other = (
        load_tensors(s.read("train", second.key, "state.safetensors")) for s in (store, again)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
