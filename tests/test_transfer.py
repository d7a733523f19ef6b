"""Accuracy on tasks before they are learned: Transfer, Average and Last."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from graftwork.operators.errors import ConfigError
from graftwork.operators.evaluation import metrics
from graftwork.operators.formats import predictions
from graftwork.operators.store import Store
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.reporting import terminal
from graftwork.pipelines.reporting.document import Document, Records, Result, StageCounts
from tests import pngs
from tests.test_text import BACKBONE, NAMES

STILL = {
    "zscl": {
        "lr": 1e-30, "batch_size": 4, "warmup": 1, "average_every": 0, "distillation": 0,
    }
}  # fmt: skip
"""Trains, and stays where it starts."""


def table(*rows: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    names = ("label", "predicted", "predicted_in_task", "true_task")
    return dict(zip(names, np.array(rows).T, strict=True))


def test_transfer_average_and_last_by_hand() -> None:
    """Two images in each of three tasks; classes 0, 1 and 2, and 3 and 4 and 5 beside them."""
    after = [
        table((0, 0, 0, 0), (3, 3, 3, 0), (1, 0, 1, 1), (4, 4, 4, 1), (2, 0, 5, 2), (5, 0, 5, 2)),
        table((0, 0, 0, 0), (3, 1, 0, 0), (1, 1, 1, 1), (4, 4, 4, 1), (2, 2, 2, 2), (5, 0, 2, 2)),
        table((0, 1, 0, 0), (3, 1, 3, 0), (1, 1, 1, 1), (4, 4, 4, 1), (2, 2, 2, 2), (5, 5, 5, 2)),
    ]
    # Among the task's own classes: [100 100 50], [50 100 50], [100 100 100].
    # Among all: [100 50 0], [50 100 50], [0 100 100].
    found = metrics.ahead(after, 3)
    assert found == {
        "transfer": pytest.approx((100 + (50 + 50) / 2) / 2),
        "average": pytest.approx(750 / 9),
        "last": 100.0,
        "transfer_union": pytest.approx((50 + (0 + 50) / 2) / 2),
        "average_union": pytest.approx(550 / 9),
        "last_union": pytest.approx(200 / 3),
    }


def test_a_task_without_test_images_does_not_count() -> None:
    one = table((0, 0, 0, 0), (2, 1, 2, 2))
    found = metrics.ahead([one] * 3, 3)
    assert (found["transfer"], found["transfer_union"], found["last_union"]) == (100.0, 0.0, 50.0)


def test_the_table_of_a_run_has_a_gap_where_nobody_was_asked() -> None:
    """Of two methods one knows classes by their names, whichever comes first."""

    def result(label: str, ahead: dict[str, float]) -> Result:
        rows = {"task_trained": [0], "sample": [0], "label": [0], "predicted": [0]}
        columns = rows | {"predicted_in_task": [0], "true_task": [0]}
        summary = replace(metrics.summarise(columns, 1, 1), ahead=ahead)
        return Result(
            method=label, label=label, hyperparameters={}, order=0, seed=0, summary=summary,
            trainable_parameters=0, forwards=1, batch_information_at_test=False, seconds=1.0,
            cached=False, mlflow_run_id=None,
        )  # fmt: skip

    asked, other = result("zs_clip", {"transfer": 61.25}), result("coop", {})
    for results in ((asked, other), (other, asked)):
        text = io.StringIO()
        document = Document(
            pipeline="p",
            seconds=1.0,
            stages=StageCounts(total=2, computed=2, cached=0),
            images_forwarded=0,
            results=results,
            mlflow=Records(tracking_uri="", experiment_id=None, run_id=None),
        )
        terminal.document(document, Console(file=text, width=120))
        lines = [line.split() for line in text.getvalue().splitlines()]
        by_name = {line[0]: line[1:] for line in lines if line}
        assert by_name["method"] == ["A_last", "A_avg", "forgetting", "transfer", "runs", "s"]
        assert by_name["zs_clip"] == ["100.00", "100.00", "0.00", "61.25", "1", "1.00"]
        assert by_name["coop"] == ["100.00", "100.00", "0.00", "-", "1", "1.00"]


def listed(folder: Path, count: int) -> list[dict[str, Any]]:
    """Two classes in each task, all cut from one data set."""
    source = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    return [
        {"name": f"week {n}", **source, "classes": list(NAMES), "only": NAMES[2 * n : 2 * n + 2]}
        for n in range(count)
    ]


def planned(store: Store, folder: Path, count: int, **sections: Any) -> Plan:
    given = {
        "stream": listed(folder, count),
        "dataset": None,
        "scenario": None,
        "backbone": BACKBONE,
        "methods": ["zs_clip", STILL],
        "transfer": True,
    }
    return pngs.plan(store, folder, **(given | sections))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store, Path]:
    folder = pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(2, 0), pngs.rows(2, 5000))
    store = Store(str(tmp_path_factory.mktemp("store")))
    made = planned(store, folder, 3)
    pngs.compute(made.stages, store)
    return made, store, folder


def summary_of(made: Plan, store: Store, method: str) -> dict[str, Any]:
    run = pngs.run_of(made, method)
    return json.loads(store.read("evaluate", run.evaluate.key, "summary.json"))


def test_what_is_not_moved_by_training_transfers_as_it_came(
    ran: tuple[Plan, Store, Path],
) -> None:
    """Every number of the untrained network, from stages of their own and from the last task's."""
    made, store, _ = ran
    trained, untrained = (summary_of(made, store, name)["ahead"] for name in ("zscl", "zs_clip"))
    assert trained == pytest.approx(untrained)
    # Nothing changes from task to task: every row of the matrix is the last one.
    assert trained["average"] == pytest.approx(trained["last"])
    assert 0 < trained["last"] < 100


def test_every_model_is_asked_about_all_tasks(ran: tuple[Plan, Store, Path]) -> None:
    made, store, _ = ran
    run = pngs.run_of(made, "zscl")
    further = run.evaluate.inputs["ahead"]
    assert [stage.label[-9:] for stage in further] == ["ahead 1/3", "ahead 2/3", "ahead 3/3"]
    for stage in further:
        found = predictions.read(store, "predict", stage.key)
        assert np.bincount(found["true_task"]).tolist() == [4, 4, 4]
    # The last model knows all classes anyway: it is asked once.
    assert further[-1].key == run.evaluate.inputs["predictions"][-1].key


def test_where_nobody_has_an_answer_nobody_is_asked(ran: tuple[Plan, Store, Path]) -> None:
    _, store, folder = ran
    coop = {"coop": {"epochs": 1, "batch_size": 4, "context_length": 2, "augmentation": "none"}}
    with pytest.raises(ConfigError, match=r"transfer: no method here knows a class before"):
        planned(store, folder, 3, methods=[coop])
    # A method that is not asked has the stages that it has without the option.
    both = planned(store, folder, 3, methods=[coop, "zs_clip"])
    alone = planned(store, folder, 3, methods=[coop], transfer=False)
    assert {stage.key for stage in alone.stages} <= {stage.key for stage in both.stages}
