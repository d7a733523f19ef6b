"""Jobs on a real cluster: submit, status, logs, stop, and what is refused."""

import shutil
import socket
import time
from pathlib import Path

import pytest

import graftwork
from graftwork.cluster import jobs
from graftwork.cluster.sessions import shipping
from graftwork.operators.errors import ConfigError
from tests.ray_cluster import Cluster, two_nodes


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = two_nodes()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", found.token_file)
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.99:8265")  # must not win
    return found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the checkout, whose `pipelines` shows its arguments and its spec."""
    root = tmp_path / "checkout" / "graftwork"
    (root / "pipelines").mkdir(parents=True)
    for name in ("__init__.py", "pipelines/__init__.py", "pipelines/secret.db"):
        (root / name).touch()
    (root.parent / "data").mkdir()
    (root / "pipelines" / "__main__.py").write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "print(sys.argv[1:], flush=True)\n"
        "print(sorted(p.name for p in Path().rglob('*') if p.suffix != '.pyc'), flush=True)\n"
        "print(Path(sys.argv[2]).read_text(), flush=True)\n"
        "time.sleep(60 if 'sleep' in sys.argv else 0)\n"
        "sys.exit(4 if 'fail' in sys.argv else 0)\n"
    )
    monkeypatch.setattr(shipping, "PACKAGE", root)
    return root


def wait(job: str, cluster: Cluster, *states: str) -> jobs.Job:
    deadline = time.monotonic() + 60
    while (found := jobs.status(job, address=cluster.dashboard)).state not in states:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_job_from_submission_to_its_end(cluster: Cluster, program: Path, tmp_path: Path) -> None:
    spec = tmp_path / "my spec; $(touch pwned).yaml"
    spec.write_text("pipeline: 'shown'\n")
    evil = f"a=; touch {tmp_path}/pwned\n$(touch {tmp_path}/pwned)"
    job = jobs.submit(
        str(spec),
        address=cluster.dashboard,
        store=str(tmp_path / "st ore"),
        tracking="http://mlflow:5000",
        arguments=["--set", evil],
    )
    text = "".join(jobs.logs(job, address=cluster.dashboard, follow=True))
    shipped = "submitted/my_spec____touch_pwned_.yaml"
    assert repr(["run", shipped, "--address", "auto", "--store", f"{tmp_path}/st ore"])[:-1] in text
    assert repr(evil) in text
    assert "pipeline: 'shown'" in text
    assert "secret.db" not in text
    assert "'data'" not in text
    assert not list(Path().glob("pwned*")) + list(tmp_path.glob("pwned*"))
    done = jobs.status(job, address=cluster.dashboard)
    assert (done.state, done.exit_status, done.final) == ("SUCCEEDED", 0, True)
    assert done.started is not None
    assert done.ended is not None
    assert done.started <= done.ended
    assert "".join(jobs.logs(job, address=cluster.dashboard)) == text
    token = Path(cluster.token_file).read_text()
    assert token not in text + done.entrypoint
    assert jobs.stop(job, address=cluster.dashboard).state == "SUCCEEDED"


def test_job_that_fails_and_one_that_is_stopped(cluster: Cluster, program: Path) -> None:
    failing, sleeping = (
        jobs.submit("spec.yaml", spec_text="x: 1\n", address=cluster.dashboard, arguments=[word])
        for word in ("fail", "sleep")
    )
    wait(sleeping, cluster, "RUNNING")
    assert jobs.stop(sleeping, address=cluster.dashboard).state == "STOPPED"
    failed = wait(failing, cluster, "FAILED")
    assert failed.exit_status == 4
    assert "\n" not in failed.message
    with pytest.raises(ConfigError, match=f"there is a job {failing} already"):
        jobs.submit("x", spec_text="x: 1\n", address=cluster.dashboard, job_id=failing)


def test_unknown_job(cluster: Cluster) -> None:
    for ask in (jobs.status, jobs.stop, lambda *a, **k: list(jobs.logs(*a, **k))):
        with pytest.raises(ConfigError, match="no job nope"):
            ask("nope", address=cluster.dashboard)


@pytest.mark.parametrize(("token", "status"), [("0" * 64, 403), (None, 401)])
def test_token_wrong_or_missing(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    status: int,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ConfigError, match=f"{status}, the token is missing or wrong; set RAY_AUTH"):
        jobs.status("any", address=cluster.dashboard)


def test_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REACH", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"cannot reach it \(timed out after 0.5 s\)"):
            jobs.status("any", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 3
    with pytest.raises(ConfigError, match="expected the dashboard, http://HEAD:8265"):
        jobs.status("any", address="10.0.0.1:6379")


def test_other_ray_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_ask", lambda *a: {"ray_version": "2.58.1"})
    with pytest.raises(ConfigError, match=r"cluster has Ray 2\.58\.1, client 2\."):
        jobs.status("any", address="http://127.0.0.1:1")


def test_cluster_without_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_ask", lambda *a: {"authentication_mode": "disabled"})
    jobs._require_token("http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"asks for no token.*--insecure"):
        jobs._require_token("http://10.0.0.1:8265")


def test_credentials_never_reach_a_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^http://\*\*\*@host/: credentials in URLs") as caught:
        jobs.submit("preset", address="http://127.0.0.1:1", tracking="http://me:secret@host/")
    assert "secret" not in str(caught.value)


def test_local_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert jobs.absolute("store") == f"{tmp_path}/store"
    assert jobs.absolute("sqlite:///m.db") == f"sqlite:///{tmp_path}/m.db"
    assert jobs.absolute(f"sqlite:///{tmp_path}/m.db") == f"sqlite:///{tmp_path}/m.db"
    assert jobs.absolute("s3://bucket/x") == "s3://bucket/x"


def test_shipped_folder_holds_the_program_only(program: Path) -> None:
    with shipping.working_dir({"submitted/a.yaml": "x"}) as folder:
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {
        "graftwork/__init__.py",
        "graftwork/pipelines/__init__.py",
        "graftwork/pipelines/__main__.py",
        "submitted/a.yaml",
    }
    assert not folder.exists()


def test_job_runs_a_graph_on_its_cluster(cluster: Cluster, program: Path, tmp_path: Path) -> None:
    """Inside a job, `--address auto` is the job's cluster, and its workers import our packages."""
    for package in ("cluster", "methods", "operators"):
        (program / package).symlink_to(Path(__file__).resolve().parent.parent / package)
    shutil.copy(graftwork.__file__, program)
    (program / "pipelines" / "__main__.py").write_text(
        "import sys\nfrom functools import partial\n"
        "from graftwork.cluster.execution.executor import execute\n"
        "from graftwork.cluster.sessions.session import connect\n"
        "from graftwork.operators.store import Store\nfrom tests.ray_operators import stage\n"
        "address, store = sys.argv[4], Store(sys.argv[6])\n"
        "parts = tuple(stage(f's {n}', n) for n in range(4))\n"
        "outcome = execute([stage('sum', 0, parts)], store, connect=partial(connect, address))\n"
        "print('computed', outcome.computed, flush=True)\n"
    )
    store = str(tmp_path / "store")
    job = jobs.submit("preset", address=cluster.dashboard, store=store)
    text = "".join(jobs.logs(job, address=cluster.dashboard, follow=True))
    assert "computed 5\n" in text, text
    assert jobs.status(job, address=cluster.dashboard).state == "SUCCEEDED"
