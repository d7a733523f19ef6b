"""Class orders and tasks: pure values, no data.

A class order lists the data set's own class ids in the order in which they are learned; the
first `initial` of them are task 0. Orders drawn from a seed equal those of LAMDA-PILOT and of
every code base that shares its protocol.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from graftwork.operators.errors import ConfigError

Kind = Literal["class_incremental", "domain_incremental"]

OrderName = int | str | list[int] | list[str]
"""Name of a class order in specs, keys and results: a seed, "natural", "SEED of COUNT", or the
order itself."""

LISTED: OrderName = "listed"
"""Name of the order of tasks that are listed one by one."""

MAX_SEED = 2**32 - 1
FORMER = re.compile(r"(\d{1,10}) of (\d{1,9})")
"""An order that a seed drew of so many classes, before more came."""


@dataclass(frozen=True, kw_only=True)
class StreamTask:
    """Classes and domains that are learned at one step.

    Args:
        name: what people call it.
        classes: class ids in learning order.
        domains: numbers of the domains whose images belong to the task, in the data set's
            numbering; data without domains are one domain, 0.
    """

    name: str
    classes: tuple[int, ...]
    domains: tuple[int, ...] = (0,)


def expand(orders: Sequence[Any] | Mapping[str, int] | str) -> tuple[OrderName, ...]:
    """The orders of a spec, one by one.

    Args:
        orders: list of seeds, "natural" and explicit lists; or "natural"; or
            `{"count": n, "first": 0}` for n consecutive seeds.

    Returns:
        One JSON-friendly name per order.
    """
    if isinstance(orders, str):
        return (orders,)
    if isinstance(orders, Mapping):
        first = orders.get("first", 0)
        return tuple(range(first, first + orders["count"]))
    return tuple(list(o) if isinstance(o, (list, tuple)) else o for o in orders)


def class_order(
    num_classes: int, order: OrderName | tuple[int, ...], names: Sequence[str] = ()
) -> tuple[int, ...]:
    """Class ids in learning order; classes that an order does not know follow it as they are.

    Args:
        num_classes: number of classes of the data set.
        order: seed, which permutes all classes; "natural" (0, 1, 2, ...); "1993 of 10", the order
            that seed 1993 drew when there were ten classes; or ids or names.
        names: of the classes, by id.

    Returns:
        A permutation of 0 .. num_classes - 1.

    Raises:
        ConfigError: an explicit order that names a class twice, or one that does not exist; an
            order of more classes than there are.
    """
    if isinstance(order, str) and (former := FORMER.fullmatch(order)):
        seed, count = map(int, former.groups())
        if count > num_classes:
            raise ConfigError(
                f'"{order}" is an order of {count} classes, the data set has {num_classes}',
                key="scenario.orders",
            )
        return _drawn(count, seed) + tuple(range(count, num_classes))
    if isinstance(order, int):
        return _drawn(num_classes, order)
    if isinstance(order, str):
        return tuple(range(num_classes))
    known = ids_of(order, names or [str(number) for number in range(num_classes)], "class")
    given = set(known)
    return (*known, *(number for number in range(num_classes) if number not in given))


def _drawn(count: int, seed: int) -> tuple[int, ...]:
    """Numbers 0..count-1 in the order that a seed draws."""
    # Imported here because the spec imports this module and must start fast.
    import numpy as np

    # The legacy generator: default_rng gives other orders than the published ones.
    return tuple(np.random.RandomState(seed).permutation(count).tolist())


def domain_order(domains: Sequence[str], order: OrderName | tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of the domains in learning order; those that an order does not know follow sorted.

    Args:
        domains: name of each domain; its position is its number.
        order: seed that permutes the sorted names, "natural" (sorted), "1993 of 3", or the names
            themselves.

    Returns:
        A permutation of 0 .. len(domains) - 1.

    Raises:
        ConfigError: an explicit order that names a domain twice, or one that does not exist.
    """
    names = sorted(domains)
    if isinstance(order, (int, str)):
        chosen = [names[i] for i in class_order(len(names), order)]
    else:
        ids_of(order, domains, "domain")
        chosen = [*map(str, order), *(name for name in names if name not in order)]
    return tuple(list(domains).index(name) for name in chosen)


def ids_of(
    given: Sequence[int | str], names: Sequence[str], what: str, key: str = "scenario.orders"
) -> list[int]:
    """Places of classes or domains that are given as names, or as the places themselves.

    Args:
        what: "class" or "domain".
        key: of the spec, for errors.

    Raises:
        ConfigError: one that does not exist, or stands there twice.
    """
    place = {name: number for number, name in enumerate(names)}
    found = [
        place.get(each) if isinstance(each, str) else each if 0 <= each < len(names) else None
        for each in given
    ]
    unknown = [each for each, number in zip(given, found, strict=True) if number is None]
    known = [number for number in found if number is not None]
    times = Counter(known)
    twice = [names[number] for number in times if times[number] > 1]
    problems = [
        f"{name} {_some(items)}"
        for name, items in (("unknown", unknown), ("more than once", twice))
        if items
    ]
    if problems:
        several = "classes" if what == "class" else f"{what}s"
        raise ConfigError(
            f"each {what} is named once, and the data set has {len(names)} {several}: "
            f"{'; '.join(problems)}",
            key=key,
        )
    return known


def task_sizes(num_classes: int, initial: int | None, increment: int) -> tuple[int, ...]:
    """Number of classes of each task; the last task takes what is left.

    Args:
        num_classes: number of classes of the data set.
        initial: classes of task 0; None means `increment`.
        increment: classes of each later task.

    Returns:
        Sizes that add up to `num_classes`; a single task is a joint run.

    Raises:
        ConfigError: task 0 wants more classes than there are.
    """
    # A spec without `initial` arrives with the two equal: name the key that was written.
    key = "increment" if initial in (None, increment) else "initial"
    initial = increment if initial is None else initial
    if initial > num_classes:
        raise ConfigError(
            f"task 0 wants {initial} classes, the data set has {num_classes}; "
            f"use at most {num_classes}",
            key=f"scenario.{key}",
        )
    full, rest = divmod(num_classes - initial, increment)
    return (initial,) + (increment,) * full + ((rest,) if rest else ())


def checked_sizes(sizes: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Sizes of the tasks, which take all classes or domains.

    Args:
        sizes: classes, or domains, of each task.
        count: number of those of the data set.
        what: "classes" or "domains".

    Raises:
        ConfigError: they are too few or too many.
    """
    if sum(sizes) != count:
        raise ConfigError(
            f"they add up to {sum(sizes)}, the data set has {count} {what}; give a size to every "
            "task, and scenario.tasks to stop early",
            key="scenario.sizes",
        )
    return tuple(sizes)


def tasks(
    kind: Kind,
    classes: Sequence[str],
    domains: Sequence[str],
    sizes: Sequence[int] | None,
    order: OrderName,
) -> tuple[StreamTask, ...]:
    """The stream of tasks.

    Args:
        kind: `class_incremental`: new classes with every task; `domain_incremental`: every task
            has all classes and new domains.
        classes: name of each class; its position is its id.
        domains: name of each domain; its position is its number.
        sizes: classes or domains of each task; None for one domain each.
        order: order of the classes, or of the domains.

    Returns:
        The tasks in learning order.

    Raises:
        ConfigError: the order or the sizes do not fit the data.
    """
    if kind == "domain_incremental":
        if not domains:
            raise ConfigError("the data names no domain; give the column", key="dataset.domain")
        numbers = domain_order(domains, order)
        sizes = checked_sizes(sizes or (1,) * len(domains), len(domains), "domains")
        return _by_domain(len(classes), domains, _parts(numbers, sizes))
    ids = class_order(len(classes), order, classes)
    sizes = checked_sizes(sizes or (), len(classes), "classes")
    return _by_class(domains, _parts(ids, sizes))


def grouped(
    kind: Kind,
    classes: Sequence[str],
    domains: Sequence[str],
    groups: Sequence[Sequence[int | str]],
) -> tuple[StreamTask, ...]:
    """The stream of tasks whose classes, or domains, are listed.

    Args:
        kind: as in `tasks`.
        groups: names of each task's classes or domains; or class ids.

    Raises:
        ConfigError: a name that does not exist, or stands there twice.
    """
    domain = kind == "domain_incremental"
    names, what = (domains, "domain") if domain else (classes, "class")
    everything = [each for group in groups for each in group]
    found = _parts(
        ids_of(everything, names, what, "scenario.tasks"), [len(group) for group in groups]
    )
    return _by_domain(len(classes), domains, found) if domain else _by_class(domains, found)


def _by_class(domains: Sequence[str], parts: Sequence[tuple[int, ...]]) -> tuple[StreamTask, ...]:
    everywhere = tuple(range(len(domains) or 1))
    return tuple(
        StreamTask(name=f"task {number}", classes=own, domains=everywhere)
        for number, own in enumerate(parts, 1)
    )


def _by_domain(
    num_classes: int, domains: Sequence[str], parts: Sequence[tuple[int, ...]]
) -> tuple[StreamTask, ...]:
    everything = tuple(range(num_classes))
    return tuple(
        StreamTask(name=" + ".join(domains[d] for d in own), classes=everything, domains=own)
        for own in parts
    )


def _parts(numbers: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    stops = [0]
    for size in sizes:
        stops.append(stops[-1] + size)
    return [tuple(numbers[start:stop]) for start, stop in pairwise(stops)]


def _some(ids: Sequence[Any]) -> str:
    """Ids in words, at most ten."""
    text = ", ".join(str(i) for i in ids[:10])
    return text if len(ids) <= 10 else f"{text} and {len(ids) - 10} more"
