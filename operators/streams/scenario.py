"""Class orders and tasks: pure values, no data.

A class order lists the data set's own class ids in the order in which they are learned; the
first `initial` of them are task 0. Orders drawn from a seed equal those of LAMDA-PILOT and of
every code base that shares its protocol.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.operators.errors import ConfigError

Kind = Literal["class_incremental", "domain_incremental"]

OrderName = int | str | list[int] | list[str]
"""Name of a class order in specs, keys and results: a seed, "natural", or the order itself."""

MAX_SEED = 2**32 - 1


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


def class_order(num_classes: int, order: OrderName | tuple[int, ...]) -> tuple[int, ...]:
    """Class ids in learning order.

    Args:
        num_classes: number of classes of the data set.
        order: seed, "natural" (0, 1, 2, ...), or the ids themselves.

    Returns:
        A permutation of 0 .. num_classes - 1.

    Raises:
        ConfigError: an explicit order that is not a permutation; the ids are named.
    """
    if isinstance(order, int):
        # Imported here because the spec imports this module and must start fast.
        import numpy as np

        # The legacy generator: default_rng gives other orders than the published ones.
        return tuple(np.random.RandomState(order).permutation(num_classes).tolist())
    if isinstance(order, str):
        return tuple(range(num_classes))
    _check_permutation(order, range(num_classes), "class")
    return tuple(int(c) for c in order)


def domain_order(domains: Sequence[str], order: OrderName | tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of the domains in learning order.

    Args:
        domains: name of each domain; its position is its number.
        order: seed that permutes the sorted names, "natural" (sorted), or the names themselves.

    Returns:
        A permutation of 0 .. len(domains) - 1.

    Raises:
        ConfigError: an explicit order that does not name each domain once.
    """
    names = sorted(domains)
    if isinstance(order, (int, str)):
        chosen = [names[i] for i in class_order(len(names), order)]
    else:
        _check_permutation(order, names, "domain")
        chosen = [str(name) for name in order]
    return tuple(list(domains).index(name) for name in chosen)


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


def tasks(
    kind: Kind,
    num_classes: int,
    domains: Sequence[str],
    initial: int | None,
    increment: int | None,
    order: OrderName,
) -> tuple[StreamTask, ...]:
    """The stream of tasks.

    Args:
        kind: `class_incremental`: new classes with every task; `domain_incremental`: every task
            has all classes and one domain.
        num_classes: number of classes of the data set.
        domains: name of each domain; its position is its number.
        initial: classes of task 0, None for `increment`; not read when domain-incremental.
        increment: classes of later tasks; not read when domain-incremental.
        order: order of the classes, or of the domains.

    Returns:
        The tasks in learning order.

    Raises:
        ConfigError: the order or the sizes do not fit the data.
    """
    if kind == "domain_incremental":
        if not domains:
            raise ConfigError("the data names no domain; give the column", key="dataset.domain")
        everything = tuple(range(num_classes))
        return tuple(
            StreamTask(name=domains[domain], classes=everything, domains=(domain,))
            for domain in domain_order(domains, order)
        )
    if increment is None:
        raise ConfigError("missing; class_incremental needs it", key="scenario.increment")
    ids = class_order(num_classes, order)
    all_domains = tuple(range(len(domains) or 1))
    stream, start = [], 0
    for number, size in enumerate(task_sizes(num_classes, initial, increment), 1):
        own = ids[start : start + size]
        stream.append(StreamTask(name=f"task {number}", classes=own, domains=all_domains))
        start += size
    return tuple(stream)


def _check_permutation(order: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    """Refuse an explicit order that does not hold each expected id once."""
    wanted, given = set(expected), Counter(order)
    problems = {
        "missing": [i for i in expected if i not in given],
        "more than once": [i for i, times in given.items() if times > 1],
        "unknown": [i for i in given if i not in wanted],
    }
    parts = [f"{name} {_some(ids)}" for name, ids in problems.items() if ids]
    if parts:
        raise ConfigError(
            f"an explicit {what} order must name each of the {len(expected)} "
            f"{what}{'es' if what == 'class' else 's'} once; {'; '.join(parts)}",
            key="scenario.orders",
        )


def _some(ids: Sequence[Any]) -> str:
    """Ids in words, at most ten."""
    text = ", ".join(str(i) for i in ids[:10])
    return text if len(ids) <= 10 else f"{text} and {len(ids) - 10} more"
