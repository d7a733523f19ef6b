"""What methods ask of a stream: the number of tasks, room for them; said, checked, and honest."""

import dataclasses
from typing import Any

import pytest
import torch

from graftwork import methods
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.stream import Passes, Room, StreamNeeds, stream_needs
from graftwork.methods.contracts.trained import trains
from graftwork.operators import catalogue
from graftwork.operators.errors import ConfigError
from graftwork.operators.store import Store
from graftwork.operators.training import loop
from graftwork.operators.training.settings import Settings
from graftwork.pipelines.planning.checks import check_room
from graftwork.pipelines.planning.methods import method_of
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.spec.loading import load_resolved
from tests import test_conformance as conformance
from tests import tiny

NEEDS: list[tuple[str, dict[str, Any], StreamNeeds]] = [
    ("coda_prompt", {}, StreamNeeds(count=True, room=Room(field="pool_size", size=100))),
    (
        "coda_prompt",
        {"pool_size": 7},
        StreamNeeds(count=True, room=Room(field="pool_size", size=7)),
    ),
    ("coda_prompt", {"components_per_task": 3}, StreamNeeds()),
    ("dualprompt", {}, StreamNeeds()),
    ("dualprompt", {"candidate_keys": "all"}, StreamNeeds(count=True)),
    ("l2p", {}, StreamNeeds()),
    (
        "l2p",
        {"train_selection": "task", "pool_size": 23, "top_n": 4},
        StreamNeeds(room=Room(field="pool_size", size=23, per_task=4)),
    ),
    ("finetune", {}, StreamNeeds()),
    ("lae", {}, StreamNeeds(passes=Passes(field="freeze_epochs", count=3))),
    ("lae", {"freeze_epochs": 0}, StreamNeeds()),
    ("aper_adapter", {}, StreamNeeds()),
    ("ranpac", {"first_session": "adapter"}, StreamNeeds()),
    ("ranpac", {}, StreamNeeds()),
    ("promptfusion", {}, StreamNeeds()),
    ("simplecil", {}, StreamNeeds()),
]


@pytest.mark.parametrize(("name", "values", "wanted"), NEEDS)
def test_what_a_method_asks_is_known_to_planning(
    name: str, values: dict[str, Any], wanted: StreamNeeds
) -> None:
    described, problems = catalogue.method(name, values)
    assert problems == []
    planned = method_of(name, name, described)
    assert planned.needs == wanted
    assert all(branch.needs == StreamNeeds() for branch in planned.branches.values())


def test_room_is_whole_tasks() -> None:
    assert [Room(field="n", size=size, per_task=5).tasks for size in (4, 5, 9, 10)] == [0, 1, 1, 2]


def start(case: conformance.Case, count: int | None) -> State:
    """Every tensor of the second task's learner before its first step."""
    task = dataclasses.replace(conformance.stream(case)[-1], count=count)
    learner, _ = loop.open_learner(
        trains(case.method), conformance.network(case), task, None, Settings(seed=0)
    )
    learner.reference = conformance.reference(case)
    learner.begin()
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


CASES = [
    *conformance.CASES,
    conformance.Case("dualprompt-all", "dualprompt", (("candidate_keys", "all"),)),
    conformance.Case("l2p-task", "l2p", (("train_selection", "task"),)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_only_what_says_so_depends_on_the_number_of_tasks(case: conformance.Case) -> None:
    if stream_needs(case.method).count:
        assert any(
            len(two) != len(four)
            for two, four in zip(start(case, 2).values(), start(case, 4).values(), strict=True)
        )
        with pytest.raises(ValueError, match="count: must be the number of tasks"):
            start(case, None)
        return
    unknown, seven = start(case, None), start(case, 7)
    assert unknown.keys() == seven.keys()
    assert all(torch.equal(unknown[name], seven[name]) for name in unknown)


def test_a_method_of_the_table_that_asks_something_is_tested_above() -> None:
    asking = {name for name in methods.METHODS if hasattr(methods.load(name), "stream_needs")}
    assert asking == {"coda_prompt", "dualprompt", "l2p", "lae"}


def plan(store: Store, *overrides: str) -> Plan:
    """The digits of the quickstart: ten classes."""
    return make_plan(load_resolved("quickstart", [*overrides]), store.memo)


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(str(tmp_path / "store"))


def test_more_tasks_than_there_is_room_for_are_refused_while_planning(store: Store) -> None:
    l2p = "{l2p: {train_selection: task, pool_size: 27}}"
    one = ("scenario.increment=1", "scenario.initial=null")
    with pytest.raises(ConfigError) as caught:
        plan(
            store, f"methods=[simplecil, {l2p}, finetune, {{coda_prompt: {{pool_size: 9}}}}]", *one
        )
    said = "room for 5 tasks, the stream has 10; give at least 50"
    first, second = caught.value.lines()
    assert first.endswith(f"methods.1.l2p.pool_size: {said}")
    said = "room for 9 tasks, the stream has 10; give at least 10"
    assert second.endswith(f"methods.3.coda_prompt.pool_size: {said}")
    assert caught.value.parts[0].key == "methods.1.l2p.pool_size"
    # A pool that grows has room for all; null is the default.
    coda = "coda_prompt: {pool_size: 1, components_per_task"
    assert plan(store, f"methods=[{{{coda}: 2}}}}]", *one).runs
    with pytest.raises(ConfigError, match="room for 1 task, the stream has 10"):
        plan(store, f"methods=[{{{coda}: null}}}}]", *one)
    # Where the stream ends early, or has larger tasks, there is room.
    assert plan(store, f"methods=[simplecil, {l2p}]", *one, "scenario.tasks=5").runs
    assert plan(store, f"methods=[simplecil, {l2p}]", "scenario.increment=2").runs


def test_a_limit_is_that_of_the_method_and_not_of_the_class() -> None:
    by_batch = method_of("l2p", "l2p", catalogue.method("l2p", {"pool_size": 5})[0])
    check_room([by_batch], 1000)
    one = {"train_selection": "task", "pool_size": 5}
    own = dataclasses.replace(
        method_of("l2p", "l2p", catalogue.method("l2p", one)[0]), key="methods.0.l2p"
    )
    check_room([own], 1)
    with pytest.raises(ConfigError, match="room for 1 task, the stream has 2; give at least 10"):
        check_room([own], 2)


def test_the_last_defence_of_a_learner_needs_no_number_of_tasks() -> None:
    method = methods.build("l2p", {"train_selection": "task", "pool_size": 10, "top_n": 5})
    for index in (0, 1):
        method.learner(tiny.vit(2), dataclasses.replace(tiny.task(index), count=None))
    with pytest.raises(ValueError, match="15 for task 3, got 10"):
        method.learner(tiny.vit(2), dataclasses.replace(tiny.task(2), count=None))
