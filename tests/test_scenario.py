"""Class orders and tasks."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.operators.errors import ConfigError
from graftwork.operators.streams.scenario import (
    StreamTask,
    class_order,
    domain_order,
    expand,
    grouped,
    task_sizes,
    tasks,
)

# Orders of seed 1993 in LAMDA-PILOT: first ids, digest of the JSON list.
PUBLISHED = {
    100: ([68, 56, 78, 8, 23, 84, 90, 65, 74, 76], "e90204efdce7db6c"),
    200: ([168, 136, 51, 9, 183, 101, 171, 99, 42, 159], "b113214bc61598d0"),
    300: ([169, 221, 146, 296, 92, 229, 49, 70, 126, 77], "28f846a95c20caae"),
    196: ([59, 134, 162, 9, 42, 72, 118, 99, 109, 79], "7e078ddfbad62090"),
    50: ([43, 41, 23, 14, 13], "e3502ca0610c64de"),
}


@pytest.mark.parametrize("num_classes", PUBLISHED)
def test_orders_equal_the_published_ones(num_classes: int) -> None:
    first, digest = PUBLISHED[num_classes]
    order = class_order(num_classes, 1993)
    assert list(order[: len(first)]) == first
    assert hashlib.sha256(json.dumps(list(order)).encode()).hexdigest().startswith(digest)


def test_the_published_order_of_100_classes_ends_as_logged() -> None:
    assert class_order(100, 1993)[-5:] == (67, 29, 49, 57, 33)


def test_natural_and_explicit_orders() -> None:
    assert class_order(4, "natural") == (0, 1, 2, 3)
    assert class_order(4, [3, 1, 0, 2]) == (3, 1, 0, 2)


def test_names_stand_for_ids() -> None:
    assert class_order(3, ["cow", "cat", "dog"], ("cat", "cow", "dog")) == (1, 0, 2)
    # Of a data set without names the numbers are the names.
    assert class_order(3, ["2", "0", "1"]) == (2, 0, 1)


def test_an_order_is_kept_when_classes_are_added() -> None:
    assert class_order(5, [3, 1, 0]) == (3, 1, 0, 2, 4)
    names = ("ape", "bee", "cat", "dog")
    assert class_order(4, ["dog", "bee"], names) == (3, 1, 0, 2)
    # What a seed draws depends on the number of classes, which may be said.
    former = class_order(10, 1993)
    assert class_order(12, "1993 of 10") == (*former, 10, 11)
    assert class_order(10, "1993 of 10") == former != class_order(12, 1993)[:10]
    assert domain_order(("photo", "art", "sketch"), ["sketch"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ([0, 1, 1], "more than once 1"),
        ([0, 1, 7], "unknown 7"),
        ([-1, 0], "unknown -1"),
        (["0", "zero", "0"], "unknown zero; more than once 0"),
    ],
)
def test_an_explicit_order_that_is_no_permutation_names_the_ids(
    order: list[int], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        class_order(3, order)
    start = "scenario.orders: each class is named once, and the data set has 3 classes: "
    assert str(caught.value) == start + problem


def test_an_order_of_more_classes_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match='"1993 of 10" is an order of 10 classes, the data set'):
        class_order(9, "1993 of 10")


@pytest.mark.parametrize(
    ("num_classes", "initial", "increment", "sizes"),
    [
        (100, 10, 10, (10,) * 10),
        (100, None, 10, (10,) * 10),
        (100, 50, 10, (50, 10, 10, 10, 10, 10)),
        (196, 16, 20, (16,) + (20,) * 9),
        (196, 20, 20, (20,) * 9 + (16,)),
        (10, 10, 3, (10,)),
        (10, 3, 20, (3, 7)),
    ],
)
def test_task_sizes(
    num_classes: int, initial: int | None, increment: int, sizes: tuple[int, ...]
) -> None:
    assert task_sizes(num_classes, initial, increment) == sizes


def test_a_first_task_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        task_sizes(10, None, 20)
    assert str(caught.value) == (
        "scenario.increment: task 0 wants 20 classes, the data set has 10; use at most 10"
    )


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(1, 60), st.data())
def test_tasks_partition_the_classes(num_classes: int, data: st.DataObject) -> None:
    initial = data.draw(st.none() | st.integers(1, num_classes))
    increment = data.draw(st.integers(1, num_classes))
    seed = data.draw(st.integers(0, 2**32 - 1))
    stream = tasks(
        "class_incremental",
        [str(n) for n in range(num_classes)],
        (),
        task_sizes(num_classes, initial, increment),
        seed,
    )
    assert sum((t.classes for t in stream), ()) == class_order(num_classes, seed)
    assert [t.name for t in stream] == [f"task {n + 1}" for n in range(len(stream))]


def test_class_incremental_tasks_take_every_domain() -> None:
    stream = tasks("class_incremental", "abcd", ("b", "a"), (2, 2), "natural")
    assert stream == (
        StreamTask(name="task 1", classes=(0, 1), domains=(0, 1)),
        StreamTask(name="task 2", classes=(2, 3), domains=(0, 1)),
    )


def test_domain_incremental_tasks_have_all_classes_and_one_domain() -> None:
    names = ("photo", "art", "sketch")
    stream = tasks("domain_incremental", "ab", names, None, "natural")
    assert [t.domains for t in stream] == [(1,), (0,), (2,)]  # art, photo, sketch
    assert all(t.classes == (0, 1) for t in stream)
    assert [t.name for t in stream] == ["art", "photo", "sketch"]


def test_domain_orders() -> None:
    names = ("photo", "art", "sketch")
    expected = [sorted(names)[i] for i in np.random.RandomState(7).permutation(3)]
    assert [names[i] for i in domain_order(names, 7)] == expected
    assert domain_order(names, ["sketch", "photo", "art"]) == (2, 0, 1)
    with pytest.raises(ConfigError, match="the data set has 3 domains: unknown skech"):
        domain_order(names, ["skech"])


def test_sizes() -> None:
    stream = tasks("class_incremental", "abcdef", (), (3, 1, 2), [5, 4, 3, 2, 1, 0])
    assert [t.classes for t in stream] == [(5, 4, 3), (2,), (1, 0)]
    stream = tasks("domain_incremental", "ab", ("x", "y", "z"), (2, 1), "natural")
    assert [(t.name, t.domains) for t in stream] == [("x + y", (0, 1)), ("z", (2,))]


def test_tasks_that_are_listed() -> None:
    names = ("ape", "bee", "cat", "dog")
    by_name = grouped("class_incremental", names, (), [["cat", "ape"], ["dog"]])
    assert [t.classes for t in by_name] == [(2, 0), (3,)]
    assert by_name == grouped("class_incremental", names, (), [[2, 0], [3]])
    domains = ("photo", "art", "sketch")
    by_domain = grouped("domain_incremental", "ab", domains, [["sketch", "photo"], ["art"]])
    assert [(t.name, t.classes, t.domains) for t in by_domain] == [
        ("sketch + photo", (0, 1), (2, 0)),
        ("art", (0, 1), (1,)),
    ]


def test_a_stream_that_the_data_cannot_give_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.domain: the data names no domain"):
        tasks("domain_incremental", "ab", (), None, "natural")
    with pytest.raises(ConfigError, match=r"scenario\.sizes: they add up to 3, the data set has 2"):
        tasks("class_incremental", "ab", (), (2, 1), "natural")
    with pytest.raises(ConfigError, match=r"scenario\.tasks: each class is named once.*once b"):
        grouped("class_incremental", "ab", (), [["a", "b"], ["b"]])


def test_expand() -> None:
    assert expand("natural") == ("natural",)
    assert expand([1993, "natural", (1, 0)]) == (1993, "natural", [1, 0])
    assert expand({"count": 3, "first": 5}) == (5, 6, 7)
    assert expand({"count": 2}) == (0, 1)
