"""URIs of MLflow: the default, whether one can be reached, and how to name it in public."""

import base64
import http.client
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from graftwork.operators.errors import ConfigError
from graftwork.operators.files import urls
from graftwork.operators.tracking import database

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SECONDS = 4.0
"""Limit of the check; a run that cannot be recorded says so within five seconds."""


def default_uri(store: Path) -> str:
    """MLflow's database in a local store folder."""
    return f"sqlite:///{database.quoted(store.absolute() / 'mlflow.db')}"


def mask(uri: str) -> str:
    """The URI without user, password and query: for messages and files."""
    return mask_all(uri.split("?")[0])


def mask_all(text: str) -> str:
    """The text with user and password taken out of every URI in it."""
    return re.sub(r"(//)[^/@\s]*@", r"\1***@", text)


def artifact_root(uri: str) -> str | None:
    """Place for a new experiment's artifacts: next to an sqlite file; a server decides itself."""
    path = sqlite_path(uri)
    return (path.parent / database.ARTIFACTS).absolute().as_uri() if path else None


def sqlite_path(uri: str) -> Path | None:
    """The file of an `sqlite:///` URI, in which %25 stands for %; None for other schemes."""
    if not uri.startswith(("sqlite:", "sqlite+pysqlite:")):
        return None
    match = re.fullmatch(r"sqlite(?:\+pysqlite)?:///(.+)", uri.split("?")[0])
    if match is None or match[1] == ":memory:":
        raise ConfigError(
            f"{uri!r} names no file; write sqlite:////absolute/path.db", key="tracking"
        )
    return Path(urllib.parse.unquote(match[1]))


def check(uri: str, reading: bool = False) -> None:
    """Makes sure, within `SECONDS`, that MLflow can be reached; imports nothing of it.

    Args:
        reading: nothing will be written.

    Raises:
        ConfigError: it cannot; the message names the URI without credentials.
    """
    found = ["no answer", ""]
    # In a thread: looking up a name of an unknown host may block for much longer.
    thread = threading.Thread(
        target=lambda: found.__setitem__(slice(2), _problem(uri, reading)), daemon=True
    )
    thread.start()
    thread.join(SECONDS)
    reason, advice = found
    if reason:
        raise ConfigError(
            f"cannot reach {urls.mask(mask(uri))}: {reason}; "
            f"{advice or 'start it'}, or pass another --tracking",
            key="tracking",
        )


def _problem(uri: str, reading: bool) -> tuple[str, str]:
    """Reason why the URI cannot be used, empty if it can, and what to do about it, if known."""
    scheme = uri.split(":")[0].split("+")[0] if ":" in uri else ""
    try:
        if scheme == "sqlite":
            path = sqlite_path(uri)
            assert path is not None
            return database.problem(path, reading)
        if scheme in ("http", "https"):
            return _server_problem(uri), ""
        if scheme in DATABASE_PORTS:
            parts = urllib.parse.urlsplit(uri)
            address = (parts.hostname or "localhost", parts.port or DATABASE_PORTS[scheme])
            socket.create_connection(address, timeout=SECONDS - 1).close()
            return "", ""
        if scheme.startswith("databricks"):
            return "", ""
    except (OSError, ValueError, http.client.HTTPException, ConfigError) as error:
        cause = error.what if isinstance(error, ConfigError) else getattr(error, "reason", error)
        return getattr(cause, "strerror", None) or str(cause) or type(error).__name__, ""
    known = "sqlite, http, https, databricks, " + ", ".join(DATABASE_PORTS)
    return f"{scheme!r} is not one of {known}", ""


def _server_problem(uri: str) -> str:
    # Any name will do: a server that knows no such experiment says so, in JSON.
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    base = parts._replace(netloc=host, path=parts.path.rstrip("/"), query="", fragment="")
    request = urllib.request.Request(base.geturl() + path)
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user:
        secret = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {secret}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    context = None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS - 1, context=context) as answer:
            body = answer.read(10_000)
    except urllib.error.HTTPError as error:
        with error:  # It holds the connection; Python 3.14 warns if nobody closes it.
            body = error.read(10_000)
        if error.code in (401, 403):
            return (
                f"HTTP {error.code}, not allowed; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if b"RESOURCE_DOES_NOT_EXIST" not in body:
            return f"HTTP {error.code}, which is not MLflow's answer"
        return ""
    return "" if b'"experiment"' in body else "it answers, but not as MLflow does"
