"""Chains on Ray Train: one start for all tasks, and what happens when something dies."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.executor import Event, Outcome, execute
from cluster.policy import Policy
from cluster.pool import RayPool
from cluster.session import Session, connect
from operators.errors import Diverged, RunHeld
from operators.stage import Stage
from operators.store import Store
from tests.ray_operators import chain, stage
from tests.test_executor import members

ROOT = Path(__file__).resolve().parent.parent
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
    start = time.monotonic()
    outcome = compute(session, store, reader, a[2], on_event=on_event)
    assert time.monotonic() - start < 55.0  # the reader did not wait for the last task
    assert pools[0].chains.starts == 1
    assert content(store, a) == [b"2", b"6", b"12"]
    assert outcome.computed == 4
    assert all(done.node for done in outcome.done.values())
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
        if event.kind == "progress" and event.stage == a[2] and retried == ["a 1"]:
            for pid in pids("ray::TrainController"):
                os.kill(pid, signal.SIGKILL)
        if event.kind == "retried":
            retried.append(event.stage.label)
            if event.stage == a[2]:
                go.touch()

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
sys.path.insert(0, {root!r})
from functools import partial
from cluster.executor import execute
from cluster.session import connect
from operators.errors import GraftworkError
from operators.store import Store
from tests.ray_operators import chain
def tell(event):
    print(event.kind, event.stage.label, flush=True)
hints = {{n: {{"log": {log!r}}} for n in range(3)}}
hints[1] |= {{"wait_for": {go!r}, "seconds": 120.0}}
try:
    execute([chain("a", 3, per_task=hints)[2]], Store({store!r}),
            connect=partial(connect, None, num_cpus=1), on_event=tell)
except GraftworkError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_driver_stopped_and_killed_in_the_middle(
    session: Session, pools: list[RayPool], tmp_path: Path
) -> None:
    folders = [tmp_path / "stopped", tmp_path / "killed"]
    drivers: list[subprocess.Popen[str]] = []
    for folder in folders:
        (folder / "log").mkdir(parents=True)
        program = DRIVER.format(
            root=str(ROOT),
            store=str(folder / "store"),
            log=str(folder / "log"),
            go=str(folder / "go"),
        )
        drivers.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={n: v for n, v in os.environ.items() if not n.startswith("RAY_")},
            )
        )
    for driver in drivers:
        assert driver.stdout is not None
        assert any(line == "progress a 1\n" for line in driver.stdout)
    stopped, killed = drivers
    store = Store(str(folders[1] / "store"))
    a = chain("a", 3, per_task={n: {"log": str(folders[1] / "log")} for n in range(3)})

    # A second run does not train the same beside it.
    with pytest.raises(RunHeld, match=rf"a is being trained by \S+/{killed.pid} since"):
        compute(session, store, a[2])

    start = time.monotonic()
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=30)
    assert (stopped.returncode, out) == (
        143,
        "interrupted; run the same command again to resume\n",
    ), err
    assert time.monotonic() - start < 4.0
    assert not Store(str(folders[0] / "store")).blobs.files("leases")
    killed.kill()
    killed.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while (left := trainers(stopped.pid) + trainers(killed.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []

    outcome = compute(session, store, a[2])
    assert (outcome.computed, outcome.cached) == (2, 1)
    assert pools[-1].chains.starts == 1
    assert content(store, a) == [b"1", b"3", b"6"]
    assert attempts(folders[1] / "log") == {"a 0.0": 1, "a 1.0": 2, "a 2.0": 1}
