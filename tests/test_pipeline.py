"""The whole program on a real local Ray: caching, resuming, damage, two runs at once."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from graftwork.operators.formats.predictions import read
from graftwork.operators.store import Store
from graftwork.pipelines import cli
from tests.processes import started
from tests.test_report import cost_table

ROOT = Path(__file__).parent.parent
VARIABLES = ("MLFLOW_TRACKING_URI", "GRAFTWORK_STORE", "RAY_ADDRESS")
METHODS = ["simplecil", "slda", "fecam", "acil", {"ranpac": {"projection_dim": 64}}, "joint_linear"]


def write_images(path: Path, per_class: int, seed: int) -> None:
    """Six classes of 16x16 images: noise around a colour and a stripe of the class's own."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in range(6):
        for _ in range(per_class):
            pixels = rng.integers(0, 120, (16, 16, 3))
            pixels[2 * label : 2 * label + 3, :, label % 3] += 100
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            images.append(buffer.getvalue())
            labels.append(label)
    order = rng.permutation(len(labels))
    table = {
        "image": pa.array([images[i] for i in order], pa.binary()),
        "label": pa.array([labels[i] for i in order], pa.int16()),
    }
    pq.write_table(pa.table(table), path, row_group_size=20)


def write_spec(folder: Path, **changes: Any) -> Path:
    spec = {
        "pipeline": "stripes",
        "dataset": {"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")},
        "scenario": {"kind": "class_incremental", "increment": 2, "orders": [1993]},
        "backbone": {
            "model": "vit_micro_patch4_32",
            "weights": str(folder / "weights.safetensors"),
            "preprocessing": "micro_32",
        },
        "features": {"shard_size": 24},
        "methods": METHODS,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    write_images(folder / "train.parquet", 20, 0)
    write_images(folder / "test.parquet", 8, 1)
    weights = ROOT / "operators/backbones/shipped/vit_micro_patch4_32.safetensors"
    shutil.copy(weights, folder / "weights.safetensors")
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "graftwork.pipelines", *words]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in VARIABLES}


def ask(*words: str, code: int = 0) -> Any:
    """What a command prints that starts no Ray; here, as a new process takes seconds to import."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["graftwork", *words, "--json"])
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert (ended.value.code or 0) == code
    return json.loads(out.getvalue())


def seconds_of(shown: str) -> float:
    """A time as the report shows it: `1.2 s`, `1 min 3 s`, `2 h 5 min`."""
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (h|min|s)", shown))


def run(spec: Path, store: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        command("run", str(spec), "--store", str(store), "--json", *words),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def substance(document: dict[str, Any]) -> list[Any]:
    """What must be equal, bit for bit, whatever happened on the way."""
    names = ("method", "order", "seed", "matrix", "curve", "a_last", "a_avg", "forgetting")
    return [[result[name] for name in names] for result in document["results"]]


def predictions(store: Path) -> dict[str, bytes]:
    opened = Store(str(store))
    return {
        key: b"".join(column.tobytes() for column in read(opened, "evaluate", key).values())
        for key in opened.keys("evaluate")
    }


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run of all methods, after a run of simplecil alone."""
    store = tmp_path_factory.mktemp("first")
    alone = run(write_spec(data, methods=["simplecil"]), store)
    assert alone["images_forwarded"] == 6 * 28
    assert alone["stages"]["cached"] == 0
    return store, run(write_spec(data), store)


def test_features_are_computed_once_for_all_methods(first: tuple[Path, dict[str, Any]]) -> None:
    _, document = first
    assert document["status"] == "succeeded"
    assert document["images_forwarded"] == 0
    assert len(document["results"]) == len(METHODS)
    for result in document["results"]:
        assert [len(row) for row in result["matrix"]] == [1, 2, 3]
        assert result["curve"][-1] == result["a_last"]
        assert result["mlflow_run_id"]
        assert result["a_last"] > 50  # chance is 17 %
    total, computed = document["stages"]["total"], document["stages"]["computed"]
    assert document["stages"]["cached"] == total - computed > 0


def test_other_orders_increments_and_seeds_forward_no_image(
    data: Path, first: tuple[Path, dict[str, Any]]
) -> None:
    scenario = {"kind": "class_incremental", "initial": 3, "increment": 1, "orders": [1993, 7]}
    changed = write_spec(data, scenario=scenario, seeds=[0, 1])
    document = run(changed, first[0])
    assert document["images_forwarded"] == 0
    assert len(document["results"]) == len(METHODS) * 4
    by_method = {(r["method"], r["order"], r["seed"]): r["a_last"] for r in document["results"]}
    # Exact methods end where they end, whatever the order of the classes was.
    for method in ("simplecil", "slda", "fecam", "acil"):
        assert len({v for (m, _, _), v in by_method.items() if m == method}) == 1


def test_a_finished_run_again_starts_neither_ray_nor_torch(
    data: Path, first: tuple[Path, dict[str, Any]]
) -> None:
    store, document = first
    spec = write_spec(data)
    code = (
        "import sys\n"
        f"sys.argv = ['graftwork', 'run', {str(spec)!r}, '--store', {str(store)!r}, '--json']\n"
        "from graftwork.pipelines import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print([m for m in ('torch', 'ray', 'timm') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stderr.strip().endswith("[]")
    again = json.loads(done.stdout)
    assert again["stages"]["computed"] == 0
    assert substance(again) == substance(document)


def test_the_report_says_what_each_method_took_and_what_is_shared(
    data: Path, tmp_path: Path
) -> None:
    recipe = {"epochs": 1, "batch_size": 20, "augmentation": "none"}
    methods = ["simplecil", "slda", {"finetune": recipe}, {"aper_finetune": dict(recipe)}]
    spec, store = write_spec(
        data,
        methods=methods,
        merge=[{"ema": {"of": "finetune"}}],
        ensemble=[{"mean_prob": {"of": ["slda", "finetune"]}}],
    ), tmp_path / "store"  # fmt: skip
    training, test, tasks = 6 * 20, 6 * 8, 3
    predictions = sum(test * (task + 1) // tasks for task in range(tasks))
    images = {
        "simplecil": 0,
        "slda": 0,
        "finetune": training + predictions,
        "aper_finetune": training // tasks + training + test,  # a session, and features after it
        "ema of finetune over tasks": predictions,
        "mean_prob of slda and finetune over methods": 0,
        "Shareddataset, features": training + test,
    }

    def costs() -> dict[str, tuple[float, float, int, int]]:
        rows = cost_table((store / "reports/stripes.html").read_text())
        return {
            name: (seconds_of(row[0]), seconds_of(row[1]), int(row[2]), int(row[3]))
            for name, row in rows.items()
        }

    document = run(spec, store)
    first = costs()
    whole = sum(images.values())
    assert document["images_forwarded"] == whole
    assert {name: row[2:] for name, row in first.items()} == {
        name: (count, count) for name, count in {**images, "All": whole}.items()
    }
    # Times as the manifests have them, by the labels of the stages.
    manifests = [json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")]
    seconds = dict.fromkeys(images, 0.0)
    for manifest in manifests:
        label = manifest["label"].replace("adapted features", "features aper_finetune order")
        name = re.sub(r"^\w+ | order .*| seed .*", "", label)
        seconds[name if name in images else "Shareddataset, features"] += manifest["seconds"]
    seconds["All"] = sum(manifest["seconds"] for manifest in manifests)
    for name, (now, ever, *_) in first.items():
        # Tenths are shown below a minute, whole seconds from there on.
        shown = 0.051 if seconds[name] < 59.9 else 0.51
        assert now == ever == pytest.approx(seconds[name], abs=shown), name
    assert min(first[name][0] for name in ("finetune", "aper_finetune")) > 0

    # Everything from the store: nothing now, and in all what it was.
    assert run(spec, store)["images_forwarded"] == 0
    assert costs() == {name: (0.0, row[1], 0, row[3]) for name, row in first.items()}
    # What was cleared away is said.
    [cleared, *_] = (m for m in manifests if m["label"].startswith("features test"))
    shutil.rmtree(store / "features" / cleared["key"])
    run(spec, store)
    gone = cleared["facts"]["images_forwarded"]
    assert costs()["Shareddataset, features"][2:] == (0, training + test - gone)
    assert "no longer knows what 1 stage took" in (store / "reports/stripes.html").read_text()


def test_plan_says_why_something_is_not_stored(
    data: Path, first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    store = str(first[0])

    def reasons(spec: Path, *words: str) -> dict[str, str]:
        plan = ask("plan", str(spec), "--store", store, *words)
        return {row["stage"]: row["why"] for row in plan["stages"] if row["status"] == "miss"}

    spec = write_spec(data)
    assert reasons(spec) == {}
    assert (
        "preprocessing.resize"
        in reasons(
            spec,
            "--set",
            "backbone.preprocessing={resize: 40, crop: 32, mean: [0,0,0], std: [1,1,1]}",
        )["features train 1/5"]
    )

    changed = shutil.copytree(data, tmp_path / "data")
    table = pq.read_table(changed / "train.parquet")
    images = table["image"].to_pylist()
    picture = Image.open(io.BytesIO(images[30]))
    picture.putpixel((3, 3), (1, 2, 3))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    images[30] = buffer.getvalue()
    pq.write_table(
        table.set_column(0, "image", pa.array(images, pa.binary())), changed / "train.parquet"
    )
    why = reasons(write_spec(changed))
    # One pixel: its own shard, nothing else of the features.
    assert [name for name in why if name.startswith("features")] == ["features train 2/5"]
    assert why["features train 2/5"].startswith("image bytes")

    weights = bytearray((data / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "other.safetensors").write_bytes(weights)
    why = reasons(spec, "--set", f"backbone.weights={tmp_path / 'other.safetensors'}")
    assert why["features test 1/2"].startswith("backbone weights")


def test_a_driver_killed_twice_loses_nothing(
    data: Path, first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    spec, store, moments = write_spec(data), tmp_path / "store", random.Random(0)
    words = command("run", str(spec), "--store", str(store), "--json")

    def stored() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in store.glob("*/*/manifest.json")}

    before: dict[Path, int] = {}
    for _ in range(2):
        with started(words, cwd=ROOT, env=environment()) as driver:
            # Soon after the next committed stage: much later, all of them might be stored.
            until = time.monotonic() + 120
            while stored().keys() <= before.keys():
                assert driver.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.2))
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
        now = stored()
        assert before.items() < now.items()  # it went on, and did nothing twice
        before = now
    document = run(spec, store)
    assert before.items() <= stored().items()
    assert substance(document) == substance(first[1])
    expected = predictions(first[0])
    for key, columns in predictions(store).items():
        assert columns == expected[key]


def test_damaged_and_missing_shards_are_computed_again(
    data: Path, first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    store = shutil.copytree(first[0], tmp_path / "store")
    shards = sorted(store.glob("features/*/features.parquet.*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    flipped = bytearray(shards[1].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    shards[1].write_bytes(flipped)
    shutil.rmtree(shards[2].parent)
    plan = ask("plan", str(write_spec(data)), "--store", str(store))
    key = next(row["key"] for row in plan["stages"] if row["operator"] == "evaluate")
    [result] = (store / "evaluate" / key).glob("predictions.parquet.*")
    result.write_bytes(result.read_bytes()[:-1])
    for folder in ("fit", "evaluate"):
        for stage in store.glob(f"{folder}/*"):
            if stage != result.parent:
                shutil.rmtree(stage)
    report = ask("cache", "verify", "--store", str(store), code=6)
    assert len(report["damaged"]) == 3
    document = run(write_spec(data), store)
    assert document["images_forwarded"] == 72
    assert substance(document) == substance(first[1])
    assert len(list((store / "quarantine").iterdir())) == 3
    assert ask("cache", "verify", "--store", str(store))["damaged"] == []


def test_two_runs_at_once_share_a_store(
    data: Path, first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = command("run", str(write_spec(data)), "--store", str(tmp_path), "--json")
    with ExitStack() as stack:
        runs = [
            stack.enter_context(started(words, cwd=ROOT, env=environment(), text=True))
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=200) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    for out, _ in outputs:
        assert substance(json.loads(out)) == substance(first[1])
    for stage in tmp_path.glob("features/*"):
        assert len(list(stage.iterdir())) == 2  # one manifest, one shard
    assert predictions(tmp_path).items() <= predictions(first[0]).items()
