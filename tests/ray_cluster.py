"""A Ray cluster of two nodes on this machine, with a token of its own, for tests of joining it."""

import atexit
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Cluster:
    """Where the cluster answers, and what opens it."""

    address: str
    dashboard: str
    token_file: str


@cache
def two_nodes() -> Cluster:
    """Starts the cluster unless it runs; `stop`, or the end of this process, ends it."""
    folder = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # What the image of the nodes holds: the operators of the tests. Ours arrive with the driver.
    (folder / "image" / "tests").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("ray_operators.py"), folder / "image" / "tests")
    environ["PYTHONPATH"] = str(folder / "image")
    # Ray's own job agent starts with this Python, whatever PATH says.
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    gcs, board, client = free_port(), free_port(), free_port()
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        common = ["--num-cpus=2", "--disable-usage-stats", "--dashboard-agent-listen-port=0"]
        with open(folder / f"node{len(processes)}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [RAY, "start", "--block", *arguments, *common],
                    env=environ,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def stop() -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    _stops.append(stop)
    start(
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={board}",
        f"--ray-client-server-port={client}",
        f"--temp-dir={folder}/r",
        "--min-worker-port=20100",
        "--max-worker-port=20399",
    )
    wait_for(gcs)
    address = f"{socket.gethostbyname(socket.gethostname())}:{gcs}"
    address = _own_address(folder) or address
    start(
        f"--address={address}",
        # Two nodes that share a folder delete each other's copies of a job's program.
        f"--temp-dir={folder}/s",
        "--min-worker-port=20400",
        "--max-worker-port=20699",
    )
    wait_for(board)
    return Cluster(address, f"http://127.0.0.1:{board}", str(folder / "token"))


_stops: list[Callable[[], None]] = []


@atexit.register
def stop() -> None:
    """Ends the cluster if it runs."""
    while _stops:
        _stops.pop()()
    two_nodes.cache_clear()


def _own_address(folder: Path) -> str:
    """The address that the head node gives itself."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for file in folder.glob("r/ray_current_cluster"):
            return file.read_text().strip()
        time.sleep(0.1)
    return ""


def free_port() -> int:
    """A port outside the range that Ray gives to workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


def wait_for(port: int) -> None:
    """Waits until something listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")
