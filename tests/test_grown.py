"""A stream that grew, as people use it: runs, MLflow's models and predictions name the newest.

All stages are computed in this process, so that the runs find them and need no Ray.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas
import pytest
from mlflow.tracking import MlflowClient

import graftwork
from graftwork.operators.errors import BadDataError
from graftwork.operators.serving import lookup
from graftwork.operators.store import Store
from graftwork.operators.tracking.records import TASK
from graftwork.pipelines import cli
from graftwork.pipelines.reporting.document import Document
from graftwork.pipelines.running.where import Where
from tests import pngs
from tests.test_listed import ARRIVED, EPOCHS, folder_of, planned
from tests.test_sealed import missing, sealed

METHODS: list[Any] = ["simplecil", {"finetune": dict(EPOCHS)}]
RENAME = {"m": "zebra"}


class Grown(NamedTuple):
    """Runs of three tasks, of four, and of four whose first is sealed and has another name."""

    folder: Path
    store: Store
    runs: list[Document]

    @property
    def uri(self) -> str:
        return Where(store=self.store.url).tracking_uri()


def run(store: Store, folder: Path, count: int, **sections: Any) -> Document:
    given = {"methods": METHODS} | sections
    made = planned(store, folder, count, **given)
    pngs.compute(missing(made, store), store)
    with contextlib.chdir(folder):
        return graftwork.run("spec.yaml", store=store.url)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    folder = folder_of(tmp_path_factory.mktemp("data"))
    store = Store(str(tmp_path_factory.mktemp("store")))
    runs = [run(store, folder, count) for count in (3, 4)]
    os.remove(folder / "0-train.parquet")
    stream = sealed(4, 0)
    # Each its own: YAML would refer to the first one, which specs refuse.
    stream[0]["rename"], stream[2]["rename"] = dict(RENAME), dict(RENAME)
    runs.append(run(store, folder, 4, stream=stream))
    yield Grown(folder, store, runs)


def test_a_run_records_the_task_that_is_new(grown: Grown) -> None:
    client = MlflowClient(grown.uri)
    for document, task in zip(grown.runs, ("week 2", "week 3", "week 3"), strict=True):
        for result in document.results:
            assert result.mlflow_run_id is not None
            assert client.get_run(result.mlflow_run_id).data.tags[TASK] == task


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
@pytest.mark.parametrize("place", [0, 1], ids=["simplecil", "finetune"])
def test_the_model_of_the_newest_run_has_the_new_classes(
    place: int, grown: Grown, tmp_path: Path
) -> None:
    """And those of earlier runs have what they had."""
    renamed = tuple(RENAME.get(name, name) for name in ARRIVED)
    image = pandas.DataFrame({"image": [pngs.png(3000 + 100 * 5, label=5)]})
    for number, names in enumerate((ARRIVED[:4], ARRIVED, renamed)):
        id = grown.runs[number].results[place].mlflow_run_id
        assert id is not None
        held = lookup.find(grown.uri, id).held_by
        folder = MlflowClient(grown.uri).download_artifacts(held, "model", str(tmp_path))
        model = mlflow.pyfunc.load_model(folder)
        found = model.predict(image, params={"logits": True})
        assert tuple(found.columns) == names


def test_the_newest_run_predicts_and_names_its_task(
    grown: Grown, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (grown.folder / "new.png").write_bytes(pngs.png(3500, label=5))
    given = ["graftwork", "predict", "pngs/finetune", str(grown.folder / "new.png")]
    given += ["--json", "--top", "6", "--store", grown.store.url]
    monkeypatch.setattr(sys, "argv", given)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    document = json.loads(out)
    assert document["run_id"] == grown.runs[-1].results[1].mlflow_run_id
    assert document["task"] == "week 3"
    assert 'finetune · order listed · seed 0 · up to task "week 3": 1 images' in err
    [prediction] = document["predictions"]
    assert {each["class"] for each in prediction["top"]} == {"zebra", "n", "o", "p", "a", "q"}


def test_the_newest_run_is_the_one_that_ended_last(grown: Grown) -> None:
    """A run begins for MLflow before all that its result is made of, whenever that was computed."""
    client = MlflowClient(grown.uri)
    held = client.get_run(grown.runs[-1].results[0].mlflow_run_id or "").info
    assert held.end_time is not None
    late = client.create_run(
        held.experiment_id,
        start_time=held.start_time + 3_600_000,
        tags={"graftwork.kind": "method", "graftwork.label": "simplecil"},
        run_name="one that began later and ended before",
    )
    client.set_terminated(late.info.run_id, "FINISHED", (held.end_time or 0) - 1)
    try:
        assert lookup.find(grown.uri, "pngs/simplecil").run_id == held.run_id
    finally:
        client.delete_run(late.info.run_id)


def test_the_leaderboard_does_not_mix_lengths(grown: Grown) -> None:
    """A result that was served again is one result; three tasks and four are two."""
    rows = graftwork.results("pngs", store=grown.store.url)
    assert sorted(row.name for row in rows) == [
        f"{method} (tasks={count})" for method in ("finetune", "simplecil") for count in (3, 4)
    ]
    assert {row.runs for row in rows} == {1}
    found = {row.name: row.mean["a_last"] for row in rows}
    for document, count in zip(grown.runs[:2], (3, 4), strict=True):
        for result in document.results:
            assert found[f"{result.method} (tasks={count})"] == result.metrics["a_last"]


def test_a_run_that_needs_images_that_are_gone_does_not_begin(
    grown: Grown, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = sealed(4, 0)
    changed: list[Any] = ["simplecil", {"finetune": {**EPOCHS, "epochs": 3}}]
    planned(grown.store, grown.folder, 4, stream=stream, methods=changed)
    line = (
        'stream.0: "week 0" is sealed, and one stage needs images of it that are gone: '
        "train finetune order listed seed 0 task 1/4; missing: "
        f"{grown.folder / '0-train.parquet'}; bring them back, or leave out what needs them"
    )
    records = grown.store.blobs.files("runs")
    with contextlib.chdir(grown.folder):
        with pytest.raises(BadDataError) as caught:
            graftwork.run("spec.yaml", store=grown.store.url)
        assert str(caught.value).endswith(line)
        assert str(caught.value).startswith("spec.yaml:")
        [gone] = graftwork.plan("spec.yaml", store=grown.store.url).gone
        monkeypatch.setattr(sys, "argv", ["graftwork", "plan", "spec.yaml", "--json"])
        sys.argv += ["--store", grown.store.url]
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 9
        assert line in err
        [written] = json.loads(out)["gone"]
        assert written == {name: getattr(gone, name) for name in ("task", "key")} | {
            name: list(getattr(gone, name)) for name in ("stages", "files")
        }
        monkeypatch.setattr(sys, "argv", ["graftwork", "doctor", "spec.yaml"])
        sys.argv += ["--store", grown.store.url]
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        assert 'task "week 0", sealed: as it was recorded' in out
        assert "1 file gone" in out
    assert grown.store.blobs.files("runs") == records
