"""MLflow's database: made whole, rebuilt when it was left half-made, moved with its folder."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graftwork.operators.errors import ConfigError
from graftwork.operators.serving import lookup
from graftwork.operators.tracking import database
from graftwork.operators.tracking.database import ARTIFACTS, State
from graftwork.operators.tracking.records import MODEL
from graftwork.operators.tracking.sender import connect
from graftwork.operators.tracking.tracker import MethodRun, RunIds, Tracker
from graftwork.operators.tracking.uri import check, default_uri, sqlite_path
from graftwork.pipelines.reporting.leaderboard import leaderboard
from tests.test_tracking import PATHS

FILL = "import sys; from mlflow.tracking import MlflowClient; "
FILL += "MlflowClient('sqlite:///' + sys.argv[1]).search_experiments()"
CONNECT = "import sys; from graftwork.operators.tracking.sender import connect; "
CONNECT += "connect('sqlite:///' + sys.argv[1])"
MODEL_JSON = b'{"predictor": 1}'
FILES = {
    "predictions.parquet": b"rows",
    "model/MLmodel": b"flavors",
    "model/data/model.json": MODEL_JSON,
}


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs, made once: it takes seconds."""
    path = tmp_path_factory.getbasetemp() / "database-template.db"
    if not path.exists():
        database.settle(path)
        with closing(sqlite3.connect(path)) as opened:
            opened.execute("PRAGMA journal_mode=DELETE")  # one file, to be copied
    return path


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    shutil.copy(filled, tmp_path / "store/mlflow.db")
    return tmp_path / "store"


def record(store: Path, cached: bool, uri: str | None = None) -> RunIds:
    """Runs a pipeline of one method, which may be stored already."""
    made = MethodRun(
        key="key",
        name="slda · order 1 · seed 0",
        params={"method": "slda", "order": "1", "seed": 0},
        metrics={"a_avg": 80.0},
        tags={MODEL: "abc123", "graftwork.label": "slda"},
        artifacts=lambda: FILES,
        files=["predictions.parquet", "model/MLmodel"],
        cached=cached,
    )
    tracker = Tracker(uri or default_uri(store), "pipe", store / "journal")
    tracker.check()
    tracker.start("now", {}, {}, {})
    tracker.method_run(made)
    ids = tracker.finish("FINISHED", patience=30)
    assert not ids.unsent and not ids.problem
    return ids


def held(store: Path) -> str:
    """Run that holds the model of the newest result; its files are those of this folder."""
    found = lookup.find(default_uri(store), "pipe/slda")
    with tempfile.TemporaryDirectory() as folder:
        brought = lookup.fetch(default_uri(store), found, Path(folder))
        assert (brought / "model.json").read_bytes() == MODEL_JSON
    return found.held_by


def kept(store: Path, run: str) -> bool:
    """Tells whether a folder has the model's files of a run."""
    return (store / ARTIFACTS / run / "artifacts/model/data/model.json").exists()


def places(store: Path) -> list[str]:
    with closing(sqlite3.connect(store / "mlflow.db")) as opened:
        runs = opened.execute("SELECT artifact_uri FROM runs").fetchall()
        experiments = opened.execute("SELECT artifact_location FROM experiments WHERE name='pipe'")
        return [place for (place,) in [*runs, *experiments]]


# --- half-made, foreign, damaged ------------------------------------------------------------------


def test_the_revisions_are_those_that_mlflow_itself_tells(filled: Path) -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    newest, known = database.revisions()
    assert newest == _get_latest_schema_revision() and newest in known and len(known) > 50
    assert database._look(filled) == (State.CURRENT, newest)


def older(path: Path, revision: str = "451aebb31d03") -> None:
    with closing(sqlite3.connect(path)) as opened, opened:
        opened.execute("UPDATE alembic_version SET version_num = ?", (revision,))


HALF: dict[str, Callable[[Path], Any]] = {
    "empty file": lambda path: path.write_bytes(b""),
    "before the last revision": older,
    "without a revision": lambda path: _sql(path, "DROP TABLE alembic_version"),
    "revision not written": lambda path: _sql(path, "DELETE FROM alembic_version"),
    "first tables only": lambda path: _only(path, ["experiments", "runs", "tags"]),
    "a header only": lambda path: _only(path, []),
}


def _sql(path: Path, *commands: str) -> None:
    with closing(sqlite3.connect(path)) as opened, opened:
        for command in commands:
            opened.execute(command)


def _only(path: Path, tables: list[str]) -> None:
    path.unlink()
    _sql(path, "PRAGMA journal_mode=WAL")
    _sql(path, *(f"CREATE TABLE {table} (name TEXT)" for table in tables))


@pytest.mark.parametrize("name", HALF)
def test_a_half_made_database_is_rebuilt(
    store: Path, filled: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = store / "mlflow.db"
    HALF[name](path)
    monkeypatch.setattr(database, "_build", lambda path: shutil.copy(filled, path))
    check(default_uri(store))
    assert database._look(path)[0] is not State.CURRENT
    database.settle(path)
    assert database._look(path)[0] is State.CURRENT
    run = record(store, cached=False).methods["key"]
    assert held(store) == run and kept(store, run)


def test_an_older_database_with_runs_is_named_with_the_command(store: Path) -> None:
    record(store, cached=False)
    older(store / "mlflow.db")
    with pytest.raises(ConfigError) as caught:
        check(default_uri(store))
    assert "those of an older MLflow (revision 451aebb31d03); back it up and bring it up" in str(
        caught.value
    )
    assert f"(mlflow db upgrade sqlite:///{store}/mlflow.db), or pass another" in str(caught.value)


def test_a_newer_database_is_named(store: Path) -> None:
    older(store / "mlflow.db", "ffffffffffff")
    with pytest.raises(ConfigError, match=r"newer MLflow \(revision ffffffffffff\); update mlflow"):
        check(default_uri(store))


def test_a_damaged_database_is_named_with_the_command(store: Path) -> None:
    record(store, cached=False)
    path = store / "mlflow.db"
    _sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[8192:200_000] = bytes(200_000 - 8192)
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"damaged .*; move it away \(mv .*/mlflow.db .*damaged\)"
    ):
        check(default_uri(store))
    os.replace(path, store / "mlflow.db.damaged")
    path.with_name("mlflow.db-wal").unlink(missing_ok=True)


def test_what_is_no_database_of_mlflow_is_left_alone(tmp_path: Path) -> None:
    _sql(tmp_path / "mlflow.db", "CREATE TABLE notes (text TEXT)")
    with pytest.raises(ConfigError, match="belongs to another program"):
        check(default_uri(tmp_path))
    os.mkfifo(tmp_path / "pipe.db")
    with pytest.raises(ConfigError, match="it is no file"):
        check(f"sqlite:///{tmp_path}/pipe.db")
    (tmp_path / "link.db").symlink_to("nowhere.db")
    with pytest.raises(ConfigError, match=r"a link to nothing, nowhere\.db"):
        check(f"sqlite:///{tmp_path}/link.db")


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # gone since it was listed
        return 0


def killed(code: str, path: Path, bytes_there: int, seconds: float) -> None:
    """Runs code that makes a database, and kills it once so many bytes are there."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        stderr=subprocess.DEVNULL,
    )
    folder = path.parent
    while process.poll() is None:
        if max(map(size, folder.glob("*mlflow.db*")), default=0) >= bytes_there:
            time.sleep(seconds)
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_process_killed_while_it_fills_a_database_costs_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "mlflow.db"
    killed(FILL, path, rng.randrange(1, 400_000), rng.random() * 0.05)
    assert path.exists() and database._look(path)[0] is State.HALF_MADE
    check(default_uri(tmp_path))
    database.settle(path)
    assert database._look(path)[0] is State.CURRENT
    assert (tmp_path / "mlflow.db.half-made").exists()
    assert [e.name for e in connect(default_uri(tmp_path)).search_experiments()] == ["Default"]


def test_our_own_database_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    killed(CONNECT, path, 1, 0.0)
    assert database._look(path)[0] in (State.ABSENT, State.CURRENT)


# --- moved ----------------------------------------------------------------------------------------


def test_a_moved_store_predicts_and_records_in_its_new_place(store: Path, tmp_path: Path) -> None:
    first = record(store, cached=False).methods["key"]
    moved = tmp_path / "else where%20"
    os.rename(store, moved)
    assert held(moved) == first and kept(moved, first)
    record(moved, cached=True)
    assert held(moved) == first and kept(moved, first)  # it was not sent twice
    assert all(place.startswith(moved.as_uri()) for place in places(moved))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else where%20"]


def test_a_copied_store_no_longer_writes_into_the_first(store: Path, tmp_path: Path) -> None:
    first = record(store, cached=False).methods["key"]
    before = sorted(store.rglob("*"))
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    record(copy, cached=True)
    assert held(copy) == first and kept(copy, first)
    assert sorted(store.rglob("*")) == before
    assert held(store) == first and kept(store, first)


def test_a_store_seen_under_two_names_keeps_its_places(store: Path, tmp_path: Path) -> None:
    first = record(store, cached=False).methods["key"]
    (tmp_path / "link").symlink_to(store)
    record(tmp_path / "link", cached=True)
    assert places(store)[0].startswith(store.as_uri())
    assert held(tmp_path / "link") == first


def test_a_database_moved_alone_finds_the_files_where_they_are(store: Path, tmp_path: Path) -> None:
    first = record(store, cached=False).methods["key"]
    (tmp_path / "new").mkdir()
    for part in store.glob("mlflow.db*"):
        os.rename(part, tmp_path / "new" / part.name)
    assert held(tmp_path / "new") == first and kept(store, first)


def test_records_on_their_way_follow_a_moved_store(store: Path, tmp_path: Path) -> None:
    tracker = Tracker(default_uri(store), "pipe", store / "journal")
    before = tracker._address()
    moved = tmp_path / "moved"
    assert Tracker(default_uri(moved), "pipe", moved / "journal")._address() == before
    assert Tracker("http://host", "pipe", moved / "journal")._address() != before


def test_a_store_that_cannot_be_written_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record(store, cached=False).methods["key"]
    moved = tmp_path / "moved"
    os.rename(store, moved)
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*")}
    writable = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and writable(p, mode))
    assert held(moved) == first and kept(moved, first)
    assert [row.method for row in leaderboard(default_uri(moved))] == ["slda"]
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("*")} == before
    with pytest.raises(ConfigError, match="no permission to write"):
        check(default_uri(moved))


@pytest.mark.parametrize(
    "name", ["a%20b", "a?b", "a#b", "a b", "数据", "100%", "a:b;c&d", "new\nline"]
)
def test_every_path_can_hold_a_store(store: Path, tmp_path: Path, name: str) -> None:
    odd = tmp_path / name
    os.rename(store, odd)
    assert sqlite_path(default_uri(odd)) == odd / "mlflow.db"
    first = record(odd, cached=False).methods["key"]
    assert held(odd) == first and kept(odd, first)
    assert [row.method for row in leaderboard(default_uri(odd))] == ["slda"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- lost -----------------------------------------------------------------------------------------


def delete_run(store: Path, run: str) -> None:
    connect(default_uri(store)).delete_run(run)


def purge_run(store: Path, run: str) -> None:
    """What `mlflow gc` does."""
    delete_run(store, run)
    for table in ("metrics", "latest_metrics", "params", "tags", "inputs", "runs"):
        column = "source_id" if table == "inputs" else "run_uuid"
        _sql(store / "mlflow.db", f"DELETE FROM {table} WHERE {column} = '{run}'")
    shutil.rmtree(store / ARTIFACTS / run)


def lose_database(store: Path) -> Path:
    """Removes it; elsewhere, as this process still has the old one open under its name."""
    for path in store.glob("mlflow.db*"):
        path.unlink()
    return store.rename(store.with_name("again"))


LOST: dict[str, Callable[[Path, str], Path | None]] = {
    "deleted": delete_run,
    "purged": purge_run,
    "all files": lambda store, run: shutil.rmtree(store / ARTIFACTS),
    "its model": lambda store, run: shutil.rmtree(store / ARTIFACTS / run / "artifacts/model"),
    "its predictions": lambda store, run: os.remove(
        store / ARTIFACTS / run / "artifacts/predictions.parquet"
    ),
    "the database": lambda store, run: lose_database(store),
    "the experiment": lambda store, run: connect(default_uri(store)).delete_experiment("1"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_mlflow_lost_is_sent_again(
    store: Path, filled: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(database, "_build", lambda path: shutil.copy(filled, path))
    first = record(store, cached=False).methods["key"]
    store = LOST[what](store, first) or store
    second = record(store, cached=True).methods["key"]
    run = held(store)
    assert run in (first, second) and kept(store, run)
    files = store / ARTIFACTS / run / "artifacts/predictions.parquet"
    assert files.read_bytes() == b"rows"
    # Once is enough.
    third = record(store, cached=True).methods["key"]
    assert not (store / ARTIFACTS / third).exists() and held(store) == run


def test_predict_says_what_brings_back_a_model(store: Path) -> None:
    first = record(store, cached=False).methods["key"]
    record(store, cached=True)
    assert first
    purge_run(store, first)
    with pytest.raises(ConfigError, match="has not got its files; run the pipeline again"):
        lookup.find(default_uri(store), "pipe/slda")
