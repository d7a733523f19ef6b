"""The executor: what is computed, in which order, and what happens when something fails."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.execution.executor import Connect, Event, execute, run
from graftwork.cluster.execution.graph import needed, walk
from graftwork.cluster.execution.policy import Failure, Kind, Policy
from graftwork.cluster.execution.schedule import Schedule
from graftwork.cluster.execution.worker import Done, run_stage
from graftwork.cluster.sessions.session import Session, connect
from graftwork.operators.errors import (
    BadDataError,
    ClusterLost,
    ConfigError,
    DamagedStage,
    Diverged,
    GraftworkError,
    OutOfMemory,
    StageFailed,
)
from graftwork.operators.stage import OPERATORS, Resources, Stage
from graftwork.operators.store import Store
from tests.processes import started
from tests.ray_operators import stage

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "src"), str(ROOT)]
FAST = Policy(backoff=0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def diamonds(count: int, **hints: object) -> list[Stage]:
    """A chain of diamonds, three stages each: left and right read the one before, `join` both."""
    joins: list[Stage] = []
    for n in range(count):
        before = (joins[-1],) if joins else ()
        left = stage(f"left {n}", 1, before, **hints)
        right = stage(f"right {n}", 2, before, **hints)
        joins.append(stage(f"join {n}", 0, (left, right), **hints))
    return joins


# --- planning ---------------------------------------------------------------------------------


def test_stored_stage_hides_what_it_reads() -> None:
    a = stage("a")
    b, c = stage("b", 1, (a,)), stage("c", 1, (a,))
    d, e = stage("d", 1, (b,)), stage("e", 1, (c, b))
    assert needed([d, e], lambda s: False).compute == (a, b, d, c, e)
    assert needed([d, e], lambda s: s in (b, c)).compute == (d, e)
    assert needed([d, e], lambda s: s in (d, b)).compute == (a, c, e)
    assert needed([d, e], lambda s: s == b).cached == (b,)
    assert needed([d], lambda s: s == d).compute == ()


def reading(label: str, value: int, *parts: Stage) -> Stage:
    """A stage that adds what it reads of stages whose keys are not in its own."""
    return replace(stage(label, value), reads={"parts": parts})


def test_what_a_key_does_not_hold_is_computed_before_and_found() -> None:
    a, b, other = stage("a"), stage("b", 2), stage("other", 7)
    reader = reading("reader", 1, b, a)
    assert reader.key == stage("reader", 1).key == reading("reader", 1, other).key
    assert reader.preimage["inputs"] == {}
    assert reader.assignment().inputs("parts") == [("work", b.key), ("work", a.key)]
    assert walk([reader]) == (b, a, reader)
    assert needed([reader], lambda s: s == a).compute == (b, reader)
    assert needed([reader], lambda s: s == reader).compute == ()


def test_equal_stages_are_one() -> None:
    twice = [stage("sum", 0, (stage("a"),)), stage("sum", 0, (stage("a"),))]
    assert [s.label for s in walk(twice)] == ["a", "sum"]


def test_deep_graph_needs_no_recursion() -> None:
    assert len(walk(diamonds(1500)[-1:])) == 4500


# --- the loop, on a pool without Ray ----------------------------------------------------------


class FakePool:
    """Runs stages in this process, in the order in which they come, and ends them at random."""

    def __init__(self, store: Store, slots: int = 4, seed: int = 0) -> None:
        self.slots = slots
        self.started: list[str] = []
        self.failures: dict[str, list[Failure]] = {}
        self.cancelled = False
        self._store = store
        self._held: list[Stage] = []
        self._random = random.Random(seed)

    def submit(self, stage: Stage) -> None:
        assert len(self._held) < self.slots
        self.started.append(stage.label)
        self._held.append(stage)

    def wait(self, timeout: float) -> list[tuple[str, Done | Failure]]:
        if not self._held:
            time.sleep(0.001)
            return []
        chosen = self._held.pop(self._random.randrange(len(self._held)))
        if self.failures.get(chosen.label):
            return [(chosen.key, self.failures[chosen.label].pop(0))]
        try:
            operator = OPERATORS[chosen.operator]
            return [(chosen.key, run_stage(operator, chosen.assignment(), self._store))]
        except GraftworkError as error:
            return [(chosen.key, Failure(Kind.FAILED, str(error), error))]

    def cancel(self) -> None:
        self.cancelled = True


def schedule_of(store: Store, *targets: Stage) -> Schedule:
    return Schedule(needed(targets, lambda s: store.has(s.operator, s.key)))


@pytest.mark.parametrize(("count", "seed"), [(100, 0), (10, 1), (10, 2)])
def test_diamonds_run_in_order_and_once(store: Store, count: int, seed: int) -> None:
    joins = diamonds(count)
    events: list[Event] = []
    pool = FakePool(store, seed=seed)
    outcome = run(schedule_of(store, joins[-1]), store, pool, FAST, events.append)
    assert (outcome.total, outcome.computed, outcome.cached) == (3 * count, 3 * count, 0)
    assert set(Counter(pool.started).values()) == {1}
    place = {e.stage.key: n for n, e in enumerate(events) if e.kind == "finished"}
    for event in events:
        for parts in event.stage.inputs.values():
            assert all(place[part.key] < place[event.stage.key] for part in parts)
    assert outcome.fact("images_forwarded") == 3 * count


def test_order_of_starts_is_the_graphs(store: Store) -> None:
    pool = FakePool(store, slots=1)
    first = stage("first", 0, (stage("a"), stage("b")))
    second = stage("second", 0, (stage("c"), stage("d")))
    run(schedule_of(store, first, second), store, pool, FAST)
    assert pool.started == ["a", "b", "first", "c", "d", "second"]


def test_only_what_is_missing_is_computed(store: Store) -> None:
    joins = diamonds(10)
    run(schedule_of(store, joins[4]), store, FakePool(store), FAST)
    pool = FakePool(store)
    outcome = run(schedule_of(store, joins[9]), store, pool, FAST)
    assert (outcome.total, outcome.computed, outcome.cached) == (30, 15, 15)
    assert len(pool.started) == 15


def test_lost_worker_is_tried_again_and_others_go_on(store: Store) -> None:
    pool = FakePool(store, slots=2)
    pool.failures["a"] = [Failure(Kind.LOST, "gone")] * 2
    events: list[Event] = []
    target = stage("sum", 0, (stage("a"), stage("b")))
    outcome = run(schedule_of(store, target), store, pool, FAST, events.append)
    assert outcome.retries == 2
    assert [e.stage.label for e in events if e.kind == "retried"] == ["a", "a"]
    assert Counter(pool.started) == {"a": 3, "b": 1, "sum": 1}


def test_failure_stops_new_stages_and_keeps_finished_ones(store: Store) -> None:
    good, bad = [stage(f"good {n}") for n in range(3)], stage("bad", raises="Diverged")
    reader = stage("reader", 0, (bad, *good))
    pool = FakePool(store, slots=4)
    with pytest.raises(Diverged, match="loss is nan at step 3"):
        run(schedule_of(store, reader), store, pool, FAST)
    assert store.keys("work") == {s.key for s in good}
    assert "reader" not in pool.started


def test_lost_cluster_ends_the_run(store: Store) -> None:
    pool = FakePool(store)
    pool.failures["a"] = [Failure(Kind.DISCONNECTED, "the head does not answer")]
    with pytest.raises(ClusterLost, match="does not answer; the same command resumes"):
        run(schedule_of(store, stage("a")), store, pool, FAST, grace=0.0)


def damage(store: Store, stage: Stage) -> None:
    (path,) = Path(store.url, stage.operator, stage.key).glob("value.json.*")
    path.write_bytes(b"#")


def test_damaged_input_is_set_aside_and_computed_again(store: Store) -> None:
    a = stage("a", 5)
    b = stage("b", 1, (a,))
    readers = [stage(f"reader {n}", n, (b,)) for n in range(4)]
    run(schedule_of(store, b), store, FakePool(store), FAST)
    damage(store, b)
    pool = FakePool(store)
    events: list[Event] = []
    outcome = run(schedule_of(store, *readers), store, pool, FAST, events.append)
    assert outcome.repairs == 1
    assert Counter(pool.started)["b"] == 1
    assert "a" not in pool.started
    assert [e.stage.label for e in events if e.kind == "damaged"] == ["b"]
    assert (outcome.total, outcome.computed, outcome.cached) == (6, 5, 1)
    assert [store.read("work", r.key, "value.json") for r in readers] == [b"6", b"7", b"8", b"9"]
    assert len(list(Path(store.url, "quarantine").iterdir())) == 1


def test_damage_of_what_a_key_does_not_hold_is_mended_too(store: Store) -> None:
    a = stage("a", 5)
    target = reading("reader", 1, a)
    run(schedule_of(store, a), store, FakePool(store), FAST)
    damage(store, a)
    outcome = run(schedule_of(store, target), store, FakePool(store), FAST)
    assert (outcome.repairs, outcome.computed) == (1, 2)
    assert store.read("work", target.key, "value.json") == b"6"


def test_damage_below_damage(store: Store) -> None:
    a = stage("a", 5)
    b = stage("b", 1, (a,))
    run(schedule_of(store, b), store, FakePool(store), FAST)
    damage(store, a)
    damage(store, b)
    target = stage("reader", 1, (b,))
    outcome = run(schedule_of(store, target), store, FakePool(store), FAST)
    assert outcome.repairs == 2
    assert store.read("work", target.key, "value.json") == b"7"


def test_damage_that_comes_back_ends_the_run(store: Store) -> None:
    a = stage("a")
    target = stage("reader", 1, (a,))
    found = DamagedStage("work", a.key, "value.json is missing")
    pool = FakePool(store, slots=1)
    pool.failures["reader"] = [Failure(Kind.FAILED, str(found), found)] * 99
    with pytest.raises(DamagedStage):
        run(schedule_of(store, target), store, pool, FAST)
    assert pool.started.count("a") <= 1 + FAST.repairs


def test_damage_outside_the_graph_is_an_error(store: Store) -> None:
    found = DamagedStage("work", "0" * 64, "gone")
    pool = FakePool(store)
    pool.failures["a"] = [Failure(Kind.FAILED, str(found), found)]
    with pytest.raises(DamagedStage):
        run(schedule_of(store, stage("a")), store, pool, FAST)


# --- on Ray -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with connect(None, num_cpus=2) as opened:
        yield opened


@pytest.fixture
def on(session: Session) -> Connect:
    def same() -> AbstractContextManager[Session]:
        return nullcontext(session)

    return same


def test_diamonds_on_ray(store: Store, on: Connect, tmp_path: Path) -> None:
    target = diamonds(100, log=str(tmp_path))[-1]
    outcome = execute([target], store, connect=on)
    assert outcome.computed == 300
    attempts = Counter(path.name.rpartition(".")[0] for path in tmp_path.glob("*.*"))
    assert set(attempts.values()) == {1}
    assert len(attempts) == 300
    assert len(store.keys("work")) == 300
    again = execute([target], store, connect=lambda: pytest.fail("Ray is not needed"))
    assert (again.computed, again.cached) == (0, 300)
    # Workers stay: importing torch costs seconds.
    assert len({done.worker for done in outcome.done.values()}) <= 4


def test_worker_killed_once(store: Store, on: Connect, tmp_path: Path) -> None:
    parts = (stage("a"), stage("killed", kill=1, log=str(tmp_path)))
    target = stage("sum", 0, parts)
    outcome = execute([target], store, connect=on, policy=FAST)
    assert outcome.retries == 1
    assert store.read("work", target.key, "value.json") == b"2"


def test_worker_killed_always(store: Store, on: Connect, tmp_path: Path) -> None:
    good = [stage(f"good {n}") for n in range(4)]
    poison = stage("poison", kill=99, log=str(tmp_path))
    with pytest.raises(StageFailed, match="stage poison failed: its worker died 4 times"):
        execute([stage("sum", 0, (poison, *good))], store, connect=on, policy=FAST)
    assert store.keys("work") == {s.key for s in good}
    assert len(list(tmp_path.glob("poison.*"))) == 4


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "ValueError",
            StageFailed,
            "stage x failed: ValueError: no good second line; the same command resumes",
        ),
        ("OddError", StageFailed, "stage x failed: OddError: a and b; the same command resumes"),
        ("Diverged", Diverged, "loss is nan at step 3"),
        ("BadDataError", BadDataError, "cat.png: not an image"),
        ("ConfigError", ConfigError, "lr: must be positive"),
        (
            "OutOfMemory",
            OutOfMemory,
            "stage x: CUDA out of memory; lower resources.work.batch_size, "
            "the same command resumes",
        ),
        (
            "MemoryError",
            OutOfMemory,
            "stage x: MemoryError: ; lower resources.work.batch_size (now 64), "
            "the same command resumes",
        ),
    ],
)
def test_errors_keep_their_class(
    store: Store, on: Connect, tmp_path: Path, name: str, kind: type[GraftworkError], message: str
) -> None:
    hints: dict[str, Any] = {"batch_size": 64} if name == "MemoryError" else {}
    with pytest.raises(GraftworkError) as caught:
        execute([stage("x", raises=name, log=str(tmp_path), **hints)], store, connect=on)
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert caught.value.exit_code == kind.exit_code
    cause = caught.value.__cause__ or caught.value
    assert "ray_operators.py" in "".join(cause.__notes__)
    assert len(list(tmp_path.glob("x.*"))) == 1  # never tried again


def test_damage_on_ray(store: Store, on: Connect) -> None:
    a = stage("a", 5)
    execute([a], store, connect=on)
    damage(store, a)
    target = stage("reader", 1, (a,))
    assert execute([target], store, connect=on).repairs == 1
    assert store.read("work", target.key, "value.json") == b"6"


def test_too_large_a_request_is_refused_at_once(store: Store, on: Connect) -> None:
    stage("")  # registers the operator
    large = Stage(operator="work", parameters={}, resources=Resources(gpus=1), label="large")
    with pytest.raises(ConfigError, match=r"resources\.work\.gpus=1 but the cluster has 0 GPUs"):
        execute([stage("a"), large], store, connect=on)
    assert not store.keys("work")


def test_error_of_a_listener_ends_the_run(store: Store, on: Connect) -> None:
    def broken(event: Event) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        execute([stage("a")], store, connect=on, on_event=broken)


DRIVER = """
import sys
sys.path[:0] = {paths!r}
from functools import partial
from graftwork.cluster.execution.executor import execute
from graftwork.cluster.sessions.session import connect
from graftwork.operators.errors import GraftworkError
from graftwork.operators.store import Store
from tests.ray_operators import stage
parts = tuple(stage(f"s {{n}}", n, seconds=0.0 if n == 0 else 60.0) for n in range(4))
def tell(event):
    print(event.kind, event.stage.label, flush=True)
try:
    execute([stage("sum", 0, parts)], Store({store!r}), connect=partial(connect, None, num_cpus=2),
            on_event=tell)
except GraftworkError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_signals_end_a_driver_within_seconds(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path / name)) for name in ("term", "interrupt")]
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(
                started(
                    [sys.executable, "-c", DRIVER.format(paths=PATHS, store=store.url)],
                    text=True,
                    start_new_session=True,
                    env={n: v for n, v in os.environ.items() if not n.startswith("RAY_")},
                )
            )
            for store in stores
        ]
        for driver in drivers:
            assert driver.stdout is not None
            assert any(line.startswith("finished") for line in driver.stdout)
        time.sleep(0.5)
        cases = zip(drivers, stores, (signal.SIGTERM, signal.SIGINT), (143, 130), strict=True)
        for driver, store, number, status in cases:
            start = time.monotonic()
            driver.send_signal(number)
            out, err = driver.communicate(timeout=30)
            assert (driver.returncode, out) == (
                status,
                "interrupted; run the same command again to resume\n",
            ), err
            assert time.monotonic() - start < 20  # about two seconds on an idle machine
            assert len(store.keys("work")) == 1
            assert not list(Path(store.url).rglob("*.tmp"))
            deadline = time.monotonic() + 5
            while members(driver.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert members(driver.pid) == []


def members(session_id: int) -> list[str]:
    """Processes of a session (a driver's, with all that its Ray has started)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if int(fields[3]) == session_id and fields[0] != "Z":
            found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


def test_stored_graph_never_imports_ray(store: Store) -> None:
    target = diamonds(3)[-1]
    run(schedule_of(store, target), store, FakePool(store), FAST)
    program = f"""
import sys
sys.path[:0] = {PATHS!r}
from graftwork.cluster.execution.executor import execute
from graftwork.operators.store import Store
from tests.test_executor import diamonds
outcome = execute([diamonds(3)[-1]], Store({store.url!r}))
print(outcome.cached, outcome.computed, "ray" in sys.modules, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "9 0 False False\n", result.stderr
