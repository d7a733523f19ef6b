"""A connection to Ray: a local one of our own, or a cluster that is there already."""

import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.cluster.sessions import auth, huge_pages, shipping, signals
from graftwork.operators.errors import ClusterLost, ConfigError

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job; its workers have our packages already."""

PREFIX = "graftwork-ray-"
REACH = 5.0
"""Seconds that an address gets to accept a connection."""


@dataclass(frozen=True)
class Node:
    """A node that runs stages."""

    id: str
    ip: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Session:
    """A connection to Ray.

    Args:
        address: what to call the cluster in messages.
        local: whether this process started it.
        nodes: nodes that were alive when it was opened.
        head: host and port that answer as long as the head node lives, if known.
    """

    address: str
    local: bool
    nodes: tuple[Node, ...]
    head: tuple[str, int] | None = None

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


@contextmanager
def connect(
    address: str | None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    python_path: Sequence[str] = (),
    insecure: bool = False,
) -> Iterator[Session]:
    """Connects to Ray for the length of a `with` block.

    Args:
        address: None starts a Ray of our own on this machine and ends it afterwards, whatever
            RAY_ADDRESS says and whatever else runs here. `auto` joins the cluster of RAY_ADDRESS,
            or the one that this machine belongs to. `host:port` and `ray://host:port` join it.
        num_cpus: CPUs of a local Ray; all when None.
        num_gpus: GPUs of a local Ray; all when None.
        python_path: folders from which local workers may import, besides our own.
        insecure: join a cluster on another machine that asks for no token.

    Raises:
        ConfigError: the address is not reachable, wants another token, or runs another version.
    """
    with ExitStack() as stack:
        if address is None:
            session = stack.enter_context(_local(num_cpus, num_gpus, python_path))
        else:
            session = stack.enter_context(_joined(address, insecure))
        stack.enter_context(signals.raising())
        yield session


@contextmanager
def _local(
    num_cpus: int | None, num_gpus: int | None, python_path: Sequence[str]
) -> Iterator[Session]:
    # Unix sockets allow 107 bytes, of which Ray needs about 65: a long TMPDIR does not fit.
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) <= 20 else Path("/tmp")
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # An empty entry, as of `PYTHONPATH=$PYTHONPATH:x`, would be the working directory.
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = [str(shipping.ROOT), *python_path, *inherited]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_locked(folder))
        # Ray would write its token to the home directory, readable for everybody.
        token_file = folder / "token"
        descriptor = os.open(token_file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        stack.enter_context(
            auth.environment(
                {
                    **dict.fromkeys(auth.FOLLOWED),
                    **auth.QUIET,
                    **auth.SETTLED,
                    **huge_pages.environment(),
                    "PYTHONPATH": os.pathsep.join(path),
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": None,
                    "RAY_AUTH_TOKEN_PATH": str(token_file),
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                    "RAY_task_oom_retries": "2",
                    "RAY_USAGE_STATS_ENABLED": "0",
                }
            )
        )
        import ray

        stack.callback(ray.shutdown)
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=_without_working_directory(),
                _temp_dir=str(folder),
            )
        except Exception as error:  # Ray raises plain ones
            if "timed out during startup" not in str(error):
                raise
            # Ray waits 30 s, which nobody can change.
            raise ClusterLost(
                "a local Ray did not start within 30 s; the machine seems to be overloaded, "
                "the same command tries again"
            ) from error
        yield Session("local", True, _nodes(), _head())


class _Nothing(list[str]):
    """A list that stays empty."""

    def extend(self, _: Iterable[str]) -> None:
        return


def _without_working_directory() -> Any:
    """Ray's configuration of a job whose workers import nothing from the working directory.

    Ray puts it, and the folder of the running script, before everything else; a user's `torch/`,
    `operators/` or `queue.py` there would be imported in place of the real one.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _Nothing()
    return config


@contextmanager
def _joined(address: str, insecure: bool) -> Iterator[Session]:
    inside_job = IN_JOB in os.environ
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    with ExitStack() as stack:
        stack.enter_context(auth.client_environment())
        if address == "auto":
            address = _own_cluster()
        _probe(address)
        runtime_env: dict[str, Any] | None = None
        if not inside_job:
            runtime_env = {
                "working_dir": str(stack.enter_context(shipping.working_dir())),
                "env_vars": huge_pages.environment(),
            }
        import ray
        from ray.exceptions import RayError

        stack.callback(ray.shutdown)
        try:
            ray.init(
                address=address,
                runtime_env=runtime_env,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise _refusal(address, error) from error
        if not (insecure or inside_job):
            _require_token(address)
        yield Session(address, False, _nodes(), _head())


def _nodes() -> tuple[Node, ...]:
    """Nodes that can run something; a head node without CPUs cannot."""
    import ray

    return tuple(
        Node(
            id=node["NodeID"],
            ip=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    )


def _head() -> tuple[str, int] | None:
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return None  # the client has its own watch over its connection
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def _own_cluster() -> str:
    """Address of the Ray that runs on this machine.

    Raises:
        ConfigError: none does.
    """
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address("auto")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "--address auto: no Ray runs on this machine, and RAY_ADDRESS is not set"
        ) from error
    assert found is not None
    return found


def _probe(address: str) -> None:
    """Finds out within seconds what `ray.init` takes half a minute and a traceback to say.

    Raises:
        ConfigError: nothing answers at the address, or it refuses the token.
    """
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if not host or not port.isdigit() or scheme not in ("", "ray"):
        raise ConfigError(f"--address {address}: expected auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
    except OSError as error:
        reason = f"no answer within {REACH:g} s" if isinstance(error, TimeoutError) else error
        raise ConfigError(f"--address {address}: cannot reach Ray ({reason})") from error
    if scheme:
        return
    from ray import _raylet
    from ray.exceptions import RayError

    compiled: Any = _raylet  # without types

    try:
        with _quiet():
            compiled.GcsClient(address=rest)
    except (RayError, ConnectionError, RuntimeError) as error:
        raise _refusal(address, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what C++ writes to stderr besides the error that it raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _refusal(address: str, error: BaseException) -> ConfigError:
    from ray.exceptions import AuthenticationError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = " ".join(" ".join(str(link) for link in chain).split())
    if any(isinstance(link, AuthenticationError) for link in chain) or "Unauthenticated" in text:
        return ConfigError(
            f"--address {address}: 401, the token is missing or wrong; {auth.TOKEN_HINT}"
        )
    if "Version mismatch" in text:
        versions = text.partition("Version mismatch: ")[2]
        return ConfigError(f"--address {address}: version mismatch: {versions}")
    # Ray's client says no more than "timed out" when its proxy refuses the token.
    hint = f"; if it wants a token, {auth.TOKEN_HINT}" if address.startswith("ray://") else ""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ConfigError(f"--address {address}: cannot join: {reason}{hint}")


def _require_token(address: str) -> None:
    """Refuses a cluster on another machine that runs anybody's code.

    Raises:
        ConfigError: it asks for no token.
    """
    from ray import _raylet

    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    ray_auth: Any = _raylet  # compiled, without types
    mode = ray_auth.get_authentication_mode()
    if mode == ray_auth.AuthenticationMode.TOKEN or host in ("127.0.0.1", "localhost"):
        return
    raise ConfigError(
        f"--address {address}: the cluster asks for no token, so that everybody who reaches it can "
        "run code on it; start it with RAY_AUTH_MODE=token, or say --insecure"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Marks a folder as in use for as long as this process lives, kill -9 included."""
    with open(folder / "lock", "w") as file:
        with suppress(OSError):  # no locks here: then nobody removes what is left of a killed one
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(base: Path) -> None:
    """Removes the folders of local Rays whose driver was killed."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            # Young ones may not have taken their lock yet, or their Ray may still be ending.
            if time.time() - folder.stat().st_mtime < 60 or folder.stat().st_uid != os.getuid():
                continue
            with open(folder / "lock", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # gone meanwhile, in use, or somebody else's
