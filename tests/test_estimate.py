"""Estimates of a plan's time: from what stages took before, and from nothing else."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import save_file

from graftwork import methods
from graftwork.operators.assignment import Result
from graftwork.operators.backbones import loading
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.explaining import former
from graftwork.pipelines.explaining.estimate import Estimate, duration
from graftwork.pipelines.explaining.explain import explain
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.reporting import terminal
from tests import pngs
from tests.test_promptfusion import BESIDE
from tests.test_served_kinds import ON_CLIP, ON_VIT
from tests.test_text import BACKBONE, NAMES, reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of three training images and one test image each."""
    return pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(3, 0), pngs.rows(1, 5000))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def planned(store: Store, folder: Path, method: Any = None, **sections: Any) -> Plan:
    return pngs.plan(store, folder, **sections | ({"methods": [method]} if method else {}))


def finetune(**values: Any) -> dict[str, Any]:
    return {"finetune": {"epochs": 2, "batch_size": 4} | values}


def took(store: Store, stage: Stage, seconds: float, images: int = 0) -> None:
    """A stage as if it had been computed."""
    facts = {"images_forwarded": images} if images else {}
    store.commit(stage.assignment(), Result(files={}, facts=facts), seconds)


def test_nothing_is_invented(store: Store, folder: Path) -> None:
    made = planned(store, folder, finetune())
    assert explain(made, store).time == Estimate(
        seconds=0,
        in_a_row=0,
        former=0,
        unknown=("dataset", "train finetune", "predict finetune", "evaluate finetune"),
    )
    assert str(explain(made, store).time) == (
        "no former stage says how long it takes: dataset, train finetune, predict finetune, "
        "evaluate finetune"
    )


def test_images_scale_what_features_took(store: Store, folder: Path) -> None:
    made = planned(store, folder, "simplecil")
    first, *others = pngs.of(made, "features")
    took(store, first, 2.0, images=4)
    # 18 training images in shards of 4, 6 test images in shards of 4.
    assert sorted(s.hints["images"] for s in others) == [2, 2, 4, 4, 4, 4]
    found = explain(made, store).time
    assert found.unknown == ("dataset", "fit simplecil", "evaluate simplecil")
    assert (found.seconds, found.former) == (10.0, 1)
    # Shards do not wait for each other.
    assert found.in_a_row == 2.0


def test_tasks_of_a_chain_wait_for_each_other(store: Store, folder: Path) -> None:
    made = planned(store, folder, finetune())
    first, *others = pngs.of(made, "train")
    assert [s.hints["images"] for s in others] == [12, 12]
    took(store, first, 6.0, images=12)
    predict = pngs.of(made, "predict")[1]
    assert predict.hints["images"] == 4
    took(store, predict, 1.0, images=4)
    found = explain(made, store).time
    # Predictions on 2 and 6 images; the evaluation and the indexes are not known.
    assert found == Estimate(
        seconds=2 * 6.0 + 0.5 + 1.5,
        in_a_row=2 * 6.0 + 1.5,
        former=2,
        unknown=("dataset", "evaluate finetune"),
    )
    assert str(found) == (
        "about 14 s of work (14 s in a row at least), from 2 stages done before; "
        "2 kinds of stage without a former one: dataset, evaluate finetune"
    )


def test_the_nearest_stage_says(store: Store, folder: Path) -> None:
    """Epochs count by the images; of several stages the one with the most equal values."""
    took(store, pngs.of(planned(store, folder, finetune()), "train")[0], 6.0, images=12)
    longer = planned(store, folder, finetune(epochs=4))
    assert explain(longer, store).time.seconds == 3 * 12.0
    other = finetune(epochs=4, lr=0.5, weight_decay=0.0)
    took(store, pngs.of(planned(store, folder, other), "train")[0], 100.0, images=24)
    assert explain(longer, store).time.seconds == 3 * 12.0
    nearer = finetune(epochs=4, lr=0.5)
    found = explain(planned(store, folder, nearer), store).time
    assert found.seconds == 3 * 100.0


def test_without_images_the_newest_of_the_nearest_says(store: Store, folder: Path) -> None:
    short = planned(store, folder, "simplecil", scenario={
        "kind": "class_incremental", "increment": 2, "orders": [1993], "tasks": 2,
    })  # fmt: skip
    took(store, short.runs[0].model, 7.0)
    made = planned(store, folder, "simplecil")
    # One fit on all rows serves every stream of a data set that is cut: it is the same.
    assert made.runs[0].model.key == short.runs[0].model.key
    took(store, short.runs[0].evaluate, 3.0)
    for stage in pngs.of(made, "dataset"):
        took(store, stage, 1.0)
    found = explain(made, store).time
    assert (found.seconds, found.in_a_row, found.former) == (3.0, 3.0, 1)
    assert found.unknown == ("features vit_nano_patch8_16",)


@pytest.mark.parametrize(
    "sections",
    [
        {"methods": [finetune()], "backbone": {"model": pngs.PARALLEL}},
        {"methods": [{"lora": {"epochs": 2, "batch_size": 4}}]},
        {"methods": [finetune()], "backbone": {"precision": "bf16"}},
    ],
)
def test_other_kinds_say_nothing(sections: dict[str, Any], store: Store, folder: Path) -> None:
    first = planned(store, folder, finetune())
    for stage in pngs.of(first, "train"):
        took(store, stage, 6.0, images=12)
    if "backbone" in sections:
        of_all = {
            "model": pngs.MODEL, "weights": "random",
            "preprocessing": {"resize": 16, "crop": 16, "mean": [0, 0, 0], "std": [1, 1, 1]},
        }  # fmt: skip
        sections = sections | {"backbone": of_all | sections["backbone"]}
    if sections.get("backbone", {}).get("model") == pngs.PARALLEL:
        sections |= {"methods": ["simplecil"]}
    found = explain(planned(store, folder, **sections), store).time
    assert (found.seconds, found.former) == (0, 0)


@pytest.mark.parametrize("sections", [ON_VIT, ON_CLIP], ids=["vit", "clip"])
def test_every_kind_of_stage_is_like_its_own(
    sections: dict[str, Any],
    store: Store,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(methods.METHODS, "replay", "tests.test_exemplars:Replay")
    given = {**sections, "merge": [{"fisher": {"of": "finetune", "images": 3}}], "ensemble": []}
    given["methods"] = [*sections["methods"], {"replay": {"epochs": 1, "batch_size": 4}}]
    if sections is ON_CLIP:
        save_file(loading.load(pngs.MODEL, "random", "token").state_dict(), tmp_path / "vit.st")
        beside = {**BESIDE, "weights": str(tmp_path / "vit.st")}
        given = {**sections, "backbone": BACKBONE, "vit": beside, "reference": reference(folder)}
    given, seeds = json.loads(json.dumps(given)), ({"seeds": [0]}, {"seeds": [1]})
    names = f"dataset.classes={json.dumps(NAMES)}"
    first, second = (pngs.plan(store, folder, names, **given, **seed) for seed in seeds)
    nothing = explain(second, store).time
    assert {kind.partition(" ")[0] for kind in nothing.unknown} == {
        stage.operator for stage in second.stages
    }
    for stage in first.stages:
        took(store, stage, 1.0)
    found = explain(second, store)
    assert found.counts["miss"] > 10
    assert (found.time.unknown, found.time.seconds) == ((), found.counts["miss"])


def test_stages_of_the_plan_are_looked_at_first(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(former, "CANDIDATES", 1)
    made = planned(store, folder, "simplecil")
    keys = sorted(pngs.of(made, "features"), key=lambda stage: stage.key)
    own = keys[-1]
    took(store, own, 1.0, images=own.hints["images"])
    # Of another spec, with a key that sorts before it, and much slower.
    others = planned(store, folder, "simplecil", features={"shard_size": 3})
    slow = [s for s in pngs.of(others, "features") if s.key < own.key][:1]
    assert slow
    took(store, slow[0], 1000.0, images=3)
    assert 0 < explain(made, store).time.seconds < 10


def test_a_finished_plan_takes_nothing(store: Store, folder: Path) -> None:
    made = planned(store, folder, "simplecil")
    took(store, made.runs[0].evaluate, 1.0)
    found = explain(made, store)
    assert found.time == Estimate(seconds=0, in_a_row=0, former=0, unknown=())
    assert str(found.time) == ""
    out = io.StringIO()
    terminal.plan(found, Console(file=out, width=200))
    assert out.getvalue().rstrip().endswith("0 images to forward")


def test_the_terminal_and_json_have_it(store: Store, folder: Path) -> None:
    made = planned(store, folder, "simplecil")
    took(store, pngs.of(made, "features")[0], 2.0, images=4)
    found = explain(made, store)
    out = io.StringIO()
    terminal.plan(found, Console(file=out, width=200))
    assert out.getvalue().rstrip().endswith(str(found.time))
    assert json.loads(json.dumps(asdict(found)))["time"] == {
        "seconds": 10.0,
        "in_a_row": 2.0,
        "former": 1,
        "unknown": ["dataset", "fit simplecil", "evaluate simplecil"],
    }


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.2, "less than a second"),
        (1.4, "1 s"),
        (99.4, "99 s"),
        (99.6, "1.7 min"),
        (119, "2 min"),
        (600, "10 min"),
        (99.6 * 60, "1.7 h"),
        (3600 * 150, "150 h"),
    ],
)
def test_durations_have_two_digits(seconds: float, says: str) -> None:
    assert duration(seconds) == says
