"""MLflow's database in a file: looked at before it is used, made whole, moved with its folder.

MLflow fills a new database table by table, and none of it can be told from a finished one but by
the revision that is written last. So a new one is filled elsewhere and appears whole; one that a
process left half-made is set aside and made anew. Places of files are absolute in MLflow's tables:
where the folder was moved or copied, they are made those of the folder as it is now.
"""

import contextlib
import enum
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from graftwork.operators.files.appear import appear

ARTIFACTS = "mlflow-artifacts"
"""Folder of the files of runs, beside the database."""

CHECKED = 64 << 20
"""Bytes up to which all pages of a database are looked at before it is used."""

FILLING = 120.0
"""Seconds to wait for another process that fills the same database."""


PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
"""Errors of a database that another process writes to."""


class State(enum.Enum):
    """Condition of a database file."""

    ABSENT = "nothing is there"
    HALF_MADE = "a process died while it was filled; it holds nothing yet"
    OLDER = "its tables are those of an older MLflow"
    NEWER = "its tables are those of a newer MLflow"
    FOREIGN = "it belongs to another program"
    CURRENT = "it can be used"


def quoted(path: Path) -> str:
    """The path as it stands in an `sqlite:///` URI."""
    return re.sub(r"[%?#\x00-\x1f]", lambda found: f"%{ord(found[0]):02X}", str(path))


def problem(path: Path, reading: bool = False) -> tuple[str, str]:
    """Reason why a database cannot be used, empty if it can, and what to do about it, if known.

    Imports nothing of MLflow.

    Args:
        reading: nothing will be written.

    Raises:
        OSError: the folder cannot be made, or the file be read.
    """
    if path.is_dir():
        return "it is a folder", ""
    if not path.exists() and path.is_symlink():
        return f"it is a link to nothing, {os.readlink(path)}", ""
    if path.exists() and not path.is_file():
        return "it is no file", ""
    if not reading:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not all(os.access(p, os.W_OK) for p in (path, path.parent) if p.exists()):
            return "no permission to write", ""
    if not path.exists() or not path.stat().st_size:
        return "", ""
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            return "the file is not an SQLite database", ""
    name = shlex.quote(str(path))
    try:
        state, revision = _look(path)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in PASSING:
            return "", ""  # somebody writes; records wait for that
        aside = f"mv {name} {shlex.quote(f'{path}.damaged')}"
        again = "run again, which sends everything from the store"
        return f"the database is damaged ({error})", f"move it away ({aside}) and {again}"
    reason = f"{state.value} (revision {revision})"
    if state is State.OLDER:
        command = f"mlflow db upgrade {shlex.quote(f'sqlite:///{quoted(path)}')}"
        return reason, f"back it up and bring it up to date ({command})"
    if state is State.NEWER:
        return reason, "update mlflow"
    return (state.value, "") if state is State.FOREIGN else ("", "")


def settle(path: Path) -> None:
    """Makes a database that can be written: builds one where there is none, and moves its places.

    Raises:
        OSError: the folder cannot be written.
        sqlite3.Error: the database cannot be used now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (State.ABSENT, State.HALF_MADE)
    if _look(path)[0] in unfinished:
        with _alone(path):
            state = _look(path)[0]
            if state is State.HALF_MADE:
                _set_aside(path)
            if state in unfinished:
                _build(path)
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
        # Three times as many runs per second, and people can read meanwhile.
        database.execute("PRAGMA journal_mode=WAL")
    move_places(path, path.parent / ARTIFACTS)


@contextlib.contextmanager
def copied(path: Path) -> Iterator[Path]:
    """A copy of a database that cannot be written, with its places made those of the folder."""
    with tempfile.TemporaryDirectory(prefix="graftwork-mlflow-") as folder:
        copy = Path(folder, path.name)
        for end in ("", "-wal", "-journal"):
            if (source := path.with_name(path.name + end)).exists():
                shutil.copyfile(source, copy.with_name(path.name + end))
        move_places(copy, path.parent / ARTIFACTS)
        yield copy


def move_places(path: Path, root: Path) -> None:
    """Makes the places of files those below `root`, where the folder was moved or copied.

    Places that are still there, and not below `root`, stay: then only the database was moved.
    """
    here = root.absolute().as_uri()
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database, database:
        changes: list[tuple[str, str, str, str | int]] = []
        for number, place in database.execute(
            "SELECT experiment_id, artifact_location FROM experiments"
        ).fetchall():
            if str(place).endswith(f"/{ARTIFACTS}") and _moved(place, here):
                changes.append(("experiments SET artifact_location", "experiment_id", here, number))
        for run, place in database.execute(
            "SELECT run_uuid, artifact_uri FROM runs WHERE substr(artifact_uri, 1, ?) <> ?",
            (len(here), here),
        ).fetchall():
            end = f"/{run}/artifacts"
            if str(place).endswith(f"/{ARTIFACTS}{end}") and _moved(place, here + end):
                changes.append(("runs SET artifact_uri", "run_uuid", here + end, run))
        for column, key, new, value in changes:
            database.execute(f"UPDATE {column} = ? WHERE {key} = ?", (new, value))


def _moved(old: str, new: str) -> bool:
    """Tells whether files of one URI are to be looked for at another one."""
    if old == new or not old.startswith("file:"):
        return False
    there = Path(urllib.parse.unquote(urllib.parse.urlsplit(old).path))
    here = Path(urllib.parse.unquote(urllib.parse.urlsplit(new).path))
    try:
        return not there.exists() or (here.exists() and not there.samefile(here))
    except OSError:
        return False


def alive(path: Path) -> set[str]:
    """Ids of all runs that are not deleted."""
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
        rows = database.execute("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'")
        return {run for (run,) in rows}


def _look(path: Path) -> tuple[State, str]:
    """Condition of a database, and its revision.

    Raises:
        sqlite3.Error: it is damaged, or somebody locked it.
    """
    if not path.exists():
        return State.ABSENT, ""
    if not path.stat().st_size:
        return State.HALF_MADE, ""
    # Where nothing can be written SQLite cannot share, and has to be told that nobody else writes.
    # Elsewhere it has to be able to undo what a process left half-done that was killed.
    writable = os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)
    mode = "mode=rw" if writable else "mode=ro&immutable=1"
    place = f"file:{urllib.parse.quote(str(path.absolute()))}?{mode}"
    with contextlib.closing(sqlite3.connect(place, uri=True, timeout=1)) as database:
        tables = {
            t for (t,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        }
        if path.stat().st_size <= CHECKED:
            [(verdict,)] = database.execute("PRAGMA quick_check(1)").fetchall()
            if verdict != "ok":
                raise sqlite3.DatabaseError(" ".join(str(verdict).split()))
        marks = {"experiments", "alembic_version"}
        if tables and not tables & marks:
            return State.FOREIGN, ""
        rows = (
            database.execute("SELECT * FROM alembic_version").fetchall()
            if ("alembic_version" in tables)
            else []
        )
        revision = str(rows[0][0]) if rows else ""
        newest, known = revisions()
        if not newest or revision == newest:
            return State.CURRENT, revision
        if revision and revision not in known:
            return State.NEWER, revision
        holds = (
            ("runs", "SELECT 1 FROM runs LIMIT 1"),
            ("registered_models", "SELECT 1 FROM registered_models LIMIT 1"),
            ("experiments", "SELECT 1 FROM experiments WHERE name <> 'Default' LIMIT 1"),
        )
        for table, question in holds:
            if table in tables and database.execute(question).fetchone():
                return State.OLDER, revision or "none"
        return State.HALF_MADE, revision


@lru_cache(maxsize=1)
def revisions() -> tuple[str, frozenset[str]]:
    """The newest revision of the installed MLflow's tables, and all of them.

    Read from its files: to import them takes seconds. Empty if they are not as they are today.
    """
    package = importlib.util.find_spec("mlflow")
    places = (package and package.submodule_search_locations) or []
    known: set[str] = set()
    before: set[str] = set()
    for place in places:
        for file in Path(place, "store/db_migrations/versions").glob("*.py"):
            text = file.read_text(encoding="utf-8", errors="replace")
            known |= set(re.findall(r"(?m)^revision\b[^=\n]*=\s*[\"'](\w+)[\"']", text))
            for line in re.findall(r"(?m)^down_revision\b[^=\n]*=(.*)$", text):
                before |= set(re.findall(r"[\"'](\w+)[\"']", line))
    newest = known - before
    return (newest.pop(), frozenset(known)) if len(newest) == 1 else ("", frozenset())


def _build(path: Path) -> None:
    """Fills a new database elsewhere, and lets it appear whole."""
    from mlflow.tracking import MlflowClient

    _remove_leftovers(path)
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with tempfile.TemporaryDirectory(prefix="graftwork-mlflow-") as folder:
            fresh = Path(folder, "mlflow.db")
            MlflowClient(tracking_uri=f"sqlite:///{quoted(fresh)}").search_experiments(
                max_results=1
            )
            with (
                contextlib.closing(sqlite3.connect(fresh)) as source,
                contextlib.closing(sqlite3.connect(whole)) as target,
            ):
                source.backup(target)
        appear(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes what processes left that died while they built a database."""
    for old in path.parent.glob(f".{path.name}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(f"{path.name}.half-made"))
    for end in ("-wal", "-shm", "-journal"):  # of no use without it, and harmful to another one
        path.with_name(path.name + end).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds MLflow's own lock for filling a database, as far as it can be had."""
    url = f"sqlite:///{quoted(path)}"
    name = hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(f"{tempfile.gettempdir()}/db_init_lock-{name}", "a"))
            limit = time.monotonic() + FILLING
            while time.monotonic() < limit:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield
