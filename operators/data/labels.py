"""Class and domain numbers, from the values of label and domain columns.

Everything that is wrong is collected, one line per kind of problem with its first place and its
count. A million rows take a fraction of a second.

Shapes: N rows of a split.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from graftwork.operators.data.sources import Places
from graftwork.operators.data.tables import Column

Columns = Mapping[str, Column]
"""Split -> its column."""


def join(columns: Sequence[Column]) -> Column | None:
    """One column of several sources; None if some hold strings and some hold integers."""
    kinds = {column.names is None for column in columns}
    if len(kinds) > 1:
        return None
    values, names = [c.values for c in columns], None
    if not kinds.pop():
        names = tuple(sorted({name for c in columns for name in c.names or ()}))
        values = [_renumber(c, names) for c in columns]
    return Column(
        values=np.concatenate(values), names=names, null=np.concatenate([c.null for c in columns])
    )


def class_ids(
    labels: Columns, given: Sequence[str] | None, places: Mapping[str, Places]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Class numbers 0..C-1.

    Integers are the numbers themselves. Strings are numbered by their place in `given`, else in
    the sorted list of those that occur in training or test.

    Args:
        labels: column of "train" and "test".
        given: class names, or None.
        places: names rows in messages.

    Returns:
        Class names; int32 [N] per split; problems (with any, the numbers mean nothing).
    """
    problems = _nulls(labels, places, "label")
    kinds = {column.names is None for column in labels.values()}
    if len(kinds) > 1:
        return (), {}, [*problems, "labels are integers in one split and strings in the other"]
    if problems:
        return (), {}, problems
    if not kinds.pop():
        names = tuple(given) if given else _union(labels)
        known = set(names)
        for split, column in labels.items():
            for code, name in enumerate(column.names or ()):
                if name not in known:
                    rows = np.flatnonzero(column.values == code)
                    what = f'label "{name}" is not among the classes'
                    problems.append(_line(places[split], rows, what))
        ids = {} if problems else {s: _renumber(c, names) for s, c in labels.items()}
        count = len(names)
    else:
        ids = {split: column.values for split, column in labels.items()}
        top = max((int(v.max()) for v in ids.values() if len(v)), default=-1)
        count = len(given) if given else top + 1
        for split, values in ids.items():
            wrong = np.flatnonzero((values < 0) | (values >= count))
            if len(wrong):
                value = values[wrong[0]]
                allowed = f"0..{count - 1}" if given else "0 and up"
                what = f"label {value} out of range {allowed}"
                problems.append(_line(places[split], wrong, what))
        names = tuple(given) if given else ()
    if not problems:
        problems += _untrained(ids, count, names)
    if not problems and not names:
        names = tuple(map(str, range(count)))
    return names, {split: values.astype(np.int32) for split, values in ids.items()}, problems


def domain_ids(
    domains: Columns, places: Mapping[str, Places]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Domain numbers in the order of the sorted names, integers in numeric order.

    Returns:
        Domain names; int32 [N] per split; problems.
    """
    problems = _nulls(domains, places, "domain")
    kinds = {column.names is None for column in domains.values()}
    if len(kinds) > 1:
        problems.append("domains are integers in one split and strings in the other")
    if problems:
        return (), {}, problems
    if kinds.pop():
        distinct = np.unique(np.concatenate([c.values for c in domains.values()]))
        names = tuple(map(str, distinct.tolist()))
        ids = {split: np.searchsorted(distinct, c.values) for split, c in domains.items()}
    else:
        names = _union(domains)
        ids = {split: _renumber(column, names) for split, column in domains.items()}
    return names, {split: values.astype(np.int32) for split, values in ids.items()}, []


def first_of_each_class(ids: np.ndarray, limit: int | None) -> np.ndarray:
    """Ascending rows int64 that hold the first `limit` of each class; None keeps all."""
    if limit is None:
        return np.arange(len(ids))
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    rank = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
    return np.sort(order[rank < limit])


def untrained(ids: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """Problems with classes that have no training images; see `class_ids`."""
    return _untrained(ids, len(names), names)


def _untrained(ids: Mapping[str, np.ndarray], count: int, names: Sequence[str]) -> list[str]:
    if not len(ids["train"]):
        return ["train: no images"]
    present = np.unique(ids["train"])
    if len(present) == count:
        return []
    # Not a list of all that are missing: with a label of 10**12 there are too many.
    tested = np.setdiff1d(ids["test"], present)
    gap = np.flatnonzero(present != np.arange(len(present)))
    first = int(gap[0]) if len(gap) else len(present)
    problems = []
    if len(tested):
        one = _class(int(tested[0]), names)
        problems.append(f"test has images of {one}, train has none{_more(len(tested), 'classes')}")
    if (missing := count - len(present)) > len(tested):
        hint = "" if names else "; class numbers must be 0, 1, 2, ... without gaps"
        problems.append(
            f"{_class(first, names)} has no training images{_more(missing, 'classes')}{hint}"
        )
    return problems


def _class(number: int, names: Sequence[str]) -> str:
    return f'class {number} ("{names[number]}")' if names else f"class {number}"


def _nulls(columns: Columns, places: Mapping[str, Places], what: str) -> list[str]:
    return [
        _line(places[split], np.flatnonzero(column.null), f"no {what}")
        for split, column in columns.items()
        if column.null.any()
    ]


def _line(places: Places, rows: np.ndarray, what: str) -> str:
    return f"{places.name(int(rows[0]))}: {what}{_more(len(rows), 'rows')}"


def _more(count: int, what: str) -> str:
    return f" (in all {count} {what})" if count > 1 else ""


def _union(columns: Columns) -> tuple[str, ...]:
    return tuple(sorted({name for column in columns.values() for name in column.names or ()}))


def _renumber(column: Column, names: Iterable[str]) -> np.ndarray:
    place = {name: number for number, name in enumerate(names)}
    table = np.array([place[name] for name in column.names or ()], dtype=np.int64)
    return table[column.values] if len(table) else column.values
