"""Sessions: a local Ray of our own, joining a cluster, and what is refused."""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from graftwork.cluster.execution.executor import execute
from graftwork.cluster.execution.graph import walk
from graftwork.cluster.execution.preflight import check_resources
from graftwork.cluster.sessions import huge_pages
from graftwork.cluster.sessions.session import Node, connect
from graftwork.operators.errors import ConfigError, StorageError
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.store import Store
from tests.ray_cluster import Cluster, two_nodes
from tests.ray_operators import advised_megabytes, stage

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "src"), str(ROOT)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = two_nodes()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", found.token_file)
    return found


def nodes_alive(address: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with connect(address) as session:
            if len(session.nodes) == count:
                return
        time.sleep(0.5)
    raise TimeoutError("the second node has not joined")


def test_joined_cluster_runs_a_graph_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    nodes_alive(cluster.address, 2)
    parts = tuple(stage(f"part {n}", n, seconds=0.3) for n in range(8))
    target = stage("sum", 0, parts)
    store = Store(str(tmp_path))
    outcome = execute([target], store, connect=partial(connect, cluster.address))
    assert outcome.computed == 9
    assert store.read("work", target.key, "value.json") == b"28"
    assert len({done.node for done in outcome.done.values()}) == 2


def test_workers_of_a_joined_cluster_get_huge_pages(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own word for it, unless the machine has them switched off, or always on."""
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    with connect(cluster.address):
        variable, advised = ray.get(ray.remote(advised_megabytes).remote())
    assert variable == huge_pages.TUNABLES
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[madvise]" in setting.read_text():
        assert advised >= 60


def test_auto_is_the_cluster_of_the_environment(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with connect("auto") as session:
        assert session.address == cluster.address
        assert not session.local
    assert os.environ["RAY_ADDRESS"] == cluster.address


def test_store_that_a_node_does_not_see(cluster: Cluster, tmp_path: Path) -> None:
    class Unshared(Store):
        """Looks at another folder in the workers, as a local disk does."""

        def __getstate__(self) -> dict[str, str]:
            return {"url": f"{self.url}-elsewhere"}

    with pytest.raises(StorageError, match=r"is not visible from node \S+; use a folder that all"):
        execute([stage("a")], Unshared(str(tmp_path)), connect=partial(connect, cluster.address))
    assert not list(tmp_path.glob("memo/*"))


@pytest.mark.parametrize("token", ["0" * 64, None])
def test_token_wrong_or_missing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, token: str | None, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    start = time.monotonic()
    with (
        pytest.raises(ConfigError, match="401, the token is missing or wrong; set RAY_AUTH_TOKEN"),
        connect(cluster.address),
    ):
        pass
    assert time.monotonic() - start < 5


def test_nothing_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(ConfigError, match="cannot reach Ray"), connect(f"127.0.0.1:{port}"):
            pass
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("address", ["nowhere", "http://host:8265", "host:", "host:port"])
def test_address_that_is_none(address: str) -> None:
    with (
        pytest.raises(ConfigError, match="expected auto, HOST:PORT or ray://HOST:PORT"),
        connect(address),
    ):
        pass


def test_token_file_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with (
        pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH=/nowhere/token: No such file"),
        connect("127.0.0.1:1"),
    ):
        pass


def test_local_ray_is_our_own_and_leaves_nothing(tmp_path: Path) -> None:
    """Another folder, RAY_ADDRESS and home: workers import us, nothing is written there."""
    program = f"""
import os, sys, stat, time
sys.path[:0] = {PATHS!r}
from functools import partial
from graftwork.cluster.execution.executor import execute
from graftwork.cluster.sessions.session import connect
from graftwork.operators.store import Store
from tests.ray_operators import stage
with connect(None, num_cpus=1, python_path=[{str(ROOT)!r}]) as session:
    import ray
    folder = os.environ["RAY_AUTH_TOKEN_PATH"]
    print(session.local, session.cpus, oct(stat.S_IMODE(os.stat(folder).st_mode)))
    print(os.path.dirname(folder))
    from contextlib import nullcontext
    print(execute([stage("a")], Store("store"), connect=lambda: nullcontext(session)).computed)
    print(ray.get(ray.remote(lambda: os.environ.get("GLIBC_TUNABLES")).remote()))
changed = "RAY_AUTH_MODE", "PYTHONPATH", "PYTHONBREAKPOINT", "GLIBC_TUNABLES"
print([name for name in changed if name in os.environ])
"""
    ours = ("RAY_", "PYTHON", "GLIBC_TUNABLES")
    environ = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    environ |= {"HOME": str(tmp_path / "home"), "RAY_ADDRESS": "192.0.2.99:6379"}
    (tmp_path / "home").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.stderr == ""
    facts, folder, computed, pages, after = result.stdout.splitlines()
    assert (facts, computed, after) == ("True 1.0 0o600", "1", "[]")
    assert pages == huge_pages.TUNABLES
    assert not Path(folder).exists()
    assert not list((tmp_path / "home").iterdir())


def ask(cpus: float, gpus: float) -> Stage:
    return Stage(operator="features", parameters={}, resources=Resources(cpus=cpus, gpus=gpus))


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "message"),
    [
        (1, 1, (4, 0), "resources.extract.gpus=1 but the cluster has 0 GPUs"),
        (1, 3, (4, 2), "resources.extract.gpus=3 but no node has more than 2 GPUs"),
        (8, 0, (4, 0), "resources.extract.cpus=8 but no node has more than 4 CPUs"),
    ],
)
def test_stage_that_fits_on_no_node(
    cpus: float, gpus: float, node: tuple[float, float], message: str
) -> None:
    nodes = [Node("a", "10.0.0.1", *node), Node("b", "10.0.0.2", 1, 0)]
    with pytest.raises(ConfigError) as caught:
        check_resources(walk([ask(cpus, gpus)]), nodes)
    assert str(caught.value) == message
    check_resources([ask(4, 0)], nodes)


def test_stage_that_fits_on_no_single_node() -> None:
    nodes = [Node("a", "10.0.0.1", 8, 0), Node("b", "10.0.0.2", 2, 4)]
    with pytest.raises(ConfigError, match="no node has 4 CPUs and 1 GPUs at once"):
        check_resources([ask(4, 1)], nodes)
