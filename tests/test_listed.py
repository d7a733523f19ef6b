"""Streams that are listed task by task: they grow, and nothing learned is learned again."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from torch import Tensor

from graftwork.methods import METHODS as METHODS_BY_NAME
from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.parts.sums import sum_states
from graftwork.methods.representations.simplecil import SimpleCIL
from graftwork.operators import housekeeping
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.formats import predictions, sums
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.streams import manifest
from graftwork.pipelines.planning import sources
from graftwork.pipelines.planning.plan import Plan, pieces_of
from graftwork.pipelines.spec.loading import load_resolved
from tests import pngs

NAMES = ("m", "n", "o", "p", "q", "a")
"""Of the classes; the last one sorts first."""
ARRIVED = ("m", "n", "o", "p", "a", "q")
"""The classes in order of arrival, those of one task by name."""
TASKS = ((0, 1), (2,), (3, 0), (4, 5))
"""Classes of each task; class 0 comes again."""
EPOCHS = {"epochs": 1, "batch_size": 4, "augmentation": "none"}
METHODS: list[Any] = [
    "simplecil",
    "fecam",
    {"ranpac": {"projection_dim": 8}},
    {"aper_ssf": dict(EPOCHS)},
    {"l2p": dict(EPOCHS)},
    {"coda_prompt": {**EPOCHS, "components_per_task": 2, "layers": 2}},
    {"magmax_independent": dict(EPOCHS)},
]


def folder_of(tmp_path: Path) -> Path:
    """Files `0-train.parquet`, `0-test.parquet`, ... of the tasks."""
    for number, own in enumerate(TASKS):
        for split, count, seed in (("train", 4, 0), ("test", 2, 5000)):
            rows = [
                (pngs.png(seed + 1000 * number + 100 * label + n, label=label), label, "")
                for label in own
                for n in range(count)
            ]
            pngs.write(tmp_path / f"{number}-{split}.parquet", rows, NAMES)
    return tmp_path


def listed(count: int) -> list[dict[str, Any]]:
    return [
        {"name": f"week {n}", "train": f"{n}-train.parquet", "test": f"{n}-test.parquet"}
        for n in range(count)
    ]


def planned(store: Store, folder: Path, count: int, **sections: Any) -> Plan:
    given = {"stream": listed(count), "dataset": None, "scenario": None, "methods": METHODS}
    with contextlib.chdir(folder):
        return pngs.plan(store, folder, **(given | sections))


def missing(made: Plan, store: Store) -> list[Stage]:
    return [stage for stage in made.stages if not store.has(stage.operator, stage.key)]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, list[Stage], Plan]:
    """Three tasks computed, then a fourth; what the fourth made necessary, and its plan."""
    folder = folder_of(tmp_path_factory.mktemp("data"))
    store = Store(str(tmp_path_factory.mktemp("store")))
    pngs.compute(planned(store, folder, 3).stages, store)
    made = planned(store, folder, 4)
    needed = missing(made, store)
    pngs.compute(needed, store)
    return folder, store, needed, made


def test_a_new_task_costs_the_new_task(grown: tuple[Path, Store, list[Stage], Plan]) -> None:
    _, _, needed, _ = grown
    # l2p, coda_prompt and magmax_independent train; aper_ssf trained on the first task alone. Of
    # training and test images there are 8 and 4, four in a shard, on two backbones.
    assert Counter(stage.operator for stage in needed) == {
        "dataset": 2, "features": 6, "train": 3, "join": 1, "predict": 3, "fit": 4, "evaluate": 7,
    }  # fmt: skip
    extracted = [stage for stage in needed if stage.operator == "features"]
    assert sum(stage.hints["images"] for stage in extracted) == 2 * (8 + 4)
    assert all("4/4" in s.label for s in needed if s.operator in ("train", "join", "predict"))


def test_a_stream_that_grew_is_the_stream_at_once(
    grown: tuple[Path, Store, list[Stage], Plan], tmp_path: Path
) -> None:
    folder, store, _, made = grown
    once = Store(str(tmp_path / "once"))
    again = planned(once, folder, 4)
    assert [s.key for s in again.stages] == [s.key for s in made.stages]
    pngs.compute(again.stages, once)
    for stage in made.stages:
        one, two = (s.manifest(stage.operator, stage.key)["files"] for s in (store, once))
        digests = [{name: entry["sha256"] for name, entry in f.items()} for f in (one, two)]
        assert digests[0] == digests[1], stage.label


def test_a_fit_goes_on_from_the_sums_of_the_one_before(
    grown: tuple[Path, Store, list[Stage], Plan],
) -> None:
    _, store, _, made = grown
    wanted = {name for stage in pngs.of(made, "fit") for name in sums.names(stage.key)}
    assert set(store.blobs.files(sums.FOLDER)) == wanted
    garbage = housekeeping.collect(store, days=0, unused=False, delete=False)
    assert not wanted & set(garbage["files"])


@pytest.mark.parametrize("method", METHODS[:4], ids=str)
@pytest.mark.parametrize("damaged", ["tensors", "facts", "both gone"])
def test_without_the_sums_the_rows_are_summed_again(
    damaged: str, method: Any, tmp_path: Path
) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    given = {"methods": [method]}
    pngs.compute(planned(store, folder, 3, **given).stages, store)
    for name in store.blobs.files(sums.FOLDER):
        if damaged == "both gone":
            store.blobs.remove(name)
        elif name.endswith(".json") == (damaged == "facts"):
            data = bytearray(store.blobs.get(name) or b"")
            data[-1] ^= 1
            store.blobs.replace(name, bytes(data))
    made = planned(store, folder, 4, **given)
    pngs.compute(missing(made, store), store)
    once = Store(str(tmp_path / "once"))
    pngs.compute(planned(once, folder, 4, **given).stages, once)
    [fit] = pngs.of(made, "fit")
    one, two = (s.read("fit", fit.key, "state.safetensors") for s in (store, once))
    assert one == two


@dataclass(frozen=True, kw_only=True)
class Means:
    """A nearest mean whose sums have names that nobody knows."""

    card: ClassVar[Card] = Card(title="Means", paper="", summary="", memory="")

    def statistics(self, rows: Rows, seed: int) -> State:
        state = SimpleCIL().statistics(rows, seed)
        return {"how many": state["count"], "altogether": state["sum"]}

    def add(self, a: State, b: State) -> State:
        return sum_states(a, b)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        known = {"count": total["how many"], "sum": total["altogether"]}
        return SimpleCIL().solve(known, known, classes, seed)

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        return SimpleCIL().logits(state, features, seed)

    def report(self, state: State) -> dict[str, Any]:
        return {}


def test_sums_of_other_names_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS_BY_NAME, "means", "tests.test_listed:Means")
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    given = {"methods": ["means", "simplecil"]}
    pngs.compute(planned(store, folder, 3, **given).stages, store)
    made = planned(store, folder, 4, **given)
    pngs.compute(missing(made, store), store)
    own, known = (store.read("fit", s.key, "state.safetensors") for s in pngs.of(made, "fit"))
    assert own == known


def test_classes_are_numbered_by_arrival(grown: tuple[Path, Store, list[Stage], Plan]) -> None:
    _, store, _, made = grown
    run = made.runs[0]
    assert run.stream.classes == ARRIVED
    assert [task.name for task in run.stream.tasks] == ["week 0", "week 1", "week 2", "week 3"]
    assert [task.train.classes for task in run.stream.tasks] == [(0, 1), (2,), (0, 3), (4, 5)]
    table = predictions.read(store, "evaluate", run.evaluate.key)
    last = table["task_trained"] == 3
    assert table["label"][last].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 5, 5, 4, 4]
    assert np.bincount(table["true_task"][last]).tolist() == [4, 2, 4, 4]


def test_classes_may_be_kept_apart(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    made = planned(store, folder, 3, methods=["simplecil"], disjoint_classes=True)
    assert made.runs[0].stream.classes == (
        "week 0/m",
        "week 0/n",
        "week 1/o",
        "week 2/m",
        "week 2/p",
    )


def test_a_task_may_take_some_classes_of_a_source(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    stream = [
        {**listed(1)[0], "name": "first", "only": ["n"]},
        {**listed(1)[0], "name": "second", "only": "m"},
    ]
    made = planned(store, folder, 0, stream=stream, methods=["simplecil"])
    [run] = made.runs
    assert run.stream.classes == ("n", "m")
    assert [len(task.train) for task in run.stream.tasks] == [4, 4]
    pngs.compute(made.stages, store)
    assert len(pngs.of(made, "dataset")) == 2
    with pytest.raises(ConfigError, match=r'stream.0.only: no class "z"; known: m, n'):
        planned(store, folder, 0, stream=[{**listed(1)[0], "only": ["z"]}])


def test_numbers_are_names_and_do_not_mix_with_names(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    for split in ("train", "test"):
        rows = [(pngs.png(n, label=label), label, "") for n, label in enumerate((7, 7, 9))]
        pngs.write(folder / f"9-{split}.parquet", rows)
    numbered = {"name": "numbers", "train": "9-train.parquet", "test": "9-test.parquet"}
    made = planned(store, folder, 0, stream=[numbered], methods=["simplecil"])
    assert made.runs[0].stream.classes == ("7", "9")
    with pytest.raises(ConfigError, match='"numbers" numbers its classes, "week 0" names them'):
        planned(store, folder, 0, stream=[*listed(1), numbered])


def test_what_no_task_learns_is_said(tmp_path: Path) -> None:
    folder, store = folder_of(tmp_path), Store(str(tmp_path / "store"))
    stream = [{**listed(1)[0], "test": ["0-test.parquet", "1-test.parquet"]}]
    made = planned(store, folder, 0, stream=stream, methods=["simplecil"])
    assert dict(made.runs[0].stream.untested) == {"o": 2}
    assert made.left_out == "2 test images of classes that no task learns are left out: o"
    assert planned(store, folder, 1, methods=["simplecil"]).left_out == ""
    none = [{**listed(1)[0], "test": "1-test.parquet"}]
    with pytest.raises(BadDataError, match=r'stream\.0: task "week 0" has no test images'):
        planned(store, folder, 0, stream=none, methods=["simplecil"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stream": [*listed(1), *listed(1)]}, 'second task called "week 0"'),
        ({"stream": [{"name": "a"}]}, "stream.0.train: missing"),
        ({"stream": [{**listed(1)[0], "builtin": "digits"}]}, "not beside builtin"),
        ({"dataset": "digits"}, "dataset: not beside stream"),
        ({"stream": None}, "dataset: missing"),
        ({"stream": []}, "must be a list of tasks"),
    ],
)
def test_bad_streams_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with pytest.raises(ConfigError) as caught:
        planned(store, tmp_path, 1, **changes)
    assert says in str(caught.value)


def test_the_examples_of_the_page_are_streams(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent.joinpath("docs", "streams.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(part.partition("```")[0]) for part in page.split("```yaml")[1:]]
    own, grown = (each for each in examples if "stream" in each)
    cuts = [each for each in examples if "scenario" in each]
    store = Store(str(tmp_path / "store"))

    def cut(given: dict[str, Any]) -> Plan:
        return pngs.plan(store, tmp_path, methods=["simplecil"], **given)

    # Each task's classes, by what its example is about.
    found = {
        (set(given["scenario"]) - {"kind", "orders", "initial", "increment"} or {"usual"}).pop(): [
            len(task.train.classes) for task in cut(given).runs[0].stream.tasks
        ]
        for given in cuts
        if {"manifest", "online"}.isdisjoint(given["scenario"])
    }
    assert found["usual"] == [4, 2, 2, 2]
    assert (found["tasks"], found["sizes"]) == ([3, 1, 2], [3, 5, 2])
    # One class of its own, one of the mixed ones, and what the pool has of the other four.
    assert found["blurry"] == [6, 6, 6, 6, 5]
    assert (found["few_shot"], found["long_tailed"]) == ([6, 2, 2], [2] * 5)
    [online] = [given for given in cuts if "online" in given["scenario"]]
    assert [len(task.train) for task in cut(online).runs[0].stream.tasks] == [250] * 5 + [184]
    [followed] = [given for given in cuts if "manifest" in given["scenario"]]
    (tmp_path / "split.csv").write_bytes(
        manifest.write(
            pieces_of(load_resolved("quickstart", ()), store.memo)[1], "1993", parquet=False
        )
    )
    with contextlib.chdir(tmp_path):
        tasks = cut(followed).runs[0].stream.tasks
    assert [len(task.train.classes) for task in tasks] == [2] * 5
    second = planned(store, tmp_path, 0, methods=["simplecil"], **own)
    tasks = second.runs[0].stream.tasks
    assert second.runs[0].stream.classes == ("five", "seven", "one", "two", "eight")
    assert [task.name for task in tasks] == ["first", "second"]
    assert [len(tasks[1].train), len(tasks[1].test)] == [150, 60]
    for split in ("train", "test"):
        for n, name in enumerate(("kitty", "one")):
            place = tmp_path / "photos" / "first" / split / name
            place.mkdir(parents=True)
            (place / "0.png").write_bytes(pngs.png(n))
    first = grown["stream"][0] | {"sealed": False}
    seen = planned(store, tmp_path, 0, methods=["simplecil"], stream=[first])
    sources.keep(seen.sources, store.memo)
    shutil.rmtree(tmp_path / "photos")
    third = planned(store, tmp_path, 0, methods=["simplecil"], **grown)
    assert third.runs[0].stream.classes == ("cat", "one", "two")
