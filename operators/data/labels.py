"""Class and domain numbers, from the values of label and domain columns.

Everything that is wrong is collected, one line per kind of problem with its first place and its
count. A million rows take a fraction of a second.

Shapes: N rows of a split.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from graftwork.operators.data.sources import Places
from graftwork.operators.names import folded
from graftwork.operators.parquet.values import Column

Columns = Mapping[str, Column]
"""Split -> its column."""


def join(columns: Sequence[Column]) -> Column | None:
    """One column of several sources; None if some hold strings and some hold integers."""
    kinds = _kinds(columns)
    if len(kinds) > 1:
        return None
    values, names = [c.values for c in columns], None
    if kinds == {False}:
        names = tuple(sorted({name for c in columns for name in c.names or ()}))
        values = [_renumber(c, names) for c in columns]
    return Column(
        values=np.concatenate(values), names=names, null=np.concatenate([c.null for c in columns])
    )


def _kinds(columns: Iterable[Column]) -> set[bool]:
    """Tells whether columns hold integers; what has no value goes with both, whatever its type."""
    return {column.names is None for column in columns if not column.null.all()}


def class_ids(
    labels: Columns,
    given: Sequence[str] | None,
    places: Mapping[str, Places],
    part: bool = False,
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Class numbers 0..C-1.

    Integers are the numbers themselves. Strings are numbered by their place in `given`, else in
    the sorted list of those that occur in training or test. Only a class that is given may have no
    images; one with test images needs training images.

    Args:
        labels: column of "train" and "test".
        given: class names, or None.
        places: names rows in messages.
        part: of a stream, whose other tasks may have the classes that have no images here.
            Integers are names then, in numeric order.

    Returns:
        Class names; int32 [N] per split; problems (with any, the numbers mean nothing).
    """
    problems = _nulls(labels, places, "label")
    kinds = _kinds(labels.values())
    if len(kinds) > 1:
        return (), {}, [*problems, "labels are integers in one split and strings in the other"]
    if problems:
        return (), {}, problems
    if kinds == {False}:
        names = tuple(given) if given else _union(labels)
        known = set(names)
        for split, column in labels.items():
            for code, name in enumerate(column.names or ()):
                if name in known:
                    continue
                rows = np.flatnonzero(column.values == code)
                if len(rows):  # an empty class folder has none
                    what = f'label "{name}" is not among the classes'
                    problems.append(_line(places[split], rows, what))
        ids = {} if problems else {s: _renumber(c, names) for s, c in labels.items()}
        count = len(names)
    elif part and not given:
        distinct = np.unique(np.concatenate([column.values for column in labels.values()]))
        names, count = tuple(map(str, distinct.tolist())), len(distinct)
        ids = {split: np.searchsorted(distinct, c.values) for split, c in labels.items()}
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
    if part and not problems and not len(ids["train"]):
        problems = ["train: no images"]
    if not part and not problems:
        problems += _incomplete(ids, count, names, listed=bool(given))
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
    kinds = _kinds(domains.values())
    if len(kinds) > 1:
        problems.append("domains are integers in one split and strings in the other")
    if problems:
        return (), {}, problems
    if kinds == {True}:
        distinct = np.unique(np.concatenate([c.values for c in domains.values()]))
        names = tuple(map(str, distinct.tolist()))
        ids = {split: np.searchsorted(distinct, c.values) for split, c in domains.items()}
    else:
        names = _union(domains)
        ids = {split: _renumber(column, names) for split, column in domains.items()}
    return names, {split: values.astype(np.int32) for split, values in ids.items()}, []


def first_of_each(ids: np.ndarray, domains: np.ndarray, limit: int | None) -> np.ndarray:
    """Ascending rows int64 that hold the first `limit` of each class in each domain.

    Args:
        ids: [N] integer class numbers.
        domains: [N] integer domain numbers.
        limit: None keeps all rows.
    """
    if limit is None or not len(ids):
        return np.arange(len(ids))
    groups = ids.astype(np.int64) * (int(domains.max()) + 1) + domains
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    rank = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
    return np.sort(order[rank < limit])


def lost(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[str]:
    """Problems with classes that were trained on before images were left out.

    Args:
        before: class numbers int32 [N] per split, without a problem.
        after: class numbers of the images that are left, [M] per split.
        names: class names.
    """
    if not len(after["train"]):
        return ["train: no images"]
    gone = np.setdiff1d(before["train"], after["train"])
    tested = np.isin(gone, after["test"])
    problems = _tested(gone[tested], names)
    if not tested.all():
        problems.append(_untrained(int(gone[~tested][0]), int((~tested).sum()), names))
    return problems


def _incomplete(
    ids: Mapping[str, np.ndarray], count: int, names: Sequence[str], listed: bool
) -> list[str]:
    """Problems with classes 0..count-1 that have no training images."""
    if not len(ids["train"]):
        return ["train: no images"]
    present = np.unique(ids["train"])
    problems = _tested(np.setdiff1d(ids["test"], present), names)
    known = np.union1d(present, ids["test"])
    if listed or len(known) == count:
        return problems
    # Not a list of all that are missing: with a label of 10**12 there are too many.
    gap = np.flatnonzero(known != np.arange(len(known)))
    first = int(gap[0]) if len(gap) else len(known)
    what = _untrained(first, count - len(known), names)
    hint = "" if names else "; class numbers must be 0, 1, 2, ... without gaps"
    hint += "; list all classes in dataset.classes if some are to have no images"
    return [*problems, what + hint]


def _tested(classes: np.ndarray, names: Sequence[str]) -> list[str]:
    if not len(classes):
        return []
    more, first = _more(len(classes), "classes"), int(classes[0])
    missing = set(classes.tolist())
    own = [name for number, name in enumerate(names) if number not in missing]
    near = [name for name in own if folded(name) == folded(names[first])] if names else []
    hint = f' but has "{near[0]}"' if near else ""
    return [f"test has images of {called(first, names)}, train has none{hint}{more}"]


def _untrained(first: int, count: int, names: Sequence[str]) -> str:
    return f"{called(first, names)} has no training images{_more(count, 'classes')}"


def called(number: int, names: Sequence[str], domain: str = "") -> str:
    """Name of a class for people, of its images in one domain if that has a name."""
    own = f' ("{names[number]}")' if names and names[number] != str(number) else ""
    return f"class {number}{own}" + (f' in domain "{domain}"' if domain else "")


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
    # An empty class folder may be none of the names; no row refers to it.
    table = np.array([place.get(name, -1) for name in column.names or ()], dtype=np.int64)
    return table[column.values] if len(table) else column.values
