"""Runs on a cluster that go on without us: submit, status, logs, stop.

The entry point is `python -m graftwork.pipelines run`, the same command that a user types, so that
a job that was stopped or lost continues when it is submitted again.
"""

import asyncio
import json
import logging
import re
import shlex
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from graftwork.cluster.sessions import auth, huge_pages, shipping
from graftwork.operators.errors import ClusterLost, ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

REACH = 5.0
"""Seconds that the head node gets to answer a small question."""

CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that would tell the user about the upload of our packages."""

CREDENTIALS = re.compile(r"://[^/@\s]+:[^/@\s]+@")

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Args:
        id: the job's id.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's explanation of the state.
        entrypoint: the command that it runs.
        started: seconds since the epoch, None before it starts.
        ended: seconds since the epoch, None before it ends.
        exit_status: of the command; None when it has not ended, or was killed.
    """

    id: str
    state: str
    message: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_status: int | None

    @property
    def final(self) -> bool:
        """Tells whether the state will not change any more."""
        return self.state in FINAL


def submit(
    spec: str,
    *,
    address: str,
    spec_text: str | None = None,
    store: str | None = None,
    tracking: str | None = None,
    arguments: Sequence[str] = (),
    job_id: str | None = None,
    insecure: bool = False,
) -> str:
    """Starts `graftwork run SPEC` on a cluster and returns at once.

    Args:
        spec: name of a preset, an fsspec URL, or a local file, whose content is shipped.
        address: the head node's dashboard, `http://HEAD:8265`.
        spec_text: content to ship instead of the local file's, for example with paths resolved.
        store: store URL; a local path is made absolute, and has to mean the same folder there.
        tracking: MLflow URI; a local path is made absolute, too.
        arguments: more arguments of `run`, passed on literally.
        job_id: an id of one's own; a second job with the same id is refused.
        insecure: accept a cluster on another machine that asks for no token.

    Returns:
        The job's id.

    Raises:
        ConfigError: the cluster is not reachable, wants another token, runs another Ray version,
            or an argument cannot be shipped.
    """
    files: dict[str, str] = {}
    if spec_text is not None or Path(spec).is_file():
        text = spec_text if spec_text is not None else _read(spec)
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(spec).stem)[:40] or "spec"
        spec = f"submitted/{stem}.yaml"
        files[spec] = text
    command = ["python", "-m", "graftwork.pipelines", "run", spec, "--address", "auto"]
    for option, value in (("--store", store), ("--tracking", tracking)):
        if value is not None:
            command += [option, absolute(value)]
    command += arguments
    for argument in command:
        _refuse_credentials(argument)
    with _client(address) as client, shipping.working_dir(files) as folder:
        if not insecure:
            _require_token(address)
        with _errors(address, job_id or ""):
            return client.submit_job(
                # Ray hands the line to a shell.
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": str(folder), "env_vars": huge_pages.environment()},
                submission_id=job_id or f"graftwork-{uuid.uuid4().hex[:12]}",
            )


def status(job_id: str, *, address: str) -> Job:
    """Asks the cluster about a job.

    Raises:
        ConfigError: no such job, or the cluster is not reachable or wants another token.
    """
    with _client(address) as client:
        return _job(client, job_id, address)


def logs(job_id: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """The job's output in pieces of text; with `follow`, until the job ends.

    Raises:
        ConfigError: no such job, or the cluster is not reachable or wants another token.
        ClusterLost: the connection broke off while following.
    """
    with _client(address) as client:
        _job(client, job_id, address)  # the tail of an unknown job ends without an error
        with _errors(address, job_id):
            if not follow:
                yield client.get_job_logs(job_id)
                return
        try:
            yield from _blocking(client.tail_job_logs(job_id))
        except (RuntimeError, OSError) as error:
            raise ClusterLost(f"{address}: the log of {job_id} broke off: {error}") from error


def stop(job_id: str, *, address: str, timeout: float = 30.0) -> Job:
    """Stops a job and waits until it has ended; no error when it had ended already.

    Args:
        job_id: the job.
        address: the head node's dashboard.
        timeout: seconds to wait.

    Raises:
        ConfigError: no such job, or the cluster is not reachable or wants another token.
        ClusterLost: it has not ended in time.
    """
    with _client(address) as client:
        with _errors(address, job_id):
            client.stop_job(job_id)
        deadline = time.monotonic() + timeout
        while not (job := _job(client, job_id, address)).final:
            if time.monotonic() > deadline:
                raise ClusterLost(f"{address}: {job_id} has not stopped within {timeout:g} s")
            time.sleep(0.3)
        return job


def absolute(url: str) -> str:
    """A local path made absolute; URLs, also `sqlite:///relative.db`, resolved likewise."""
    scheme, colon, path = url.partition("://")
    if not colon:
        return str(Path(url).absolute())
    if scheme == "sqlite" and path.startswith("/") and not path.startswith("//"):
        return f"sqlite:///{Path(path[1:]).absolute()}"
    return url


@contextmanager
def _client(address: str) -> Iterator["JobSubmissionClient"]:
    try:
        usable = urlsplit(address).scheme in ("http", "https") and urlsplit(address).port != 0
    except ValueError:  # an address of IPv6 or a port that is none
        usable = False
    if not usable:
        raise ConfigError(f"--address {address}: expected the dashboard, http://HEAD:8265")
    address = address.rstrip("/")
    with auth.client_environment():
        import ray

        theirs = str(_ask(address, "/api/version", auth.token())["ray_version"])
        if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ConfigError(
                f"--address {address}: cluster has Ray {theirs}, client {ray.__version__}"
            )
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _errors(address, ""):
            client = JobSubmissionClient(address)
        yield client


def _ask(address: str, path: str, token: str | None) -> dict[str, str]:
    """A small question, with a time limit; Ray's own client has none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(address.rstrip("/") + path, headers=headers)
        with urllib.request.urlopen(request, timeout=REACH) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise ConfigError(
                f"--address {address}: {error.code}, the token is missing or wrong; "
                f"{auth.TOKEN_HINT}"
            ) from None
        raise ConfigError(
            f"--address {address}: {error.code} {error.reason}, no Ray dashboard"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            reason = f"timed out after {REACH:g} s"
        raise ConfigError(f"--address {address}: cannot reach it ({reason})") from error


def _require_token(address: str) -> None:
    host = urlsplit(address).hostname or ""
    if host in ("127.0.0.1", "::1", "localhost"):
        return
    if _ask(address, "/api/authentication_mode", None).get("authentication_mode") == "disabled":
        raise ConfigError(
            f"--address {address}: the cluster asks for no token, so that everybody who reaches "
            "it can run code on it; start it with RAY_AUTH_MODE=token, or say --insecure"
        )


def _job(client: "JobSubmissionClient", job_id: str, address: str) -> Job:
    with _errors(address, job_id):
        info = client.get_job_info(job_id)
    return Job(
        id=job_id,
        state=str(info.status.value),
        message=(info.message or "").split(", last available logs")[0].split("\n")[0],
        entrypoint=info.entrypoint,
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        exit_status=info.driver_exit_code,
    )


@contextmanager
def _errors(address: str, job_id: str) -> Iterator[None]:
    """Turns what Ray's client raises into one line."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "status code 404" in text:
            raise ConfigError(f"--address {address}: no job {job_id}") from error
        if "already exists" in text:
            raise ConfigError(f"--address {address}: there is a job {job_id} already") from error
        raise ConfigError(f"--address {address}: {text[:300]}") from error
    except (ConnectionError, OSError) as error:
        raise ConfigError(f"--address {address}: cannot reach it ({error})") from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _refuse_credentials(argument: str) -> None:
    # The command line of a job is shown in the dashboard and written to logs.
    if CREDENTIALS.search(argument):
        shown = CREDENTIALS.sub("://***@", argument)
        raise ConfigError(f"{shown}: credentials in URLs not allowed; use the environment")


def _blocking(pieces: AsyncIterator[str]) -> Iterator[str]:
    """An asynchronous iterator's items, one by one, in a thread without a loop."""
    with asyncio.Runner() as runner:
        while True:
            try:
                with warnings.catch_warnings():
                    # aiohttp's, about how Ray calls it.
                    warnings.filterwarnings("ignore", "ssl=None", DeprecationWarning)
                    piece = runner.run(_next(pieces))
                yield piece
            except StopAsyncIteration:
                return


async def _next(pieces: AsyncIterator[str]) -> str:
    return await anext(pieces)
