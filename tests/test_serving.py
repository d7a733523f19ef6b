"""A result is used outside of the pipeline: models of every contract, and `graftwork predict`."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from graftwork.cluster import inference as remote
from graftwork.operators import building
from graftwork.operators.backbones import loading, weights
from graftwork.operators.backbones.names import place as place_of
from graftwork.operators.errors import ConfigError, DamagedStage, IncompatibleError
from graftwork.operators.formats import predictions, selection, states
from graftwork.operators.images.preprocessing import resolve
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import EvaluateHints
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.predictors import FittedPart
from graftwork.operators.serving import inference, inputs, lookup, model_files
from graftwork.operators.serving import predictor as serving
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import class_order
from graftwork.operators.tracking.sender import connect
from graftwork.pipelines import cli
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.spec.loading import load_resolved
from tests import here, pngs

ROOT = Path(__file__).parent.parent


STEPS = {"epochs": 1, "batch_size": 4}
PLAIN = {**STEPS, "augmentation": "none"}
METHODS = [
    "simplecil",
    "slda",
    {"aper_adapter": {**PLAIN}},
    {"ranpac": {"projection_dim": 32, "first_session": "vpt_deep", **PLAIN}},
    {"finetune": {**PLAIN}},
    {"l2p": {**PLAIN}},
    {"joint": {**PLAIN}},
]
NAMES = ["simplecil", "slda", "aper_adapter", "ranpac", "finetune", "l2p", "joint"]
ARRIVED = class_order(pngs.CLASSES, 1993)
each_method = pytest.mark.parametrize("name", NAMES)


class Made(NamedTuple):
    """A finished run of all methods."""

    folder: Path
    store: Store
    plan: Plan
    document: dict[str, Any]

    def run(self, name: str) -> Run:
        [found] = [run for run in self.plan.runs if run.method.name == name]
        return found

    def id(self, name: str) -> str:
        [found] = [r["mlflow_run_id"] for r in self.document["results"] if r["method"] == name]
        return found

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.store.url}/mlflow.db"

    def model(self, name: str) -> Path:
        """The model's folder `data`."""
        run = connect(self.uri).get_run(self.id(name))
        return Path(str(run.info.artifact_uri).removeprefix("file://"), "model", "data")

    @property
    def images(self) -> list[bytes]:
        """The test images."""
        return pq.read_table(self.folder / "test.parquet")["image"].to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("served")
    pngs.data(folder, pngs.rows(3, 0), pngs.rows(2, 5000))
    store = Store(str(folder / "store"))
    save_file(loading.load(pngs.MODEL, "random", "token").state_dict(), folder / "weights.st")
    half = [0.5, 0.5, 0.5]
    network = {
        "model": pngs.MODEL,
        "weights": str(folder / "weights.st"),
        "preprocessing": {"resize": pngs.SIZE, "crop": pngs.SIZE, "mean": half, "std": [*half]},
    }
    plan = pngs.plan(store, folder, methods=METHODS, backbone=network)
    return Made(folder, store, plan, here.run(folder / "spec.yaml", Path(store.url)))


def stored_rows(made: Made) -> list[int]:
    """The test images task by task, as predictions have them."""
    labels = made.plan.data.sources[0].test.labels.tolist()
    return sorted(range(len(labels)), key=lambda row: (ARRIVED.index(labels[row]) // 2, row))


def pipeline_scores(made: Made, run: Run) -> torch.Tensor:
    """Scores [N, C] of all test images after the last task, columns by arrival; from the store."""
    store = made.store
    if run.model.operator == "train":
        stage = run.own[-1]
        stored = load_tensors(store.read("predict", stage.key, "scores.safetensors"))
        assert stored.keys() == {"scores"}
        scores = stored["scores"]
    else:
        work, keyed = run.evaluate.assignment(), run.model.parameters
        given = from_json(EvaluateHints, work.hints).selection
        every = selection.joined(selection.rows_of(work, store, given))
        assert every.position.tolist() == stored_rows(made)
        matrix = selection.matrix(work, store, given, every)
        assert matrix is not None
        state = states.load_states(store, "fit", run.model.key)[-1]
        method = building.fitted(from_json(MethodRef, keyed["method"]))
        rows = torch.from_numpy(matrix.astype(np.float32))
        scores = method.logits(state, rows, keyed["seed"] or 0)
        # A fit of all classes has the data set's own numbers, one of a stream those by arrival.
        own = run.evaluated.columns
        assert own == (ARRIVED if len(keyed["tasks"]) == 1 else None)
        scores = scores if own is None else scores[:, list(own)]
    return scores[np.argsort(stored_rows(made))]


@each_method
def test_a_model_scores_as_the_pipeline_did(made: Made, name: str) -> None:
    run = made.run(name)
    predictor = serving.Predictor(made.model(name))
    scores = predictor.logits(made.images)
    assert predictor.classes == [str(c) for c in ARRIVED]
    expected = pipeline_scores(made, run)
    assert scores.shape == expected.shape == (12, pngs.CLASSES)
    assert torch.equal(scores, expected), float((scores - expected).abs().max())
    table = predictions.read(made.store, "evaluate", run.evaluate.key)
    last = table["task_trained"] == 2
    best = serving.top(scores.numpy(), 1)[:, 0]
    assert best[stored_rows(made)].tolist() == table["predicted"][last].tolist()
    # An image alone is what it is among others.
    assert torch.equal(predictor.logits(made.images[5:6]), scores[5:6])


def test_a_fresh_process_loads_models_from_mlflow(made: Made, tmp_path: Path) -> None:
    """What `mlflow.pyfunc.load_model` gives somewhere else: one method of each contract."""
    names = ["slda", "aper_adapter", "l2p"]
    code = (
        "import json, sys, mlflow, pandas, pyarrow.parquet as pq, tests.pngs\n"
        "uri, data, *ids = sys.argv[1:]\n"
        "mlflow.set_tracking_uri(uri)\n"
        "images = pandas.DataFrame({'image': pq.read_table(data)['image'].to_pylist()})\n"
        "for id in ids:\n"
        "    model = mlflow.pyfunc.load_model(f'runs:/{id}/model')\n"
        "    logits = model.predict(images, params={'logits': True})\n"
        "    table = model.predict(images)\n"
        "    print(json.dumps([logits.to_numpy().tolist(), list(logits.columns),"
        " table['class'].tolist(), table['score'].tolist()]))\n"
    )
    words = [made.uri, str(made.folder / "test.parquet"), *map(made.id, names)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        logits, columns, classes, scores = json.loads(line)
        expected = pipeline_scores(made, made.run(name)).double()
        assert torch.equal(torch.tensor(logits, dtype=torch.float64), expected)
        assert columns == [str(c) for c in ARRIVED]
        assert classes == [columns[c] for c in expected.argmax(dim=1)]
        assert scores == expected.max(dim=1).values.tolist()


def test_the_files_of_a_model_are_plain_and_pinned(made: Made) -> None:
    from graftwork import __version__

    folder = made.model("aper_adapter")
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["first_session.safetensors", "model.json", "state.safetensors"]
    about = json.loads((folder / "model.json").read_text())
    session = made.run("aper_adapter").own[0]
    assert about["made_of"]["first_session.safetensors"]["key"] == session.key
    assert (folder / "first_session.safetensors").read_bytes() == made.store.read(
        "train", session.key, "state.safetensors"
    )
    requirements = (folder.parent / "requirements.txt").read_text().splitlines()
    assert requirements[0] == f"graftwork=={__version__}"


def test_a_result_from_the_store_has_its_model(made: Made) -> None:
    """With the old records it points to who has the files; without them it brings its own."""
    again = here.run(made.folder / "spec.yaml", Path(made.store.url))
    assert again["stages"]["computed"] == 0
    ids = {r["method"]: r["mlflow_run_id"] for r in again["results"]}
    for name in ("simplecil", "l2p"):
        found = lookup.find(made.uri, ids[name])
        assert (found.run_id, found.held_by) == (ids[name], made.id(name))
        assert connect(made.uri).list_artifacts(ids[name]) == []
    other = f"sqlite:///{made.folder}/elsewhere/mlflow.db"
    fresh = here.run(
        made.folder / "spec.yaml", Path(made.store.url), "methods=[slda]", tracking=other
    )
    assert fresh["stages"]["computed"] == 0
    [result] = fresh["results"]
    found = lookup.find(other, "pngs/slda")
    assert found.held_by == found.run_id == result["mlflow_run_id"]
    brought = lookup.fetch(other, found, made.folder)
    for path in made.model("slda").iterdir():
        assert (brought / path.name).read_bytes() == path.read_bytes()


def test_models_that_name_another_loader_are_opened_and_recorded_anew(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow could not import it; `predict` never asks for it."""
    uri, spec = f"sqlite:///{tmp_path}/mlflow.db", made.folder / "spec.yaml"

    def loader(run_id: str) -> str:
        place = str(connect(uri).get_run(run_id).info.artifact_uri).removeprefix("file://")
        about = json.loads(Path(place, "model", "MLmodel").read_text())
        return about["flavors"]["python_function"]["loader_module"]

    with monkeypatch.context() as patch:
        patch.setattr(model_files, "LOADER", "operators.serving")
        old = here.run(spec, Path(made.store.url), "methods=[slda]", tracking=uri)["results"][0]
    assert loader(old["mlflow_run_id"]) == "operators.serving"
    opened = lookup.fetch(uri, lookup.find(uri, old["mlflow_run_id"]), tmp_path)
    expected = pipeline_scores(made, made.run("slda"))
    assert torch.equal(serving.Predictor(opened).logits(made.images), expected)
    new = here.run(spec, Path(made.store.url), "methods=[slda]", tracking=uri)["results"][0]
    found = lookup.find(uri, new["mlflow_run_id"])
    assert found.held_by == found.run_id
    assert loader(new["mlflow_run_id"]) == "graftwork.operators.serving"


def test_seeds_share_a_model_and_orders_have_columns_of_their_own(
    made: Made, tmp_path: Path
) -> None:
    """Of one fit: a tie goes to the class that came first, so that the order is part of it."""
    done = here.run(
        made.folder / "spec.yaml", tmp_path,
        "methods=[simplecil]", "scenario.orders=[1993, 7]", "seeds=[0, 1]",
    )  # fmt: skip
    assert len(list(tmp_path.glob("fit/*"))) == 1
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    found = {(r["order"], r["seed"]): lookup.find(uri, r["mlflow_run_id"]) for r in done["results"]}
    assert len({each.run_id for each in found.values()}) == 4
    holders = {order: {found[order, seed].held_by for seed in (0, 1)} for order in (1993, 7)}
    assert [len(ids) for ids in holders.values()] == [1, 1] and holders[1993] != holders[7]
    models = {}
    for order in (1993, 7):
        place = tmp_path / str(order)
        models[order] = serving.Predictor(lookup.fetch(uri, found[order, 0], place))
        assert models[order].classes == [str(c) for c in class_order(pngs.CLASSES, order)]
    by_name = [model.logits(made.images)[:, np.argsort(model.classes)] for model in models.values()]
    assert torch.equal(*by_name)


@pytest.mark.parametrize(("kept", "with_model"), [("fitted", ["slda"]), ("none", [])])
def test_models_can_be_left_out(made: Made, kept: str, with_model: list[str]) -> None:
    from graftwork.pipelines.running import served_model

    chosen = [f"tracking.models={kept}", "methods=[slda,{finetune: {epochs: 1, batch_size: 4}}]"]
    plan = make_plan(load_resolved(str(made.folder / "spec.yaml"), chosen), made.store.memo)
    found = [run.method.name for run in plan.runs if served_model.model_identity(plan, run)]
    assert found == with_model
    assert plan.runs[0].model.key == made.run("slda").model.key


def test_a_vote_of_the_batch_is_no_model(made: Made) -> None:
    vote = "methods=[{l2p: {epochs: 1, batch_size: 4, eval_selection: batch_vote}}]"
    plan = make_plan(load_resolved(str(made.folder / "spec.yaml"), [vote]), made.store.memo)
    assert [run.served for run in plan.runs] == [None]


def test_a_shorter_stream_offers_the_classes_it_saw(made: Made) -> None:
    chosen = ["methods=[simplecil]", "scenario.tasks=2"]
    plan = make_plan(load_resolved(str(made.folder / "spec.yaml"), chosen), made.store.memo)
    [run] = plan.runs
    assert run.model.key == made.run("simplecil").model.key
    assert run.stream.classes == tuple(str(c) for c in ARRIVED[:4])
    # A fit of all classes has columns of classes that never came: they have the last numbers.
    assert run.served is not None
    part = run.served.predictor
    assert isinstance(part, FittedPart)
    assert part.learned == (0, 4, 1, 2, 3, 5)


def test_weights_are_looked_for_and_checked(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    loading._kept.cache_clear()
    place, moved = made.folder / "weights.st", made.folder / "moved.st"
    place.rename(moved)
    try:
        with pytest.raises(ConfigError) as gone:
            serving.Predictor(made.model("slda"))
        line = str(gone.value)
        assert line.startswith(f"backbone {pngs.MODEL}: {place}: not found; name the file")
        assert "GRAFTWORK_WEIGHTS" in line and "\n" not in line
        monkeypatch.setenv("GRAFTWORK_WEIGHTS", str(moved))
        found = serving.Predictor(made.model("slda")).logits(made.images)
        assert torch.equal(found, pipeline_scores(made, made.run("slda")))
        state = {
            n: t + 1 for n, t in loading.load(pngs.MODEL, "random", "token").state_dict().items()
        }
        save_file(state, made.folder / "other.st")
        with pytest.raises(IncompatibleError, match="are not those that the model was made with"):
            serving.Predictor(made.model("slda"), weights=str(made.folder / "other.st"))
    finally:
        moved.rename(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this program reads up to 1; update graftwork"),
        ({"predictor": {"kind": "oracle"}}, r"unknown kind of predictor 'oracle' \(known: fitted"),
    ],
)
def test_models_of_newer_programs_are_refused(
    made: Made, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(made.model("slda"), tmp_path / "data")
    about = json.loads((tmp_path / "data/model.json").read_text())
    (tmp_path / "data/model.json").write_text(json.dumps(about | change))
    with pytest.raises(IncompatibleError, match=message):
        serving.Predictor(tmp_path / "data")


def test_a_damaged_state_never_becomes_a_model(made: Made, tmp_path: Path) -> None:
    copy = Store(str(tmp_path / "copy"))
    stage = made.run("finetune").model
    shutil.copytree(Path(made.store.url, "train", stage.key), Path(copy.url, "train", stage.key))
    [file] = Path(copy.url, "train", stage.key).glob("state*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedStage, match="sha256"):
        copy.copy("train", stage.key, "state.safetensors", tmp_path / "state")
    assert not (tmp_path / "state").exists()


# --- the command ------------------------------------------------------------------------------


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def call(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Command:
    """`graftwork predict` in this process, in a folder with images; on the store of `made`."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "GRAFTWORK_STORE", "RAY_ADDRESS", "GRAFTWORK_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "photos/deep").mkdir(parents=True)
    for number, image in enumerate(made.images):
        folder = "photos/deep" if number % 2 else "photos"
        (tmp_path / folder / f"{number:02}.png").write_bytes(image)
    (tmp_path / "photos/notes.txt").write_text("no image")

    def run(*words: object) -> Done:
        given = ["graftwork", "predict", *map(str, words), "--store", made.store.url]
        monkeypatch.setattr(sys, "argv", given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in out + err
        return Done(ended.value.code, out, err)

    return run


def best(made: Made, name: str, rows: list[int]) -> list[str]:
    """Names of the classes that the pipeline found likeliest."""
    scores = pipeline_scores(made, made.run(name)).numpy()
    return [str(ARRIVED[column]) for column in serving.top(scores, 1)[rows, 0]]


ORDER = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
"""Of the images in the folder: `photos/00.png`, ..., `photos/deep/01.png`, ... ."""


def test_a_table_for_people(made: Made, call: Command) -> None:
    done = call("pngs/l2p", "photos", "--top", 2)
    assert done.code == 0, done.err
    assert all(len(line) <= 80 for line in done.out.splitlines())
    lines = [line.split() for line in done.out.splitlines() if line.startswith(" photos/")]
    shown = [f"photos/{'deep/' if n % 2 else ''}{n:02}.png" for n in ORDER]
    assert [words[0] for words in lines] == shown
    assert [words[1] for words in lines] == best(made, "l2p", ORDER)
    scores = pipeline_scores(made, made.run("l2p"))
    assert [words[2] for words in lines] == [f"{float(scores[n].max()):.4g}" for n in ORDER]
    assert "12 images; a logit is" in done.out
    assert "12 images" in done.err and "l2p" in done.err


@pytest.mark.parametrize("words", [["photos/*.png", "photos/deep"], ["photos/**/*.png"]])
def test_globs_and_folders_keep_their_order(made: Made, call: Command, words: list[str]) -> None:
    done = call(made.id("slda"), *words, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    files = [p["file"] for p in document["predictions"]]
    assert sorted(files) == sorted(f"photos/{'deep/' if n % 2 else ''}{n:02}.png" for n in ORDER)
    if len(words) == 2:
        assert files == [f"photos/{'deep/' if n % 2 else ''}{n:02}.png" for n in ORDER]
    numbers = [int(Path(file).stem) for file in files]
    assert [p["top"][0]["class"] for p in document["predictions"]] == best(made, "slda", numbers)
    assert (document["run_id"], document["score"]) == (made.id("slda"), "logit")
    assert (document["images"], document["skipped"]) == (12, [])


def test_parquet_in_and_parquet_or_csv_out(made: Made, call: Command, tmp_path: Path) -> None:
    data = made.folder / "test.parquet"
    done = call("pngs/finetune", data, "photos/00.png", "--top", 3, "--output", "out.parquet")
    assert done.code == 0, done.err
    assert done.out.strip() == "13 images: out.parquet"
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert list(table) == ["file", "row", "rank", "class", "score"]
    assert table["rank"] == [1, 2, 3] * 13
    assert table["file"] == [str(data)] * 36 + ["photos/00.png"] * 3
    assert table["row"] == [row for row in range(12) for _ in range(3)] + [None] * 3
    scores = pipeline_scores(made, made.run("finetune"))
    top = torch.sort(scores, dim=1, descending=True, stable=True)
    likeliest = top.indices[:, :3].flatten().tolist()
    assert table["class"][:36] == [str(ARRIVED[column]) for column in likeliest]
    assert table["score"][:36] == top.values[:, :3].flatten().tolist()
    assert call("pngs/finetune", data, "--output", "out.csv").code == 0
    [head, *body] = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert head == list(table)
    assert [line[3] for line in body] == best(made, "finetune", list(range(12)))
    assert [line[1] for line in body] == [str(row) for row in range(12)]


def test_urls_and_another_column(made: Made, call: Command, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/served/a/x.png", made.images[3])
    memory.pipe("/served/b.png", made.images[4])
    pq.write_table(pa.table({"picture": pa.array(made.images[:2])}), tmp_path / "p.parquet")
    words = ["memory://served", "p.parquet", "memory://served/*.png", "--image-column", "picture"]
    done = call("pngs/slda", *words, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["predictions"]
    assert [p["top"][0]["class"] for p in found] == best(made, "slda", [3, 4, 0, 1, 4])
    assert [p["row"] for p in found] == [None, None, 0, 1, None]
    assert "--image-column" in call("pngs/slda", "p.parquet").err


def test_bad_images_are_named(call: Command, tmp_path: Path) -> None:
    (tmp_path / "photos/03.png").write_bytes(b"nonsense")
    (tmp_path / "photos/04.png").write_bytes((tmp_path / "photos/04.png").read_bytes()[:90])
    refused = call("pngs/slda", "photos", "missing.png")
    assert (refused.code, refused.out) == (9, "")
    assert refused.err == "error: missing.png: not found\n"
    stopped = call("pngs/slda", "photos", "--output", "out.csv")
    assert (stopped.code, stopped.out) == (9, "")
    wrong = [line for line in stopped.err.splitlines() if line.startswith("error: ")]
    assert wrong[0] == "error: photos/03.png: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text"
    assert wrong[1].startswith("error: photos/04.png: truncated or damaged")
    assert wrong[2] == "error: unusable images; --on-bad-image skip leaves them out"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    skipping = call("pngs/slda", "photos", "--on-bad-image", "skip", "--json")
    assert skipping.code == 0
    document = json.loads(skipping.out)
    assert document["images"] == len(document["predictions"]) == 11
    assert [s["image"] for s in document["skipped"]] == ["photos/03.png", "photos/04.png"]
    assert (
        "skipped: photos/03.png: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text"
        in skipping.err
    )


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["pngs/sdla", "photos"], 2, 'unknown run "pngs/sdla"; did you mean "pngs/slda"?'),
        (["0" * 32, "photos"], 2, f'unknown run "{"0" * 32}"; there are: '),
        (["pngs/slda", "photos/deep/none"], 9, "photos/deep/none: not found"),
        (["pngs/slda", "photos/*.jpg"], 9, "photos/*.jpg: no images found (PNG, JPEG, WEBP, BMP, "),
        (["pngs/slda", "http://x/y.png"], 2, 'protocol "http" not supported'),
        (["pngs/slda", "photos", "--output", "x.txt"], 2, "--output x.txt: must end in .parquet"),
        (["pngs/slda"], 2, "missing argument 'IMAGES'; see graftwork predict -h"),
    ],
)
def test_mistakes_take_one_line(call: Command, words: list[str], code: int, line: str) -> None:
    done = call(*words)
    assert (done.code, done.out) == (code, "")
    [said] = [part for part in done.err.splitlines() if part.startswith("error: ")]
    assert said.startswith(f"error: {line}")


def test_a_pipeline_is_no_method(made: Made, call: Command) -> None:
    done = call(made.document["mlflow"]["run_id"], "photos")
    assert done.code == 2
    assert "is no method's run; name one of" in done.err and "pngs/l2p" in done.err


def test_a_run_without_a_model_says_why(made: Made, call: Command, tmp_path: Path) -> None:
    here.run(made.folder / "spec.yaml", tmp_path / "s", "methods=[slda]", "tracking.models=none")
    done = call("pngs/slda", "photos", "--tracking", f"sqlite:///{tmp_path}/s/mlflow.db")
    assert done.code == 2
    assert "has no model: none was kept (tracking.models of the spec)" in done.err


def test_images_of_a_size_that_the_backbone_does_not_take(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(made.model("slda"), folder)
    about = json.loads((folder / "model.json").read_text())
    about["preprocessing"] |= {"resize": None, "crop": None}
    (folder / "model.json").write_text(json.dumps(about))
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16)).save(buffer, "PNG")
    found = list(serving.Predictor(folder).scores([buffer.getvalue(), "gone", None]))
    assert found == ["has 20x16 pixels, the backbone takes 16x16", "gone", "no image bytes"]


# --- on Ray -----------------------------------------------------------------------------------


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    """A model of random class means on the backbone that comes with the package."""
    model = "vit_micro_patch4_32"
    network = loading.load(model, place_of(model, "builtin"), "token")
    classes = ["ant", "bee", "cat"]
    predictor = {
        "kind": "fitted",
        "method": {"name": "simplecil", "version": 1, "hyperparameters": {}},
        "seed": 0,
        "state": "state.safetensors",
        "learned": [2, 0, 1],
        "graft": None,
        "keeps_frozen": False,
    }
    about = {
        "format": 1,
        "predictor": predictor,
        "columns": [0, 1, 2],
        "classes": classes,
        "backbone": {
            "model": model,
            "weights": "builtin",
            "pooling": "token",
            "fingerprint": weights.fingerprint(network),
            "image_size": None,
        },
        "preprocessing": resolve("micro_32").to_json(),
        "size": 32,
        "precision": "fp32",
        "dtype": "float16",
    }
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(about))
    means = torch.randn(3, network.num_features, generator=torch.Generator().manual_seed(0))
    save_file({"prototypes": means}, folder / "state.safetensors")
    return folder


def test_served_images_become_pixels_as_those_of_a_pipeline_do(micro: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    grey = Image.fromarray(values)
    grey.save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(values.astype(np.uint16) * 256).save(tmp_path / "c.tif")
    grey.save(tmp_path / "d.bmp")
    Image.merge("LA", [grey, grey]).save(tmp_path / "e.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tiff")
    predictor = serving.Predictor(micro)
    [shard] = inputs.find([str(tmp_path / "*.[pbt]*")]).shards()
    *alike, refused = inference.predict(predictor, shard, 3)
    assert len(alike) == 5
    assert {prediction.best for prediction in alike} == {alike[0].best}
    assert refused.problem.startswith("floating point (mode F), which has no range")


def test_ray_gives_the_same_in_the_same_order(micro: Path, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(pngs.png(number, label=number % 6))
    (tmp_path / "4.png").write_bytes(b"nonsense")
    wanted = inputs.find([str(tmp_path / "*.png")])
    predictor = serving.Predictor(micro)
    alone = [p for s in wanted.shards(2) for p in inference.predict(predictor, s, 2)]
    given: dict[str, Any] = {"address": None, "insecure": False, "device": "cpu", "weights": None}
    shards = list(remote.predict(micro, wanted.shards(2), 2, **given))
    assert [len(shard) for shard in shards] == [2, 2, 2, 2, 1]
    assert [p for shard in shards for p in shard] == alone
    assert [p.problem for p in alone].count(
        "not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text"
    ) == 1
