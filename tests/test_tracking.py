"""Tracking: everything arrives once, whoever dies, and the run never waits."""

import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.operators.errors import ConfigError
from graftwork.operators.tracking import records
from graftwork.operators.tracking.journal import Journal
from graftwork.operators.tracking.sender import SETTINGS, connect
from graftwork.operators.tracking.tracker import MethodRun, Tracker
from graftwork.operators.tracking.uri import artifact_root, check, default_uri, mask

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "src"), str(ROOT)]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    path = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    if not path.exists():
        connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    for part in empty_database.parent.glob(f"{empty_database.name}*"):
        shutil.copy(part, tmp_path / part.name.replace(empty_database.name, "mlflow.db"))
    return default_uri(tmp_path)


def method_run(number: int, **changes: Any) -> MethodRun:
    fields: dict[str, Any] = {
        "key": f"key{number}",
        "name": f"simplecil order={number} seed=0",
        "params": {"method": "simplecil", "order": number, "seed": 0},
        "metrics": {"a_avg": 80.0 + number, "seconds": 0.25, "bwt": None},
        "curves": {"accuracy": [90.0, 80.0 + number], "accuracy_macro_task": [90.0, 81.0]},
        "dataset": ("cifar100", "ab" * 32),
    }
    return MethodRun(**(fields | changes))


def folder_of(run: Any) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def runs_of(uri: str, experiment: str = "exp") -> list[Any]:
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def methods_of(uri: str) -> dict[str, Any]:
    """Method runs by name; fails when a name is there twice."""
    found = [r for r in runs_of(uri) if r.data.tags["graftwork.kind"] == "method"]
    names = [r.info.run_name for r in found]
    assert len(set(names)) == len(names), sorted(names)
    return dict(zip(names, found, strict=True))


def test_the_tree_of_runs(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    tracker.check()
    spec = {"spec.yaml": "a: 1", "deep/x.json": b"{}"}
    tracker.start("run 1", {"backbone": "vit", "spec": "x" * 7000}, {"host": "h"}, spec)
    tracker.stage("fit 0", 2.0, {"rows": 5, "device": "cpu"}, method="key0")
    tracker.stage("features 1/1", 3.0, {"images_forwarded": 50})
    tracker.stage("dataset", 0.01, {})
    tracker.method_run(method_run(0, artifacts=lambda: {"plots/curve.svg": "<svg/>"}))
    tracker.log(metrics={"images_forwarded": 50}, artifacts={"report.html": "<html>"})
    left: list[int] = []
    ids = tracker.finish("FINISHED", progress=left.append)
    assert (ids.unsent, ids.problem, left[-1]) == (0, "", 0)
    assert not list((tmp_path / "journal").glob("*.jsonl"))

    client = connect(uri)
    assert ids.run_id is not None
    pipeline: Any = client.get_run(ids.run_id)
    method: Any = client.get_run(ids.methods["key0"])
    assert (pipeline.info.run_name, pipeline.info.status) == ("run 1", "FINISHED")
    assert pipeline.data.params["backbone"] == "vit"
    assert pipeline.data.params["spec"].endswith("(all of it in params/spec.txt)")
    folder = folder_of(pipeline)
    assert folder.is_relative_to(tmp_path / "mlflow-artifacts")
    assert (folder / "params/spec.txt").read_text() == "x" * 7000
    assert (folder / "report.html").exists() and (folder / "deep/x.json").exists()
    table = (folder / "stages.csv").read_text().splitlines()
    assert table[0] == "stage,state,seconds,facts" and len(table) == 4
    assert pipeline.data.metrics == {"images_forwarded": 50}

    assert method.data.tags["mlflow.parentRunId"] == ids.run_id
    assert method.data.tags["cache"] == "miss"
    assert method.data.metrics == {
        "a_avg": 80.0,
        "seconds": 0.25,
        "accuracy": 80.0,
        "accuracy_macro_task": 81.0,
    }
    history = client.get_metric_history(method.info.run_id, "accuracy")
    assert sorted((m.step, m.value) for m in history) == [(0, 90.0), (1, 80.0)]
    assert method.info.end_time - method.info.start_time == 250
    assert method.inputs.dataset_inputs[0].dataset.name == "cifar100"
    curve = folder_of(method) / "plots/curve.svg"
    assert curve.read_text() == "<svg/>"
    stages = {r.info.run_name: r for r in runs_of(uri) if r.data.tags["graftwork.kind"] == "stage"}
    parents = {name: r.data.tags["mlflow.parentRunId"] for name, r in stages.items()}
    assert parents == {"fit 0": method.info.run_id, "features 1/1": ids.run_id}
    assert stages["fit 0"].data.params == {"device": "cpu"}

    # A run from the store points to the one that computed the result.
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    tracker.start("run 2", {}, {}, {})
    tracker.method_run(method_run(0, cached=True))
    again = tracker.finish("FAILED")
    hit = client.get_run(again.methods["key0"])
    assert hit.data.tags["cache"] == "hit"
    assert hit.data.tags["producer_run_id"] == ids.methods["key0"]
    assert connect(uri).get_run(str(again.run_id)).info.status == "FAILED"


def test_artifacts_that_cannot_be_made_cost_only_themselves(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    tracker.start("run", {}, {}, {})
    with pytest.raises(ValueError, match=r"must be a relative path, got '\.\./x'"):
        tracker.log(artifacts={"../x": ""})
    tracker.method_run(method_run(0, artifacts=lambda: {"a": str(1 // 0)}))
    tracker.method_run(method_run(1))
    assert tracker.finish("FINISHED").unsent == 0
    assert "could not be made" in caplog.text
    assert len(methods_of(uri)) == 2


def test_a_record_that_mlflow_refuses_does_not_stop_the_rest(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    tracker.start("run", {"a": "1"}, {}, {})
    # A parameter cannot be changed.
    tracker._append(records.data("pipeline", params={"a": "2"}))
    tracker.method_run(method_run(0))
    ids = tracker.finish("FINISHED")
    assert (ids.unsent, len(methods_of(uri))) == (0, 1)
    assert len(list((tmp_path / "journal").glob("*.rejected"))) == 1


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from graftwork.operators.tracking import journal, tracker as tracking
from graftwork.operators.tracking.tracker import MethodRun, Tracker

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

{fault}
tracker = Tracker({uri!r}, "exp", Path({folder!r}))
tracker.start("killed", {{}}, {{}}, {{"spec.yaml": "a: 1"}})
for i in range(3):
    tracker.method_run(MethodRun(key=f"key{{i}}", name=f"m{{i}}", params={{"method": "x"}},
        metrics={{"a_avg": float(i)}}, curves={{"accuracy": [1.0, 2.0]}}))
{last}
tracker.finish("FINISHED")
"""

FAULTS = {
    # Everything is in the journal, nothing was sent.
    "before anything is sent": ("tracking.connect = lambda uri: time.sleep(60)", "die()"),
    # The second method's run exists, the journal does not know it.
    "between MLflow and the journal": (
        "plain = journal.Journal.acknowledge\n"
        "def acknowledge(self, number, *args, **kwargs):\n"
        "    die() if number == 5 else plain(self, number, *args, **kwargs)\n"
        "journal.Journal.acknowledge = acknowledge",
        "time.sleep(60)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_killed_run_left_is_sent_once(uri: str, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "journal"
    patch, last = FAULTS[fault]
    code = KILLED.format(paths=PATHS, fault=patch, uri=uri, folder=str(folder), last=last)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    journal = next(folder.glob("*.jsonl"))
    with journal.open("ab") as file:
        file.write(b'[99,{"kind":"ba')  # the line it was writing
    for _ in range(2):  # the second one finds nothing to do
        tracker = Tracker(uri, "exp", folder)
        tracker.start("next", {}, {}, {})
        assert tracker.finish("FINISHED").unsent == 0
    methods = methods_of(uri)
    assert {name: run.data.metrics["a_avg"] for name, run in methods.items()} == {
        "m0": 0.0,
        "m1": 1.0,
        "m2": 2.0,
    }
    client = connect(uri)
    for run in methods.values():
        assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 2
        assert run.info.status == "FINISHED"
    pipelines = [r for r in runs_of(uri) if r.data.tags["graftwork.kind"] == "pipeline"]
    statuses = sorted((r.info.run_name, r.info.status) for r in pipelines)
    assert statuses == [("killed", "KILLED"), ("next", "FINISHED"), ("next", "FINISHED")]
    killed = next(r for r in pipelines if r.info.run_name == "killed")
    assert {r.data.tags["mlflow.parentRunId"] for r in methods.values()} == {killed.info.run_id}
    assert not list(folder.glob("*.jsonl")) + list(folder.glob("*.files"))


def test_the_environment_is_settled_before_the_thread_starts(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    begin, settled = tracker._thread.start, []

    def start() -> None:
        settled.append(SETTINGS.keys() <= os.environ.keys())
        begin()

    monkeypatch.setattr(tracker._thread, "start", start)
    tracker.start("run", {}, {}, {})
    tracker.finish("FINISHED")
    assert settled == [True]


Serve = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def server(uri: str, tmp_path: Path) -> Iterator[tuple[str, Serve]]:
    """URL of an `mlflow server`, and a function that starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri]
        command += ["--artifacts-destination", str(tmp_path / "served")]
        quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        quiet["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes for other uses
        with (tmp_path / "server.log").open("ab") as out:
            process = subprocess.Popen(
                command, env=quiet, stdout=out, stderr=out, start_new_session=True
            )
        started.append(process)
        limit = time.monotonic() + 90
        while time.monotonic() < limit:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                return process
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError((tmp_path / "server.log").read_text())

    yield url, start
    for process in started:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a server with its workers, which are alone in their session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_server_that_dies_and_returns(
    server: tuple[str, Serve], uri: str, tmp_path: Path
) -> None:
    url, start = server
    process = start()
    tracker = Tracker(url, "exp", tmp_path / "journal")
    tracker.check()
    tracker.start("run", {}, {}, {})
    for i in range(5):
        tracker.method_run(method_run(i))
    # Killed while it is being written to: some operations have an effect and no answer.
    wait_until(lambda: "r2" in tracker._sender.runs if tracker._sender else False)
    kill(process)
    begin = time.monotonic()
    for i in range(5, 10):
        tracker.method_run(method_run(i, artifacts={"a.txt": "a"}))
    assert time.monotonic() - begin < 0.5  # the run does not wait
    wait_until(lambda: bool(tracker.problem))

    # It stays away: the run ends, and says what is missing.
    begin = time.monotonic()
    ids = tracker.finish("FINISHED", patience=1.0)
    assert time.monotonic() - begin < 12
    assert ids.unsent > 0 and url in ids.problem
    assert list((tmp_path / "journal").glob("*.jsonl"))

    # It returns: the next run delivers what the last one could not.
    start()
    tracker = Tracker(url, "exp", tmp_path / "journal")
    tracker.start("next", {}, {}, {})
    tracker.method_run(method_run(10))
    assert tracker.finish("FINISHED", patience=30).unsent == 0
    methods = methods_of(uri)
    assert len(methods) == 11
    client = connect(uri)
    for i in range(11):
        run = methods[f"simplecil order={i} seed=0"]
        assert run.data.metrics["a_avg"] == 80.0 + i
        assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 2
    assert len(list((tmp_path / "served").rglob("a.txt"))) == 5
    statuses = sorted(r.info.status for r in runs_of(uri))
    assert statuses == ["FINISHED"] * 13


def test_a_locked_database_delays_but_loses_nothing(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "exp", tmp_path / "journal")
    tracker.start("run", {}, {}, {})
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        for i in range(3):
            tracker.method_run(method_run(i))
        assert time.monotonic() - begin < 0.2
        time.sleep(0.5)
        other.execute("ROLLBACK")
    other.close()
    assert tracker.finish("FINISHED").unsent == 0
    assert len(methods_of(uri)) == 3


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://user:hunter2@127.0.0.1:9", "Connection refused"),
        ("postgresql://user:hunter2@127.0.0.1:9/db", "Connection refused"),
        ("http://192.0.2.1:5000", ""),  # an address that never answers
        ("sqlite://", "names no file"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file"),
        ("file:///tmp/mlruns", "'file' is not one of sqlite"),
        ("mlruns", "is not one of sqlite"),
    ],
)
def test_a_wrong_uri_is_an_error_within_five_seconds(address: str, reason: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check(address)
    assert time.monotonic() - begin < 5
    message = str(caught.value)
    assert message.startswith(f"tracking: cannot reach {mask(address)}: ")
    assert reason in message and message.endswith("; start it, or pass another --tracking")
    assert "hunter2" not in message and "\n" not in message


def test_something_else_that_answers_is_not_mlflow(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="HTTP 404, which is not MLflow's answer"):
            check(f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    damaged = tmp_path / "mlflow.db"
    damaged.write_text("not a database, though long enough")
    with pytest.raises(ConfigError, match="not an SQLite database"):
        check(default_uri(tmp_path))


class Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        return


def test_passwords_stay_out_of_journals_and_messages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter2"
    tracker = Tracker(f"http://user:{secret}@127.0.0.1:9", "exp", tmp_path)
    tracker.start("run", {}, {}, {"a": "b"})
    ids = tracker.finish("FAILED", patience=0.1)
    assert ids.unsent == 4 and ids.run_id is None
    assert "***@127.0.0.1:9" in ids.problem and secret not in ids.problem + caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


def test_only_whole_unheld_journals_are_orphans(tmp_path: Path) -> None:
    held = Journal.create(tmp_path, {"n": 0})
    held.append({"kind": "a"}, {"kind": "b"})
    assert list(Journal.orphans(tmp_path)) == []
    held.acknowledge(0, "answer")
    held.release()
    with held.path.open("ab") as file:
        file.write(b"[2,{")
    (orphan,) = Journal.orphans(tmp_path)
    assert orphan.answered() == [({"kind": "a"}, "answer")]
    entry = orphan.next()
    assert entry is not None and entry.seen and entry.operation == {"kind": "b"}
    orphan.append({"kind": "c"})
    orphan.acknowledge(1)
    assert orphan.unsent == 1
    orphan.close()  # kept: not all was sent
    (orphan,) = Journal.orphans(tmp_path)
    assert [op["kind"] for op in orphan.operations()] == ["a", "b", "c"]
    orphan.acknowledge(2)
    orphan.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_the_numbers_stay_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(tmp_path, {})
    journal.append({"kind": "a"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:4]))
    with pytest.raises(OSError, match="No space left"):
        journal.append({"kind": "b"})
    monkeypatch.undo()
    journal.append({"kind": "c"})
    kinds = [op["kind"] for op in journal.operations()]
    assert (kinds, journal.unsent) == (["a", "b", "c"], 3)  # what is in memory is still sent
    journal.release()
    (orphan,) = Journal.orphans(tmp_path)
    assert [op["kind"] for op in orphan.operations()] == ["a", "lost", "c"]
    orphan.acknowledge(0)
    entry = orphan.next()
    assert entry is not None and (entry.number, entry.operation["kind"]) == (2, "c")
    orphan.release()


def test_batches_keep_mlflows_limits() -> None:
    operations = records.data(
        "r",
        metrics={f"m{i}": 1.0 for i in range(1700)} | {"none": None, "inf": float("inf")},
        params={f"p{i}": "x" for i in range(250)},
        tags={"a b\n": "x" * 9000},
    )
    assert [len(op["metrics"]) for op in operations] == [800, 800, 100]
    assert [len(op["params"]) for op in operations] == [100, 100, 50]
    assert operations[0]["tags"] == {"a b_": "x" * 8000}
    short, long = records.params({"a/b": [1, 2], "k" * 300: 1, "text": "y" * 6001})
    assert short["a/b"] == "[1, 2]" and short["k" * 250] == "1"
    assert long == {"params/text.txt": "y" * 6001}
    assert json.loads(json.dumps(operations)) == operations


def test_places(tmp_path: Path) -> None:
    store = tmp_path / "a b"
    assert default_uri(store) == f"sqlite:///{store}/mlflow.db"
    assert artifact_root(default_uri(store)) == (store / "mlflow-artifacts").as_uri()
    assert artifact_root("http://host") is None
    assert mask("https://u:p@host/x?token=1") == "https://***@host/x"
