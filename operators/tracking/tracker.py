"""Records a run in MLflow without ever making it wait.

Everything is first appended to a journal on the local disk; a thread sends the journal to MLflow.
When MLflow goes away the run goes on, and what could not be sent is sent by the next `Tracker` on
the same folder, once. Nothing here touches MLflow's global state: every run is named by its id.

    pipeline run                        graftwork.kind=pipeline
    |- method, class order, seed        graftwork.kind=method, graftwork.key, cache=hit|miss
    |  `- a stage that cost time        graftwork.kind=stage
    `- a stage that cost time
"""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.operators.errors import StorageError
from graftwork.operators.tracking import records
from graftwork.operators.tracking import uri as tracking_uri
from graftwork.operators.tracking.journal import (
    NO_LOCKS,
    Journal,
    Operation,
    on_this_machine,
)
from graftwork.operators.tracking.records import Artifacts, MethodRun, RunIds, StageRun
from graftwork.operators.tracking.sender import Rejected, Sender, connect, settle_environment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["MethodRun", "RunIds", "Tracker"]

log = logging.getLogger("graftwork.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]

NESTED_SECONDS = 1.0
"""A stage that took less is a line of `stages.csv` only: a nested run costs tens of ms."""


class Tracker:
    """One pipeline run in MLflow. Its methods return at once and may be called by any thread.

    Args:
        uri: MLflow's tracking URI.
        experiment: the pipeline's name.
        folder: for journals, on a local disk; shared by all runs that belong to one store.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri, self.experiment, self.folder = uri, experiment, folder
        self._home = folder.absolute().parent
        self.problem = ""
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._runs: dict[str, str] = {}  # MethodRun.key -> name of its run in the journal
        self._count = 0
        self._stages: list[StageRun] = []
        self._early: dict[str, list[StageRun]] = {}  # stages whose method run is still to come
        self._jobs: list[tuple[str, Callable[[], Artifacts]]] = []
        self._spare: list[tuple[str, Callable[[], Artifacts]]] = []  # perhaps held by another run
        self._lock = threading.RLock()
        self._wake, self._closing, self._stop = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def check(self) -> None:
        """Makes sure within five seconds that MLflow can be reached.

        Raises:
            ConfigError: it cannot.
        """
        tracking_uri.check(self.uri)

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        artifacts: Artifacts,
    ) -> None:
        """Begins the pipeline run, and the thread that sends.

        Raises:
            StorageError: the journal cannot be made.
        """
        header = {"tracking": self._address(), "experiment": self.experiment}
        try:
            try:
                self._journal = Journal.create(self.folder, header)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self.folder = on_this_machine()
                self._journal = Journal.create(self.folder, header)
        except OSError as error:
            raise StorageError(f"cannot write the journal: {error}", key="tracking") from error
        tags = {**tags, "graftwork.kind": "pipeline"}
        short, long = records.params(params)
        first = records.start("pipeline", None, name, tags, records.now())
        self._append([first, *records.data("pipeline", params=short)])
        self._save("pipeline", {**artifacts, **long})
        settle_environment()
        self._thread.start()

    def log(
        self,
        *,
        metrics: Mapping[str, float | None] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Artifacts | Callable[[], Artifacts] | None = None,
    ) -> None:
        """Adds to the pipeline run."""
        self._append(records.data("pipeline", metrics=metrics, tags=tags))
        self._attach("pipeline", artifacts or {})

    def method_run(self, run: MethodRun) -> None:
        """Records one result as a child of the pipeline run."""
        with self._lock:
            name = self._new_name()
            operations, long = records.method(name, run)
            self._append(operations)
            self._runs[run.key] = name
            early = self._early.pop(run.key, [])
        self._save(name, long)
        if run.cached and callable(run.artifacts):
            with self._lock:
                self._spare.append((name, run.artifacts))
            self._wake.set()
        else:
            self._attach(name, run.artifacts)
        for stage in early:
            self._nest(stage, name)

    def stage(
        self,
        name: str,
        seconds: float,
        facts: Mapping[str, Any],
        *,
        cached: bool = False,
        method: str | None = None,
    ) -> None:
        """Records a stage: a line of `stages.csv`, and a nested run if it was computed and slow.

        Args:
            facts: numbers become metrics of the nested run, the rest its parameters.
            method: `MethodRun.key` of the run it belongs to, which may come later.
        """
        stage = StageRun(
            name=name, seconds=seconds, facts=dict(facts), cached=cached, end=records.now()
        )
        with self._lock:
            self._stages.append(stage)
            if cached or seconds < NESTED_SECONDS:
                return
            parent = "pipeline" if method is None else self._runs.get(method)
            if parent is None:
                self._early.setdefault(str(method), []).append(stage)
                return
        self._nest(stage, parent)

    def finish(
        self,
        status: Status,
        *,
        patience: float = 10.0,
        progress: Callable[[int], None] | None = None,
    ) -> RunIds:
        """Ends the pipeline run and waits until everything is sent, or MLflow seems gone.

        Args:
            patience: seconds to wait for an MLflow that does not answer.
            progress: called about ten times a second with the number of operations to go.
        """
        journal = self._open()
        for stage in [stage for stages in self._early.values() for stage in stages]:
            self._nest(stage, "pipeline")
        self._save("pipeline", {"stages.csv": records.stages_csv(self._stages)})
        self._append([records.end("pipeline", status, records.now())])
        self._closing.set()
        self._wake.set()
        left, since = journal.unsent, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if progress:
                progress(journal.unsent)
            if journal.unsent != left:
                left, since = journal.unsent, time.monotonic()
            # Without an error it is only slow: a new database takes seconds. A user who
            # stopped the run does not wait for that: the next run sends the rest.
            patient = not self.problem and status != "KILLED"
            if time.monotonic() - since > (max(patience, 120.0) if patient else patience):
                break
        self._stop.set()
        self._wake.set()
        self._thread.join(0.5 if status == "KILLED" else 5.0)
        unsent = journal.unsent + len(self._jobs)
        if not self._thread.is_alive():
            journal.close()
        runs = dict(self._sender.runs) if self._sender else {}
        return RunIds(
            experiment_id=self._sender.experiment_id if self._sender else None,
            run_id=runs.get("pipeline"),
            methods={key: runs[name] for key, name in self._runs.items() if name in runs},
            unsent=unsent,
            problem=self.problem if unsent else "",
        )

    # Into the journal.

    def _open(self) -> Journal:
        assert self._journal is not None, "start() comes first"
        return self._journal

    def _address(self) -> str:
        """Digest of the URI, to compare it: the URI itself may hold a password.

        That of a database beside the journals is the same wherever both are moved.
        """
        path = tracking_uri.sqlite_path(self.uri)
        beside = path is not None and path.absolute().parent == self._home
        name = f"sqlite beside: {path.name}" if path is not None and beside else self.uri
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    def _addresses(self) -> set[str]:
        """The same, and what earlier programs wrote."""
        before = hashlib.sha256(self.uri.encode(errors="surrogateescape")).hexdigest()
        return {self._address(), before}

    def _new_name(self) -> str:
        with self._lock:
            self._count += 1
            return f"r{self._count}"

    def _nest(self, stage: StageRun, parent: str) -> None:
        name = self._new_name()
        operations, long = records.stage(name, parent, stage)
        self._append(operations)
        self._save(name, long)

    def _attach(self, run: str, artifacts: Artifacts | Callable[[], Artifacts]) -> None:
        if callable(artifacts):
            with self._lock:
                self._jobs.append((run, artifacts))
            self._wake.set()
        else:
            self._save(run, artifacts)

    def _save(self, run: str, artifacts: Artifacts) -> None:
        """Saves files of a run: first to disk, then an operation that names their folder."""
        if not artifacts:
            return
        records.check_file_names(artifacts)
        folder = f"{run}-{self._new_name()}"
        try:
            for name, content in artifacts.items():
                path = self._open().files / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if callable(content):
                    content(path)
                else:
                    path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            self._warn(f"artifacts are lost, the journal's disk refuses them: {error}")
            return
        self._append([records.files(run, folder)])

    def _append(self, operations: Sequence[Operation]) -> None:
        try:
            self._open().append(*operations)
        except OSError as error:
            self._warn(f"the journal's disk refuses it, records live in memory only: {error}")
        self._wake.set()

    def _warn(self, problem: str) -> None:
        problem = tracking_uri.mask_all(problem)
        if self.problem != problem:
            log.warning("tracking: %s", problem)
        self.problem = problem

    # Out of the journal, in the thread.

    def _work(self) -> None:
        client: MlflowClient | None = None
        orphans: list[Journal] = []
        failures = 0
        while not self._stop.is_set():
            try:
                self._make_artifacts()
                if client is None:
                    client = connect(self.uri)
                    self._sender = Sender(client, self._open(), self.uri)
                    orphans = [j for j in self._adopt() if not self._replay(client, j)]
                assert self._sender is not None
                self._drain(self._sender, self._open(), again=failures > 0)
                if failures:
                    log.warning("tracking: MLflow takes records again")
                    failures, self.problem = 0, ""
                if self._adopt_files(self._sender):
                    continue
                if self._closing.is_set() and not self._jobs and not self._open().unsent:
                    break
                self._wake.wait(1.0)
                self._wake.clear()
            except Exception as error:
                # No error may reach the run: it is shown, and tried again.
                failures += 1
                reason = " ".join(str(error).split())[:300]
                self._warn(f"{tracking_uri.mask(self.uri)} does not take records: {reason}")
                longest = 1.0 if self._closing.is_set() else 8.0
                self._stop.wait(min(0.25 * 2 ** min(failures, 5), longest))
        for journal in orphans:
            journal.close()

    def _make_artifacts(self) -> None:
        """Calls the functions that make files; one that fails costs its own files only."""
        while self._jobs and not self._stop.is_set():
            run, make = self._jobs[0]
            try:
                self._save(run, make())
            except Exception as error:
                log.warning("tracking: artifacts of a run could not be made: %s", error)
            with self._lock:
                self._jobs.pop(0)

    def _adopt_files(self, sender: Sender) -> bool:
        """Lets results from the store hold their files, where no run that MLflow knows does."""
        with self._lock:
            known = [job for job in self._spare if job[0] in sender.runs]
            self._spare = [job for job in self._spare if job[0] not in sender.runs]
            wanted = [job for job in known if job[0] in sender.orphans]
            self._jobs += wanted
        return bool(wanted)

    def _drain(self, sender: Sender, journal: Journal, *, again: bool = False) -> None:
        """Sends what is in a journal; lets files be made in between.

        Args:
            again: sending the first operation failed before, perhaps after it had its effect.
        """
        while (entry := journal.next()) and not self._stop.is_set():
            try:
                answer = sender.send(entry, again=again)
                journal.acknowledge(entry.number, answer)
            except Rejected as error:
                log.warning("tracking: MLflow refuses a record for good: %s", error)
                journal.acknowledge(entry.number, rejected=True)
            if entry.operation["kind"] == "files":
                shutil.rmtree(journal.files / entry.operation["path"], ignore_errors=True)
            again = False
            if journal is self._journal and self._jobs:
                self._make_artifacts()

    def _adopt(self) -> list[Journal]:
        """Journals that dead runs left for the same MLflow."""
        orphans: list[Journal] = []
        for journal in Journal.orphans(self.folder):
            if journal.header["tracking"] in self._addresses():
                orphans.append(journal)
            else:
                journal.release()
        return orphans

    def _replay(self, client: "MlflowClient", journal: Journal) -> bool:
        """Sends the rest of a dead run and ends it as killed; False if MLflow failed meanwhile."""
        ended = [op["run"] for op in journal.operations() if op["kind"] == "end"]
        if "pipeline" not in ended:
            journal.append(records.end("pipeline", "KILLED", journal.modified_ms))
        try:
            self._drain(Sender(client, journal, self.uri), journal)
        except Exception as error:
            reason = tracking_uri.mask_all(str(error))
            log.warning("tracking: records of an earlier run stay in %s: %s", journal.path, reason)
        if journal.unsent:
            return False
        log.info("tracking: sent the records of an earlier run, %s", journal.id)
        journal.close()
        return True
