"""Chains without Ray: stored one by one, resumed, and which worker group gets which stages."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.cluster.execution.chain_groups import Chains
from graftwork.cluster.execution.chain_worker import Broken, Progress, run_chain
from graftwork.cluster.execution.executor import chain_leases
from graftwork.cluster.execution.graph import needed
from graftwork.cluster.execution.policy import Failure, Kind
from graftwork.cluster.execution.preflight import check_resources
from graftwork.cluster.execution.worker import Done
from graftwork.cluster.sessions.session import Node
from graftwork.operators import live
from graftwork.operators.errors import ConfigError, DamagedStage, Diverged, StageFailed
from graftwork.operators.stage import OPERATORS, Resources, Stage
from graftwork.operators.store import Store
from tests.ray_operators import chain, stage

# --- progress ---------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    live.say(task=1)


def test_the_newest_wins_and_the_last_is_never_lost() -> None:
    heard: list[live.Facts] = []
    with live.sink(heard.append, interval=60.0):
        for step in range(1000):
            live.say(step=step)
        assert heard == [{"step": 0}]
    assert heard == [{"step": 0}, {"step": 999}]
    live.say(step=1000)
    assert len(heard) == 2


# --- one process ------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def run(stages: list[Stage], store: Store) -> list[Done | Progress | Broken]:
    told: list[Done | Progress | Broken] = []
    work = [(OPERATORS[stage.operator], stage.assignment()) for stage in stages]
    try:
        run_chain(work, store, 1, told.append)
    except Exception as error:
        assert isinstance(told[-1], Broken)
        assert told[-1].error is error
    return told


def values(stages: list[Stage], store: Store) -> list[int]:
    return [json.loads(store.read(s.operator, s.key, "value.json")) for s in stages]


def test_stages_are_stored_one_after_the_other(store: Store) -> None:
    stages = chain("a", 3)
    told = run(stages, store)
    assert [(type(message), message.key) for message in told] == [
        (kind, stage.key) for stage in stages for kind in (Progress, Done)
    ]
    assert values(stages, store) == [1, 3, 6]


def test_what_is_stored_is_not_computed_again(store: Store, tmp_path: Path) -> None:
    stages = chain("a", 3, per_task={n: {"log": str(tmp_path)} for n in range(3)})
    run(stages[:2], store)
    told = run(stages, store)
    assert [message.reused for message in told if isinstance(message, Done)] == [True, True, False]
    assert len(list(tmp_path.glob("a *"))) == 3


def test_an_error_names_its_stage_and_keeps_what_was_before(store: Store) -> None:
    stages = chain("a", 3, per_task={1: {"raises": "Diverged"}})
    *_, broken = run(stages, store)
    assert isinstance(broken, Broken)
    assert (broken.key, type(broken.error), broken.peer_lost) == (stages[1].key, Diverged, False)
    assert "ray_operators.py" in "".join(broken.error.__notes__)
    assert store.keys("count") == {stages[0].key}


def test_a_damaged_input_is_named(store: Store) -> None:
    stages = chain("a", 2)
    run(stages[:1], store)
    (path,) = Path(store.url, "count", stages[0].key).glob("value.json.*")
    path.write_bytes(b"#")
    *_, broken = run(stages[1:], store)
    assert isinstance(broken, Broken)
    assert isinstance(broken.error, DamagedStage)
    assert broken.error.stage_key == stages[0].key


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_peer_is_no_error_of_the_stage(
    store: Store, monkeypatch: pytest.MonkeyPatch, message: str, lost: bool
) -> None:
    from tests import ray_operators

    monkeypatch.setitem(ray_operators.ERRORS, "RuntimeError", RuntimeError(message))
    *_, broken = run(chain("a", 1, per_task={0: {"raises": "RuntimeError"}}), store)
    assert isinstance(broken, Broken)
    assert (type(broken.error), broken.peer_lost) == (StageFailed, lost)


# --- which group gets which stages ------------------------------------------------------------


class Groups:
    """Worker groups that only remember what they were given."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []

    def start(self, stages: list[Stage]) -> int:
        self.given.append([stage.label for stage in stages])
        return len(self.given) - 1


def done(stage: Stage) -> tuple[str, Done]:
    return stage.key, Done(key=stage.key, seconds=0.0)


def chains_of(
    *targets: Stage, stored: Callable[[Stage], bool] = lambda s: False, cpus: float = 2
) -> tuple[Chains[int], Groups]:
    groups = Groups()
    return Chains(needed(targets, stored), cpus, 0, groups.start), groups


LOST = Failure(Kind.LOST, "gone")


def test_one_group_for_a_chain_that_runs_ahead() -> None:
    a = chain("a", 3)
    chains, groups = chains_of(a[2])
    chains.submit(a[0])
    assert groups.given == [["a 0", "a 1", "a 2"]]
    chains.told(0, [done(a[0]), (a[1].key, Progress(a[1].key, {})), done(a[1])])
    assert chains.results() == [done(a[0])]
    chains.submit(a[1])
    assert chains.results() == [done(a[1])]
    chains.submit(a[2])
    assert chains.results() == []
    chains.told(0, [done(a[2])])
    chains.ended(0)
    assert chains.results() == [done(a[2])]
    assert (chains.starts, chains.groups, chains.waiting) == (1, {}, {})


def test_only_what_is_wanted_and_not_stored() -> None:
    a = chain("a", 5)
    chains, groups = chains_of(a[3], stored=lambda s: s == a[1])
    chains.submit(a[2])
    assert groups.given == [["a 2", "a 3"]]


def test_groups_wait_for_room_and_chains_go_on_in_order() -> None:
    a, b, c = (chain(name, 2, workers=2) for name in "abc")
    chains, groups = chains_of(a[1], b[1], c[1], cpus=4)
    for first in (a[0], b[0], c[0]):
        chains.submit(first)
    assert groups.given == [["a 0", "a 1"], ["b 0", "b 1"]]
    chains.told(0, [done(a[0]), done(a[1])])
    chains.ended(0)
    assert groups.given[2:] == [["c 0", "c 1"]]


def test_a_group_larger_than_the_cluster_runs_alone() -> None:
    a, b = chain("a", 1, workers=9), chain("b", 1)
    chains, groups = chains_of(a[0], b[0])
    chains.submit(a[0])
    chains.submit(b[0])
    assert groups.given == [["a 0"]]


def test_a_lost_group_starts_again_where_it_was() -> None:
    a = chain("a", 3)
    chains, groups = chains_of(a[2])
    chains.submit(a[0])
    chains.told(0, [done(a[0])])
    chains.ended(0, LOST)
    assert chains.results() == [done(a[0])]
    chains.submit(a[1])
    assert chains.results() == [(a[1].key, LOST)]
    assert chains.starts == 1
    chains.submit(a[1])
    assert groups.given[1:] == [["a 1", "a 2"]]


def test_stages_that_a_lost_group_has_not_reached_get_another() -> None:
    a = chain("a", 3)
    chains, groups = chains_of(a[0], a[2], stored=lambda s: s == a[1])
    chains.submit(a[0])
    chains.submit(a[2])
    assert groups.given == [["a 0", "a 2"]]
    chains.ended(0, LOST)
    assert chains.results() == [(a[0].key, LOST)]
    assert groups.given[1:] == [["a 2"]]


def test_a_damaged_stage_of_a_running_chain_waits_for_its_group() -> None:
    a = chain("a", 3)
    chains, groups = chains_of(a[2])
    chains.submit(a[0])
    chains.told(0, [done(a[0])])
    chains.results()
    chains.submit(a[1])
    chains.submit(a[0])  # its reader has found it damaged
    assert chains.starts == 1
    chains.told(0, [done(a[1]), done(a[2])])
    chains.ended(0)
    assert groups.given[1:] == [["a 0"]]


def test_a_group_stops_before_a_stage_that_reads_what_is_not_there() -> None:
    a = chain("a", 1)
    late = stage("late", 1)
    more = replace(chain("a", 2)[1], inputs={"previous": (a[0], late)})
    chains, groups = chains_of(more)
    chains.submit(a[0])
    assert groups.given == [["a 0"]]
    chains.told(0, [done(a[0])])
    chains.ended(0)
    chains.finished(late.key)
    chains.submit(more)
    assert groups.given[1:] == [["a 1"]]


def test_leases_go_by_the_first_stage_of_a_chain() -> None:
    a, b = chain("a", 3), chain("b", 3)
    plan = needed([a[2], b[2]], lambda s: s in (a[1], b[2]))
    assert chain_leases(plan) == {a[0].key: "a"}


# --- does it fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "nodes", "message"),
    [
        (
            Resources(workers=4),
            [(2, 0), (1, 0)],
            "resources.count.workers=4 with 1 CPUs each, but the cluster has room for 3: 3 CPUs "
            "and 0 GPUs; lower resources.count.workers, resources.count.cpus or "
            "resources.count.gpus",
        ),
        (
            Resources(workers=3, cpus=2, gpus=1),
            [(8, 2), (8, 0)],
            "resources.count.workers=3 with 2 CPUs and 1 GPUs each, but the cluster has room for "
            "2: 16 CPUs and 2 GPUs; lower resources.count.workers, resources.count.cpus or "
            "resources.count.gpus",
        ),
        (
            Resources(workers=2, cpus=3),
            [(2, 0), (2, 0)],
            "resources.count.cpus=3 but no node has more than 2 CPUs",
        ),
        (Resources(workers=4, cpus=0.5), [(2, 0)], None),
    ],
)
def test_a_group_must_fit_into_the_cluster(
    resources: Resources, nodes: list[tuple[int, int]], message: str | None
) -> None:
    asked = [replace(stage, resources=resources) for stage in chain("a", 3)]
    cluster = [Node("n", "10.0.0.1", cpus, gpus) for cpus, gpus in nodes]
    if message is None:
        check_resources(asked, cluster)
        return
    with pytest.raises(ConfigError) as caught:
        check_resources(asked, cluster)
    assert str(caught.value) == message
