"""Sends the operations of a journal to MLflow, each as often as it takes and with one effect.

Metrics, parameters, tags, inputs, files and the end of a run have the same effect when sent twice
(times come from the journal). Only making a run has not: it carries the tag `EVENT`, and an
operation that may have been sent before looks for that tag first.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.operators.errors import ConfigError
from graftwork.operators.tracking import database
from graftwork.operators.tracking.journal import Entry, Journal
from graftwork.operators.tracking.records import MODEL, MODEL_FILE
from graftwork.operators.tracking.uri import artifact_root, sqlite_path

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EVENT = "graftwork.event"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Keeps the UI from asking people which kind of experiment this is."""

FOR_GOOD = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
"""MLflow's codes for what is refused no matter how often it is sent."""

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # MLflow's own eight tries block for four minutes; the journal is what tries again here.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


CANDIDATES = 20
"""Runs that are asked for what a result needs, of those that may have it."""

UPLOAD_SECONDS = "120"
"""Seconds that a server gets to answer after each file."""


class Rejected(Exception):
    """MLflow will never take this operation; the message says why."""


def settle_environment() -> None:
    """Sets the variables that MLflow reads, as far as the user has not.

    To be called before other threads run. A new variable can move the whole environment in memory
    while a thread of C or C++ looks something up there, which ends the process with SIGSEGV; and
    Ray starts such threads.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> "MlflowClient":
    """A client that is quiet and gives up on a call after four seconds.

    Takes seconds the first time: MLflow is imported, and a new database is filled with tables.

    Raises:
        ConfigError: SQLAlchemy cannot name the database's file.
        OSError, sqlite3.Error: the database cannot be used now.
    """
    settle_environment()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri)
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, "connect", _relax):
        event.listen(Engine, "connect", _relax)
    database.settle(path)
    return MlflowClient(tracking_uri=as_sqlalchemy(path))


@contextlib.contextmanager
def reading(uri: str) -> "Iterator[MlflowClient]":
    """A client for looking, also at a database that cannot be written."""
    path = sqlite_path(uri)
    if path is None or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        yield connect(uri)
        return
    with database.copied(path) as copy:
        yield connect(f"sqlite:///{database.quoted(copy)}")  # a copy's own folder is writable


def as_sqlalchemy(path: Path) -> str:
    """The URI of a database's file; SQLAlchemy takes %25 for % from its version 2.1 on.

    Raises:
        ConfigError: it has none.
    """
    if (quoted := database.quoted(path)) == str(path):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import make_url

    for name in (quoted, str(path)):
        # With the driver's name MLflow makes no folder of the path as it is spelled here.
        uri = f"sqlite+pysqlite:///{name}"
        if make_url(uri).database == str(path):
            return uri
    raise ConfigError(
        f"{path}: SQLAlchemy cannot open it; use a path without % ? #", key="tracking"
    )


def _relax(connection: Any, _record: Any) -> None:
    """Lets a power cut lose the last records, but not damage the database."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Waits longer for a server: it answers an upload only when it has stored the file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = UPLOAD_SECONDS
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Producers:
    """Remembers which run computed a result: asking MLflow costs more than all the rest of a run.

    Args:
        path: a file with a line `key run_id` each; the last one of a key holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] | None = None

    def recall(self, key: str) -> str | None:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError):
                lines = self._path.read_text().splitlines()
                self._known = {k: v for k, _, v in (line.partition(" ") for line in lines) if v}
        return self._known.get(key)

    def remember(self, key: str, run_id: str) -> None:
        self.recall(key)
        assert self._known is not None
        self._known[key] = run_id
        # Several processes append; a line that is lost only costs a question to MLflow.
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(f"{key} {run_id}\n")


def _produced(key: str, model: str | None) -> str:
    """Name under which a producer is remembered: the result's key, and its model's digest."""
    return f"{key}:{model}" if model else key


class Sender:
    """Sends operations of one journal; knows the MLflow ids of the runs it made.

    Args:
        client: from `connect`.
        journal: where the operations and earlier answers are.
        uri: MLflow's tracking URI, of which `client` is.
    """

    def __init__(self, client: "MlflowClient", journal: Journal, uri: str) -> None:
        self._client = client
        self._journal = journal
        self._root = artifact_root(uri)
        self._database = sqlite_path(uri)
        self._alive: set[str] | None = None
        self.experiment_id: str | None = None
        address = journal.header["tracking"][:12]
        self._producers = Producers(journal.path.parent / f"producers-{address}.txt")
        self.runs: dict[str, str] = {}
        self.orphans: set[str] = set()
        """Runs with results from the store, when MLflow does not know which run computed them."""
        for operation, answer in journal.answered():
            if operation["kind"] == "run" and answer:
                self.runs[operation["run"]] = answer

    def send(self, entry: Entry, *, again: bool) -> Any:
        """Sends one operation and returns what is worth keeping of the answer.

        Args:
            again: an attempt before may have succeeded without our knowing.

        Raises:
            Rejected: it is pointless to try again.
            Exception: whatever MLflow's client raises when the server is away or busy.
        """
        from mlflow.exceptions import MlflowException

        operation = entry.operation
        try:
            if operation["kind"] == "run":
                return self._start(entry, again or entry.seen)
            if operation["run"] not in self.runs:
                raise Rejected(f"run {operation['run']} was never made")
            getattr(self, f"_{operation['kind']}")(self.runs[operation["run"]], operation)
        except MlflowException as error:
            if error.error_code in FOR_GOOD:
                raise Rejected(str(error)) from error
            raise
        except (ImportError, FileNotFoundError, PermissionError) as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error
        return None

    def experiment(self) -> str:
        """Id of the journal's experiment, which is made or taken back from the bin if need be."""
        from mlflow.exceptions import MlflowException

        if self.experiment_id is not None:
            return self.experiment_id
        name = self._journal.header["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                made = self._client.create_experiment(name, self._root, EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self.experiment()  # made by another process since we looked
            self.experiment_id = made
            return made
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        self.experiment_id = found.experiment_id
        return found.experiment_id

    def _start(self, entry: Entry, again: bool) -> str:
        operation = entry.operation
        event = f"{self._journal.id}:{entry.number}"
        experiment = self.experiment()
        found = None
        if again:
            runs = self._client.search_runs([experiment], f"tags.`{EVENT}` = '{event}'")
            found = runs[0].info.run_id if runs else None
        if found is None:
            tags = operation["tags"] | {EVENT: event}
            if operation["parent"] in self.runs:
                tags["mlflow.parentRunId"] = self.runs[operation["parent"]]
            if operation.get("produced_by"):
                producer = self._producer(experiment, operation)
                tags |= producer
                if not producer:
                    self.orphans.add(operation["run"])
            run = self._client.create_run(
                experiment, start_time=operation["start"], tags=tags, run_name=operation["name"]
            )
            found = run.info.run_id
        self.runs[operation["run"]] = found
        # The run that brings the files of a stored result stands in for the one that computed it.
        if operation["tags"].get("cache") == "miss" or operation["run"] in self.orphans:
            tags = operation["tags"]
            self._producers.remember(_produced(tags["graftwork.key"], tags.get(MODEL)), found)
        return found

    def _producer(self, experiment: str, operation: dict[str, Any]) -> dict[str, str]:
        """Tag with a run that computed a result and still holds its files, if there is one.

        Its model has to be the one that would be recorded now: one that names a loader of an older
        program stands in for none.
        """
        key, model = operation["produced_by"], operation["tags"].get(MODEL)
        files = operation.get("files", [])
        known = self._producers.recall(_produced(key, model))
        if known and self._holds(experiment, known, files, model):
            return {"producer_run_id": known}
        wanted = f"tags.`graftwork.key` = '{key}' AND tags.cache = 'miss'"
        if model:
            wanted += f" AND tags.`{MODEL}` = '{model}'"
        for run in self._client.search_runs([experiment], wanted, max_results=CANDIDATES):
            if self._holds(experiment, run.info.run_id, files, model):
                return {"producer_run_id": run.info.run_id}
        return {}

    def _holds(self, experiment: str, run: str, files: list[str], model: str | None) -> bool:
        """Tells whether a run is there, with files; a model's may be in another one's hands."""
        if not self._is_active(run):
            return False
        missing = [name for name in files if not self._has_file(run, name)]
        if not model or missing != [MODEL_FILE]:
            return not missing
        wanted = f"tags.`{MODEL}` = '{model}'"
        others = self._client.search_runs([experiment], wanted, max_results=CANDIDATES)
        return any(self._has_file(other.info.run_id, MODEL_FILE) for other in others)

    def _is_active(self, run: str) -> bool:
        """Tells whether MLflow has a run that was not deleted. A database is asked once for all."""
        from mlflow.exceptions import MlflowException

        if self._database is not None:
            if self._alive is None:
                self._alive = database.alive(self._database)
            return run in self._alive
        try:
            return self._client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _has_file(self, run: str, name: str) -> bool:
        if self._database is not None:
            folder = self._database.parent / database.ARTIFACTS / run / "artifacts"
            if (folder / name).exists():
                return True
        above = name.rpartition("/")[0] or None
        return any(item.path == name for item in self._client.list_artifacts(run, above))

    def _batch(self, run: str, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._client.log_batch(
            run,
            metrics=[Metric(k, v, t, step) for k, v, t, step in operation["metrics"]],
            params=[Param(k, v) for k, v in operation["params"].items()],
            tags=[RunTag(k, v) for k, v in operation["tags"].items()],
        )

    def _input(self, run: str, operation: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(operation["name"], operation["digest"], "local", operation["source"])
        context = InputTag("mlflow.data.context", operation["context"])
        self._client.log_inputs(run, [DatasetInput(dataset, [context])])

    def _files(self, run: str, operation: dict[str, Any]) -> None:
        folder = self._journal.files / operation["path"]
        with _patient():
            self._client.log_artifacts(run, str(folder))

    def _end(self, run: str, operation: dict[str, Any]) -> None:
        self._client.set_terminated(run, operation["status"], operation["time"])
