"""Chains on Ray Train: one start for all tasks, and what happens when something dies."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from graftwork.cluster.execution.chain_worker import Broken
from graftwork.cluster.execution.executor import Event, Outcome, execute
from graftwork.cluster.execution.policy import Kind, Policy
from graftwork.cluster.execution.pool import RayPool
from graftwork.cluster.execution.train_group import judge
from graftwork.cluster.sessions import huge_pages
from graftwork.cluster.sessions.session import Session, connect
from graftwork.operators.errors import Diverged, RunHeld, StageFailed
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from tests.processes import started
from tests.ray_operators import chain, stage
from tests.test_executor import members

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "src"), str(ROOT)]
FAST = Policy(backoff=0.01)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with connect(None, num_cpus=3) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[RayPool]:
    """The pools that were made, to count the starts of Ray Train."""
    made: list[RayPool] = []
    init = RayPool.__init__

    def remember(self: RayPool, *args: object) -> None:
        init(self, *args)  # pyright: ignore[reportArgumentType]
        made.append(self)

    monkeypatch.setattr(RayPool, "__init__", remember)
    return made


def compute(
    session: Session,
    store: Store,
    *targets: Stage,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    return execute(
        targets, store, connect=lambda: nullcontext(session), policy=FAST, on_event=on_event
    )


def attempts(folder: Path) -> Counter[str]:
    """Calls of the operator: `<label>.<rank>` -> how often."""
    return Counter(path.name.rpartition(".")[0] for path in folder.glob("*.*"))


def content(store: Store, stages: list[Stage]) -> list[bytes]:
    return [store.read(stage.operator, stage.key, "value.json") for stage in stages]


def pids(name: str) -> list[int]:
    """Processes of Ray with this title, of a Ray that this process has started."""
    lines = subprocess.check_output(["ps", "-eo", "pid,sid,args"], text=True).splitlines()[1:]
    rows = [line.split(maxsplit=2) for line in lines]
    return [int(pid) for pid, sid, title in rows if name in title and int(sid) == os.getsid(0)]


def trainers(session_id: int) -> list[str]:
    """Processes of a driver's session that may compute: Ray's two agents outlive a killed driver.

    They wait for a minute for a head node that went with it.
    """
    return [line for line in members(session_id) if "Agent" not in line and "agent" not in line]


class Death(Exception):
    """As Ray Train tells of a worker that does not answer."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


class GroupError(Exception):
    """As Ray Train tells of a group."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:")
        self.worker_failures = dict(enumerate(failures))


DIED, OOM = RayActorError(), OutOfMemoryError("Task was killed due to the node running low")
FOREIGN = Broken("k", StageFailed("stage a failed: RuntimeError: aborted"), peer_lost=False)
PEER = Broken("k", StageFailed("stage a failed: RuntimeError: gloo"), peer_lost=True)
OURS = Broken("k", Diverged("loss is nan"), peer_lost=False)


@pytest.mark.parametrize(
    ("error", "broken", "key", "kind"),
    [
        (GroupError(OURS.error), [OURS], "k", Kind.FAILED),
        (GroupError(PEER.error, OURS.error), [PEER, OURS], "k", Kind.FAILED),
        (GroupError(FOREIGN.error), [FOREIGN], "k", Kind.FAILED),
        (GroupError(FOREIGN.error, Death(DIED)), [FOREIGN], "", Kind.LOST),
        (GroupError(OURS.error, Death(DIED)), [OURS], "k", Kind.FAILED),
        (GroupError(PEER.error), [PEER], "", Kind.LOST),
        (GroupError(Death(DIED)), [], "", Kind.LOST),
        (GroupError(PEER.error, Death(OOM)), [PEER], "", Kind.MEMORY),
        (DIED, [], "", Kind.LOST),
    ],
)
def test_who_is_to_blame(error: Exception, broken: list[Broken], key: str, kind: Kind) -> None:
    found, failure = judge(error, broken)
    assert (found, failure.kind) == (key, kind)
    assert failure.error is (broken[-1].error if key else None)
    assert "\n" not in failure.message


def test_one_start_serves_all_tasks_and_their_readers(
    session: Session, store: Store, pools: list[RayPool], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    a = chain("l2p seed 0", 3, workers=2, per_task={2: {"wait_for": str(seen), "seconds": 60.0}})
    reader = stage("predict 0", 10, (a[0],))
    events: list[tuple[str, str]] = []

    def on_event(event: Event) -> None:
        events.append((event.kind, event.stage.label))
        if event.kind == "progress":
            assert event.facts["ranks"] == 2
        if (event.kind, event.stage) == ("finished", reader):
            seen.touch()

    before = set(Path.home().iterdir())
    outcome = compute(session, store, reader, a[2], on_event=on_event)
    finished = [label for kind, label in events if kind == "finished"]
    assert finished.index(reader.label) < finished.index(a[2].label)  # it did not wait
    assert pools[0].chains.starts == 1
    assert content(store, a) == [b"2", b"6", b"12"]
    assert outcome.computed == 4
    assert all(done.node for done in outcome.done.values())
    assert outcome.done[a[2].key].facts["tunables"] == huge_pages.environment()[huge_pages.VARIABLE]
    assert events.index(("finished", "predict 0")) < events.index(("finished", "l2p seed 0 2"))
    assert {label for kind, label in events if kind == "progress"} == {s.label for s in a}
    assert set(Path.home().iterdir()) == before
    assert not store.blobs.files("leases")
    assert not store.blobs.files("ray-train")


def test_worker_killed_controller_killed_and_an_error(
    session: Session, store: Store, pools: list[RayPool], tmp_path: Path
) -> None:
    """Three tasks that go wrong, each in its way, in one chain: each start of Ray Train counts."""
    log, go = tmp_path / "log", tmp_path / "go"
    log.mkdir()
    hints: dict[int, dict[str, object]] = {n: {"log": str(log)} for n in range(5)}
    hints[1] |= {"kill": 1, "rank": 1}
    hints[2] |= {"wait_for": str(go), "seconds": 60.0}
    # On the rank that does not lead; the other one waits for it in a collective.
    hints[3] |= {"raises": "Diverged", "rank": 1}
    a = chain("a", 5, workers=2, per_task=hints)
    retried: list[str] = []

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.stage == a[2]:
            if retried == ["a 1"]:
                for pid in pids("ray::TrainController"):
                    os.kill(pid, signal.SIGKILL)
            else:  # not before: workers that outlive their controller a little would go on
                go.touch()
        if event.kind == "retried":
            retried.append(event.stage.label)

    with pytest.raises(Diverged, match="loss is nan at step 3") as caught:
        compute(session, store, a[4], on_event=on_event)
    assert "ray_operators.py" in "".join(caught.value.__notes__)
    assert retried == ["a 1", "a 2"]
    assert pools[0].chains.starts == 3
    assert content(store, a[:3]) == [b"2", b"6", b"12"]
    assert store.keys("count") == {stage.key for stage in a[:3]}
    calls = {f"a {task}.{rank}": 1 for task in range(4) for rank in range(2)}
    again = {f"a {task}.{rank}": 2 for task in (1, 2) for rank in range(2)}
    assert attempts(log) == calls | again
    assert not store.blobs.files("leases")


DRIVER = """
import sys
sys.path[:0] = {paths!r}
from functools import partial
from graftwork.cluster.execution.executor import execute
from graftwork.cluster.sessions.session import connect
from graftwork.operators.errors import GraftworkError
from graftwork.operators.store import Store
from tests.ray_operators import chain
def tell(event):
    print(event.kind, event.stage.label, flush=True)
hints = {{n: {{"log": {log!r}}} for n in range(3)}}
hints[1] |= {{"wait_for": {go!r}, "seconds": 120.0}}
hints[2] |= {{"wait_for": "never", "seconds": 120.0}}
try:
    execute([chain("a", 3, per_task=hints)[2]], Store({store!r}),
            connect=partial(connect, None, num_cpus=1), on_event=tell)
except GraftworkError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_driver_killed_and_then_stopped_in_the_middle(tmp_path: Path) -> None:
    store, log, go = Store(str(tmp_path / "store")), tmp_path / "log", tmp_path / "go"
    log.mkdir()
    program = DRIVER.format(paths=PATHS, store=store.url, log=str(log), go=str(go))
    a = chain("a", 3)

    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}

    @contextmanager
    def driver(until: str) -> Iterator[subprocess.Popen[str]]:
        with started(
            [sys.executable, "-c", program], text=True, start_new_session=True, env=environment
        ) as process:
            assert process.stdout is not None
            assert any(line == f"{until}\n" for line in process.stdout)
            yield process

    def gone(ended: subprocess.Popen[str], within: float) -> None:
        deadline = time.monotonic() + within
        while (left := trainers(ended.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []

    with driver(until="progress a 1") as killed:
        # A second run does not train the same beside it.
        with pytest.raises(RunHeld, match=rf"a is being trained by \S+/{killed.pid} since"):
            execute([a[2]], store, connect=lambda: pytest.fail("Ray is not needed"))
        killed.kill()
        killed.communicate(timeout=30)
    gone(killed, within=20)

    # The same command again: it takes the lease of the dead, and goes on at the second task.
    go.touch()
    with driver(until="progress a 2") as stopped:
        stopped.send_signal(signal.SIGTERM)
        out, err = stopped.communicate(timeout=30)
    assert stopped.returncode == 143, err
    assert "(raylet)" not in out
    assert out.splitlines()[-1] == "interrupted; run the same command again to resume"
    gone(stopped, within=5)
    assert not store.blobs.files("leases")
    assert content(store, a[:2]) == [b"1", b"3"]
    assert attempts(log) == {"a 0.0": 1, "a 1.0": 2, "a 2.0": 1}
