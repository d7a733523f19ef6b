"""Shows what was recorded: MLflow's own user interface, for this machine only."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from graftwork.operators.errors import ConfigError, StorageError
from graftwork.operators.tracking import uri as tracking_uri

HOST = "127.0.0.1"


def serve(uri: str, port: int = 5000, *, announce: Callable[[str], None] = print) -> int:
    """Serves the records at `uri` on the loopback address until Ctrl-C; returns an exit status.

    Args:
        uri: MLflow's tracking URI; a server that is already there is only pointed at.
        announce: called with the line that says where to look, once it can be looked at.

    Raises:
        ConfigError: the port is taken, or the URI cannot be reached.
    """
    tracking_uri.check(uri)
    if uri.startswith(("http:", "https:")):
        announce(f"MLflow is already served at {tracking_uri.mask(uri)}")
        return 0
    _claim(port)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    # Its own session: Ctrl-C reaches this process alone, which then ends the server in order.
    server = subprocess.Popen(
        command(port),
        env=os.environ | environment(served(uri)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _wait(server, port)
        # Without the parameter MLflow opens with its views for language models.
        place = f"http://{HOST}:{port}/#/experiments?workflowType=machine_learning"
        announce(f"{place} shows {tracking_uri.mask(uri)}; Ctrl-C ends it")
        _drain(server)
        return 0 if server.wait() in (0, -signal.SIGTERM) else 1
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def command(port: int) -> list[str]:
    """The server's command line; the URI, which may hold a password, is not on it.

    With -P nothing is imported from the working directory, which may hold an `mlflow` of the user.
    """
    server = [sys.executable, "-P", "-m", "mlflow", "server", "--workers", "1"]
    return [*server, "--host", HOST, "--port", str(port)]


def served(uri: str) -> str:
    """The URI as the server takes it; a database is built, or its places moved, before.

    Raises:
        ConfigError: SQLAlchemy cannot name its file.
        StorageError: it cannot be written.
    """
    path = tracking_uri.sqlite_path(uri)
    if path is None:
        return uri
    from graftwork.operators.tracking import database, sender

    sender.settle_environment()
    try:
        database.settle(path)
    except (OSError, sqlite3.Error) as error:
        shown = tracking_uri.mask(uri)
        raise StorageError(f"ui: {shown}: {' '.join(str(error).split())}") from error
    return sender.as_sqlalchemy(path)


def environment(uri: str) -> dict[str, str]:
    """Variables that the server needs besides its command line."""
    root = tracking_uri.artifact_root(uri)
    return {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONSAFEPATH": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # Eight processes for the judging of language models, which nobody here asks for.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Other hosts in the Host header are somebody's website talking to this machine.
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:*,localhost:*",
        **({"MLFLOW_DEFAULT_ARTIFACT_ROOT": root} if root else {}),
    }


def _claim(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError(f"ui: port must be in 1..65535, got {port}")
    with socket.socket() as probe:
        # As servers do it; otherwise a port is refused for a minute after its last use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"ui: port {port} cannot be used ({error.strerror}); pass another --port"
            ) from None


def _wait(server: "subprocess.Popen[bytes]", port: int, seconds: float = 60.0) -> None:
    """Returns when the server answers.

    Raises:
        ConfigError: it ended, or does not answer in time.
    """
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if server.poll() is not None:
            assert server.stderr is not None
            lines = server.stderr.read().decode(errors="replace").strip().splitlines()
            raise ConfigError(f"ui: MLflow did not start: {lines[-1] if lines else 'no message'}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ConfigError(f"ui: MLflow did not answer on port {port} within {seconds:.0f} s")


def _drain(server: "subprocess.Popen[bytes]") -> None:
    """Reads what the server says, so that it never waits for a reader."""
    assert server.stderr is not None
    for _ in server.stderr:
        continue


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and its workers: they are the only ones in their session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, number)
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue
    if server.stderr is not None:
        server.stderr.close()
