"""Finds the model of a run that MLflow knows."""

import difflib
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.operators.errors import ConfigError, StorageError
from graftwork.operators.serving.model_files import FOLDER
from graftwork.operators.tracking import uri as tracking_uri
from graftwork.operators.tracking.records import MODEL, MODEL_FILE, TASK, VOTES

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# By its end: a run begins, for MLflow, before all that its result is made of, which may be old.
NEWEST = ["attributes.end_time DESC"]
METHOD = "tags.`graftwork.kind` = 'method' AND attributes.status = 'FINISHED'"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model of a run.

    Args:
        run_id: MLflow's id of the run that was asked for.
        name: its name in MLflow.
        pipeline: name of its experiment.
        held_by: id of the run that holds the model's files, often the same.
        task: name of the last task that it learned; empty if nobody recorded it.
    """

    run_id: str
    name: str
    pipeline: str
    held_by: str
    task: str


def find(uri: str, run: str) -> Found:
    """The model of a run.

    Args:
        uri: MLflow's tracking URI.
        run: MLflow's id of a method's run, or `PIPELINE/LABEL` for the newest one of a method or
            of its label in the leaderboard.

    Raises:
        ConfigError: MLflow cannot be reached, there is no such run, or it has no model.
    """
    with connected(uri) as client:
        return _find(client, run)


def _find(client: "MlflowClient", run: str) -> Found:
    chosen = _by_name(client, run) if "/" in run else _by_id(client, run)
    pipeline = client.get_experiment(chosen.info.experiment_id).name
    kept = chosen.data.tags.get(MODEL)
    for holder in _holders(client, chosen, kept):
        if _holds_model(client, holder):
            return Found(
                run_id=chosen.info.run_id,
                name=chosen.info.run_name or "",
                pipeline=pipeline,
                held_by=holder,
                task=chosen.data.tags.get(TASK, ""),
            )
    if chosen.data.tags.get(VOTES):
        why = "it decides an image by those beside it in the test batch, so that none is kept"
    elif kept:
        why = (
            "MLflow has not got its files; run the pipeline again, which sends them from the store"
        )
    else:
        why = "none was kept (tracking.models of the spec)"
    raise ConfigError(f"{run}: {chosen.info.run_name} has no model: {why}")


def _holds_model(client: "MlflowClient", run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return any(item.path == MODEL_FILE for item in client.list_artifacts(run, FOLDER))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False  # deleted for good


def fetch(uri: str, found: Found, folder: Path) -> Path:
    """The model's folder `data` on this machine.

    Args:
        folder: for the files, where MLflow does not keep them on this machine.

    Raises:
        StorageError: the files cannot be had.
    """
    from mlflow.exceptions import MlflowException

    with connected(uri) as client:
        try:
            return Path(client.download_artifacts(found.held_by, f"{FOLDER}/data", str(folder)))
        except (MlflowException, OSError) as error:
            raise StorageError(f"model of run {found.held_by}: {_in_short(error)}") from error


@contextmanager
def connected(uri: str) -> Iterator["MlflowClient"]:
    """A client for looking, of an MLflow that answers.

    Raises:
        ConfigError: it does not, or nothing was recorded yet.
        StorageError: it cannot answer a question.
    """
    tracking_uri.check(uri, reading=True)
    path = tracking_uri.sqlite_path(uri)
    if path is not None and not path.exists():
        raise ConfigError(f"nothing recorded in {path} yet; start with `graftwork run`")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from graftwork.operators.tracking.sender import reading

    try:
        with reading(uri) as client:
            yield client
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        shown = tracking_uri.mask(uri)
        raise StorageError(f"MLflow at {shown}: {_in_short(error)}", key="tracking") from error


def _in_short(error: Exception) -> str:
    return tracking_uri.mask_all(" ".join(str(error).split())[:200]) or type(error).__name__


def pages(search: Any, *args: Any, **kwargs: Any) -> Iterable[Any]:
    """Everything that a paged search of MLflow's client finds."""
    token = None
    while True:
        page = search(*args, page_token=token, **kwargs)
        yield from page
        token = page.token
        if not token:
            return


def _holders(client: "MlflowClient", run: Any, model: str | None) -> Iterator[str]:
    """Runs that may hold the model: the run, the one that computed it, others with its model."""
    yield run.info.run_id
    if producer := run.data.tags.get("producer_run_id"):
        yield producer
    if model:
        wanted = f"tags.`{MODEL}` = '{model}'"
        for other in pages(client.search_runs, [run.info.experiment_id], wanted):
            yield other.info.run_id


def _by_id(client: "MlflowClient", identifier: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(identifier) if re.fullmatch(r"[0-9a-f]{32}", identifier) else None
    except MlflowException:
        found = None
    if found is None:
        raise ConfigError(f'unknown run "{identifier}"{_near(identifier, _names(client))}')
    if found.data.tags.get("graftwork.kind") != "method":
        pipeline = client.get_experiment(found.info.experiment_id).name
        names = [n for n in _names(client) if n.startswith(f"{pipeline}/")]
        raise ConfigError(f"{identifier}: is no method's run; name one of {_some(names)}")
    return found


def _by_name(client: "MlflowClient", name: str) -> Any:
    pipeline, _, label = name.partition("/")
    experiment = client.get_experiment_by_name(pipeline)
    if experiment is not None:
        for run in pages(client.search_runs, [experiment.experiment_id], METHOD, order_by=NEWEST):
            if label in (_label(run), run.data.params.get("method")):
                return run
    raise ConfigError(f'unknown run "{name}"{_near(name, _names(client))}')


def _label(run: Any) -> str:
    return run.data.tags.get("graftwork.label", run.data.params.get("method", ""))


def _names(client: "MlflowClient") -> list[str]:
    """`PIPELINE/LABEL` of all finished methods' runs, newest first, each once."""
    experiments = {e.experiment_id: e.name for e in pages(client.search_experiments)}
    runs = pages(client.search_runs, list(experiments), METHOD, order_by=NEWEST)
    return list(dict.fromkeys(f"{experiments[r.info.experiment_id]}/{_label(r)}" for r in runs))


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], known, 1)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; there are: {_some(known)}" if known else "; nothing was recorded yet"


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
