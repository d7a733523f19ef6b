"""Tasks as sets of rows: who arrives when, where rows are, and that workers read no others."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data import sources
from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.data.index_file import SplitIndex, encode_index
from graftwork.operators.data.sources import Places
from graftwork.operators.errors import DamagedStage
from graftwork.operators.formats import selection
from graftwork.operators.formats.features import encode_shard
from graftwork.operators.formats.packed import pack, unpack
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import CpuHints, Selection
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import StreamTask
from graftwork.operators.streams.stream import (
    Part,
    Rows,
    Stream,
    arrange,
    described,
    union,
    whole,
)
from graftwork.operators.streams.stream import (
    cut as pieces,
)
from graftwork.pipelines.planning.reads import Hints, Reads

Member = tuple[int, int]
"""Class and domain of an image, in the data set's own numbers."""


def cut(data: Dataset, tasks: Sequence[StreamTask]) -> Stream:
    return arrange(pieces(data, tasks), data.classes)


def split(
    name: str, members: Sequence[Member], classes: int = 6, domains: int = 3, first: int = 0
) -> Split:
    """A split without images: each row has the digest of the split's name and its number.

    Args:
        first: number of the first row.
    """
    numbers = range(first, first + len(members))
    hashes = [hashlib.sha256(f"{name} {number}".encode()).digest() for number in numbers]
    labels, places = np.array(members, np.int32).reshape(-1, 2).T
    return Split(
        name=name,
        digests=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32),
        labels=labels,
        domains=places,
        where=Places(
            kind="parquet",
            image="image",
            files=(f"/{name}",),
            file=np.zeros(len(members), np.int64),
            row=np.array(numbers, np.int64),
        ),
        classes=tuple("abcdefghi"[:classes]),
        domain_names=tuple("wxyz"[:domains]),
        description={},
    )


def dataset(
    train: Sequence[Member], test: Sequence[Member], classes: int = 6, domains: int = 3
) -> Dataset:
    splits = {n: split(n, m, classes, domains) for n, m in (("train", train), ("test", test))}
    one = splits["train"]
    return Dataset(
        classes=one.classes,
        domains=one.domain_names,
        bad_images=(),
        train=splits["train"],
        test=splits["test"],
    )


def task(*classes: int, domains: Sequence[int] = (0,)) -> StreamTask:
    return StreamTask(name="", classes=classes, domains=tuple(domains))


def digest_by_hand(of: Split, rows: Sequence[int], labels: Sequence[int], domains: int = 0) -> str:
    """sha256 over images, labels and domains, one column after the other."""
    found = hashlib.sha256(b"".join(of.digests[row].tobytes() for row in rows))
    for column in (labels, [domains] * len(labels)):
        found.update(b"".join(value.to_bytes(4, "little", signed=True) for value in column))
    return found.hexdigest()


def positions(rows: Rows) -> list[int]:
    """Rows of the only split."""
    return [row for part in rows.parts for row in part.rows.tolist()]


# --- who arrives when -------------------------------------------------------------------------


def test_classes_are_numbered_by_arrival() -> None:
    train = [(label, 0) for label in (0, 1, 2, 3, 4, 3, 1, 5)]
    test = [(label, 0) for label in (4, 3, 2, 1, 0, 5)]
    data = dataset(train, test)
    stream = cut(data, [task(3, 1), task(0, 4), task(2)])
    assert [task.index for task in stream.tasks] == [0, 1, 2]
    assert [positions(task.train) for task in stream.tasks] == [[1, 3, 5, 6], [0, 4], [2]]
    labels = [task.train.index.labels.tolist() for task in stream.tasks]
    assert labels == [[1, 0, 0, 1], [2, 3], [4]]
    assert [positions(task.test) for task in stream.tasks] == [[1, 3], [0, 4], [2]]
    assert [task.test.index.labels.tolist() for task in stream.tasks] == [[0, 1], [3, 2], [4]]
    assert [task.seen for task in stream.tasks] == [2, 4, 5]
    assert stream.ids == (3, 1, 0, 4, 2)
    assert stream.classes == ("d", "b", "a", "e", "c")
    # Of class 5 nobody asks: no task names it.
    assert stream.untested == {}

    first = stream.tasks[0]
    rows = digest_by_hand(data.train, [1, 3, 5, 6], [1, 0, 0, 1])
    assert first.learned == TaskData(rows=rows, classes=(0, 1)) == described(first.train)
    rows = digest_by_hand(data.test, [1, 3], [0, 1])
    assert first.tested == TaskData(rows=rows, classes=(0, 1), seen=2)


def test_domains_are_numbered_by_arrival() -> None:
    members = [(0, 0), (0, 1), (0, 2), (0, 1)]
    stream = cut(dataset(members, members), [task(0, domains=[number]) for number in (1, 2, 0)])
    found = [(positions(t.train), t.train.index.domains.tolist()) for t in stream.tasks]
    assert found == [([1, 3], [0, 0]), ([2], [1]), ([0], [2])]
    assert [task.train.blocks for task in stream.tasks] == [{(0, 0): 2}, {(0, 1): 1}, {(0, 2): 1}]


def test_a_domain_that_comes_later_has_a_later_number() -> None:
    """Data in several domains, cut by classes: the first task has no image in the first domain."""
    members = [(0, 0), (0, 2), (1, 1), (1, 2)]
    stream = cut(dataset(members, members), [task(number, domains=[0, 1, 2]) for number in (1, 0)])
    assert [task.train.index.domains.tolist() for task in stream.tasks] == [[0, 1], [2, 1]]


def test_a_test_image_waits_until_its_class_is_trained() -> None:
    train = [(0, 0), (2, 0), (1, 1), (0, 1)]
    test = [(1, 0), (0, 0), (1, 1), (3, 0), (2, 1), (3, 1), (2, 0), (3, 1), (5, 0), (1, 0)]
    data = dataset(train, test)
    stream = cut(data, [task(*range(6), domains=[number]) for number in (0, 1)])
    assert stream.ids == (0, 2, 1)
    # Class 1 comes with the second domain, and its images of the first one with it; class 2 is
    # known in the second domain, where nothing is trained on it.
    assert [positions(task.test) for task in stream.tasks] == [[1, 6], [0, 2, 4, 9]]
    assert [task.test.index.labels.tolist() for task in stream.tasks] == [[0, 1], [2, 2, 1, 2]]
    assert [task.learned.classes for task in stream.tasks] == [(0, 1), (0, 2)]
    assert [task.tested.classes for task in stream.tasks] == [(0, 1), (0, 1, 2)]
    assert [task.tested.seen for task in stream.tasks] == [2, 3]
    assert stream.untested == {"d": 3, "f": 1}
    # The first domain alone never learns of class 1.
    [short] = cut(data, [task(*range(6), domains=[0])]).tasks
    assert (short.learned, short.tested) == (stream.tasks[0].learned, stream.tasks[0].tested)
    assert cut(data, [task(*range(6), domains=[0])]).untested == {"b": 2, "d": 1, "f": 1}


MEMBERS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=40)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Dataset, list[StreamTask]]:
    """A data set of five classes in three domains, cut by classes or by domains."""
    data = dataset(draw(MEMBERS), draw(MEMBERS), classes=5)
    order = draw(st.permutations(range(5)))
    if draw(st.booleans()):
        places = draw(st.permutations(range(3)))
        return data, [StreamTask(name="", classes=tuple(order), domains=(p,)) for p in places]
    ends = [0, *sorted(draw(st.sets(st.integers(1, 4)))), 5]
    pairs = pairwise(ends)
    tasks = [tuple(order[start:end]) for start, end in pairs]
    return data, [StreamTask(name="", classes=t, domains=(0, 1, 2)) for t in tasks]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(streams())
def test_every_row_belongs_to_one_task(case: tuple[Dataset, list[StreamTask]]) -> None:
    data, tasks = case
    stream = cut(data, tasks)

    def own(label: int, domain: int) -> int:
        """The task whose classes and domains these are."""
        [number] = [n for n, t in enumerate(tasks) if label in t.classes and domain in t.domains]
        return number

    train = list(zip(data.train.labels.tolist(), data.train.domains.tolist(), strict=True))
    test = list(zip(data.test.labels.tolist(), data.test.domains.tolist(), strict=True))
    arrival: dict[int, int] = {}
    for member in sorted(train, key=lambda member: own(*member)):
        arrival.setdefault(member[0], own(*member))
    place = {label: tasks[number].classes.index(label) for label, number in arrival.items()}
    ids = sorted(arrival, key=lambda label: (arrival[label], place[label]))
    assert stream.ids == tuple(ids)
    assert stream.classes == tuple(data.classes[label] for label in ids)
    for number, found in enumerate(stream.tasks):
        assert found.seen == sum(first <= number for first in arrival.values())
        learned = [row for row, member in enumerate(train) if own(*member) == number]
        assert positions(found.train) == learned
        assert found.train.index.labels.tolist() == [ids.index(train[row][0]) for row in learned]
        tested = [
            row
            for row, member in enumerate(test)
            if member[0] in arrival and max(own(*member), arrival[member[0]]) == number
        ]
        assert positions(found.test) == tested
        assert found.test.index.labels.tolist() == [ids.index(test[row][0]) for row in tested]
        assert np.array_equal(found.test.index.digests, data.test.digests[tested])
    missing = [data.classes[label] for label, _ in test if label not in arrival]
    assert stream.untested == {name: missing.count(name) for name in missing}


@settings(derandomize=True, max_examples=100, deadline=None)
@given(streams(), MEMBERS, st.randoms(use_true_random=False))
def test_a_class_and_a_domain_that_sort_first_change_nothing_before_them(
    case: tuple[Dataset, list[StreamTask]], more: list[Member], random: Any
) -> None:
    data, tasks = case

    def grown(of: Split) -> Split:
        """The split with more rows in between, of a class or a domain that is now number 0."""
        old = [(label + 1, domain + 1) for label, domain in zip(of.labels, of.domains, strict=True)]
        extra = [(0, domain) if number % 2 else (label, 0) for number, (label, domain) in new]
        places = sorted(random.sample(range(len(old) + len(extra)), len(old)))
        members = np.zeros((len(old) + len(extra), 2), np.int32)
        other = np.setdiff1d(np.arange(len(members)), places)
        members[places], members[other] = old, extra
        plain = split("new", [(int(a), int(b)) for a, b in members], 6, 4)
        digests = plain.digests.copy()
        digests[places] = of.digests
        return replace(plain, digests=digests)

    new = list(enumerate(more))
    train, test = grown(data.train), grown(data.test)
    later = Dataset(
        classes=train.classes, domains=train.domain_names, bad_images=(), train=train, test=test
    )
    moved = [
        StreamTask(
            name=t.name,
            classes=tuple(label + 1 for label in t.classes),
            domains=tuple(domain + 1 for domain in t.domains),
        )
        for t in tasks
    ]
    after = [task(*range(1, 6), domains=[0]), task(0, domains=[0, 1, 2, 3])]
    one, two = cut(data, tasks), cut(later, [*moved, *after])
    for before, now in zip(one.tasks, two.tasks, strict=False):
        assert (before.learned, before.seen) == (now.learned, now.seen)
        assert before.train.blocks == now.train.blocks
        assert np.array_equal(before.train.index.digests, now.train.index.digests)
        assert before.tested == now.tested
    known = len(one.classes)
    assert two.ids[:known] == tuple(number + 1 for number in one.ids)


# --- rows -------------------------------------------------------------------------------------


def part(of: Split, *rows: int, labels: Sequence[int] = (), domains: Sequence[int] = ()) -> Part:
    return Part(
        split=of,
        rows=np.array(rows, np.int64),
        labels=np.array(labels or [0] * len(rows), np.int32),
        domains=np.array(domains or [0] * len(rows), np.int32),
    )


A, B = split("a", [(0, 0)] * 9), split("b", [(0, 0)] * 5, first=4)
BOTH = Rows((part(A, 1, 4, 8, labels=[2, 0, 2], domains=[0, 0, 1]), part(B, 0, 3, labels=[2, 1])))


def parts_of(rows: Rows) -> list[tuple[str, list[int], list[int], list[int]]]:
    return [
        (p.split.name, p.rows.tolist(), p.labels.tolist(), p.domains.tolist()) for p in rows.parts
    ]


def test_rows_stand_split_by_split() -> None:
    assert len(BOTH) == 5
    assert BOTH.index.labels.tolist() == [2, 0, 2, 2, 1]
    assert BOTH.index.domains.tolist() == [0, 0, 1, 0, 0]
    expected = np.concatenate([A.digests[[1, 4, 8]], B.digests[[0, 3]]])
    assert np.array_equal(BOTH.index.digests, expected)
    assert BOTH.digest == BOTH.index.digest
    assert BOTH.classes == (0, 1, 2)
    assert list(BOTH.blocks.items()) == [((0, 0), 1), ((1, 0), 1), ((2, 0), 2), ((2, 1), 1)]
    assert parts_of(BOTH.of((2, 0))) == [("a", [1], [2], [0]), ("b", [0], [2], [0])]
    assert parts_of(BOTH.of((1, 0))) == [("b", [3], [1], [0])]
    assert parts_of(BOTH.of((5, 5))) == []
    chosen = BOTH.at(np.array([False, True, True, False, False]))
    assert parts_of(chosen) == [("a", [4, 8], [0, 2], [0, 1])]


def test_the_digest_of_rows_is_of_images_classes_and_domains_in_order() -> None:
    one = Rows((part(A, 1, 4, labels=[0, 1]),))
    assert one.digest == digest_by_hand(A, [1, 4], [0, 1])
    for other in (
        part(A, 1, 5, labels=[0, 1]),
        part(A, 1, 4, labels=[1, 0]),
        part(A, 4, 1, labels=[1, 0]),
        part(A, 1, 4, labels=[0, 1], domains=[0, 1]),
        part(A, 1, labels=[0]),
    ):
        assert Rows((other,)).digest != one.digest
    # Neither the split's name nor the places are part of it.
    moved = replace(A, name="c", where=B.where, description={"moved": True})
    assert Rows((part(moved, 1, 4, labels=[0, 1]),)).digest == one.digest
    assert Rows((part(A, 1, labels=[0]), part(A, 4, labels=[1]))).digest == one.digest


def test_a_union_has_each_row_once_in_the_order_of_its_sources() -> None:
    one = Rows((part(B, 2, labels=[3]),))
    two = Rows((part(A, 0, 4, labels=[1, 0], domains=[1, 0]),))
    found = union([one, two, BOTH])
    assert parts_of(found) == [
        ("b", [0, 2, 3], [2, 3, 1], [0, 0, 0]),
        ("a", [0, 1, 4, 8], [1, 2, 0, 2], [1, 0, 0, 1]),
    ]
    assert parts_of(union([found])) == parts_of(found)
    assert parts_of(union([two, one])) == [("a", [0, 4], [1, 0], [1, 0]), ("b", [2], [3], [0])]


def test_no_rows_at_all() -> None:
    none = union([])
    assert (len(none), none.classes, none.blocks, none.places()) == (0, (), {}, [])
    assert none.index.digests.shape == (0, 32)
    assert none.digest == hashlib.sha256(b"").hexdigest()


def test_places_of_several_splits_are_read_one_after_the_other() -> None:
    hints = sources.together(BOTH.places())
    assert sources.count(hints) == 5
    names = [sources.place_name(hints, position) for position in range(5)]
    assert names == ["/a row 1", "/a row 4", "/a row 8", "/b row 4", "/b row 7"]
    with pytest.raises(IndexError):
        sources.place_name(hints, 5)
    for chosen in ([0, 2, 3], [3, 4], [1], []):
        picked = sources.pick(hints, np.array(chosen, np.int64))
        found = [sources.place_name(picked, place) for place in range(sources.count(picked))]
        assert found == [names[place] for place in chosen]
    # One split needs no list of places.
    assert sources.together(BOTH.places()[:1]) == A.where.at(np.array([1, 4, 8])).hints(0, 3)


def test_bytes_of_several_places_come_in_order(tmp_path: Path) -> None:
    for name in "pqrs":
        (tmp_path / name).write_bytes(name.encode())
    several = [
        Places(
            kind="files",
            image="",
            files=tuple(str(tmp_path / name) for name in names),
            file=np.arange(2),
            row=np.zeros(2, np.int64),
        )
        for names in ("rp", "sq")
    ]
    hints = sources.together(several)
    assert list(sources.read(hints)) == [b"r", b"p", b"s", b"q"]
    assert list(sources.read(sources.pick(hints, np.array([1, 2])))) == [b"p", b"s"]


def test_a_whole_split_is_the_same_in_every_stream() -> None:
    mixed = split("mixed", [(4, 1), (1, 0), (4, 0), (0, 2)])
    rows, ids = whole(mixed)
    assert ids == (0, 1, 4)
    assert parts_of(rows) == [("mixed", [0, 1, 2, 3], [2, 1, 2, 0], [1, 0, 0, 2])]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 2**31 - 1), max_size=60))
def test_packed_rows_are_unpacked(rows: set[int]) -> None:
    given = np.array(sorted(rows), dtype=np.int64)
    text = pack(given)
    assert text.isascii()
    found = unpack(text)
    assert found.dtype == np.int64 and found.tolist() == given.tolist()


def test_rows_that_follow_each_other_are_a_short_text() -> None:
    assert len(pack(np.arange(50_000, 100_000))) < 400


# --- what a worker reads ----------------------------------------------------------------------

SIZE = 3
"""Rows of a shard."""
DATA = dataset(
    [(label, domain) for domain in (1, 0) for label in (4, 1, 0, 2)], [(0, 0)], classes=6
)
OTHER = split("other", [(0, 0), (1, 0), (0, 0), (1, 0)], classes=2, domains=1)


def features_of(of: Split, width: int = 4) -> np.ndarray:
    """Features [N, D] that are different for every row."""
    start = {"train": 0, "other": 100}[of.name]
    return (start + np.arange(len(of))[:, None] + np.arange(width) / 8).astype(np.float32)


def shards_of(of: Split, kind: str = "frozen") -> tuple[Stage, ...]:
    starts = range(0, len(of), SIZE)
    return tuple(
        Stage(
            operator="features",
            parameters={"kind": kind, "images": of.images_digest(start, start + SIZE)},
            label=f"{kind} {of.name} {start // SIZE}",
        )
        for start in starts
    )


def adapted_of(of: Split) -> tuple[Stage, ...]:
    return shards_of(of, "adapted")


class Case:
    """Two tasks on two splits, with all that is stored of them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        first, second = cut(DATA, [task(4, 0, domains=[0, 1]), task(2, domains=[0])]).tasks
        beside = part(OTHER, 1, 2, labels=[3, 4], domains=[2, 2])
        self.tasks = [first.train, Rows((*second.train.parts, beside))]
        self.wanted = [described(rows) for rows in self.tasks]
        self.reads = Reads(
            tasks=self.tasks,
            shards={"features": shards_of, "adapted": adapted_of},
            shard_size=SIZE,
        )
        self.stage = Stage(
            operator="evaluate",
            parameters={},
            reads=self.reads.stages(),
            hints=Hints(CpuHints(cpus=1.0), selection=self.reads.selection),
            label="evaluate all",
        )
        for of in (DATA.train, OTHER):
            put_index(store, of.stage(), of.stored())
            for stages, more in ((shards_of(of), 0), (adapted_of(of), 1000)):
                for number, stage in enumerate(stages):
                    rows = features_of(of)[number * SIZE : number * SIZE + SIZE]
                    put_shard(store, stage, rows + more)

    def reading(self, **changes: Any) -> tuple[Assignment, Selection]:
        """The assignment and its rows, with some of the hints or of what is read replaced."""
        work = replace(self.stage, **{k: v for k, v in changes.items() if k == "reads"})
        chosen = from_json(Selection, work.assignment().hints["selection"])
        return work.assignment(), replace(
            chosen, **{k: v for k, v in changes.items() if k != "reads"}
        )


def put_index(store: Store, stage: Stage, index: SplitIndex) -> None:
    files = {"index.parquet": encode_index(index)}
    store.commit(stage.assignment(), Result(files=files), 0.0)


def put_shard(store: Store, stage: Stage, rows: np.ndarray) -> None:
    store.commit(stage.assignment(), Result(files={"features.parquet": encode_shard(rows)}), 0.0)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(Store(str(tmp_path)))


def test_hints_are_places_and_numbers_of_rows(case: Case) -> None:
    stages = case.reads.stages()
    assert stages["dataset"] == (DATA.train.stage(), OTHER.stage())
    # Rows 0, 2, 4, 6 and 7 of three shards; 1 and 2 of the other split's first one.
    every, beside = shards_of(DATA.train), shards_of(OTHER)
    assert stages["features"] == (*every, beside[0])
    assert stages["adapted"] == (*adapted_of(DATA.train), adapted_of(OTHER)[0])
    chosen = from_json(Selection, case.stage.hints["selection"])
    assert [source.classes for source in chosen.sources] == [(1, -1, 2, -1, 0, -1), (4, 3)]
    # Domains are numbered in the order of the first task's list.
    assert [source.domains for source in chosen.sources] == [(0, 1, -1), (2,)]
    rows = [[(part.source, unpack(part.rows).tolist()) for part in t] for t in chosen.tasks]
    assert rows == [[(0, [0, 2, 4, 6])], [(0, [7]), (1, [1, 2])]]
    assert chosen.shards == ((0, 0), (0, 3), (0, 6), (1, 0))


def test_shards_without_rows_are_not_read() -> None:
    [only] = cut(DATA, [task(4, domains=[0])]).tasks
    reads = Reads(tasks=[only.train], shards={"features": shards_of}, shard_size=SIZE)
    assert reads.stages()["features"] == (shards_of(DATA.train)[1],)
    assert reads.selection()["shards"] == [[0, 3]]
    none = Reads(tasks=[only.train], shards={}, shard_size=SIZE)
    assert none.stages() == {"dataset": (DATA.train.stage(),)}
    assert none.selection()["shards"] == []


def test_what_is_found_are_the_rows_that_were_planned(case: Case) -> None:
    work, chosen = case.reading()
    found = selection.of(work, case.store, chosen, case.wanted)
    for rows, planned in zip(found, case.tasks, strict=True):
        assert rows.index.digest == planned.digest
        assert np.array_equal(rows.index.labels, planned.index.labels)
        assert np.array_equal(rows.index.domains, planned.index.domains)
    every = selection.joined(found)
    assert every.source.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert every.position.tolist() == [0, 2, 4, 6, 7, 1, 2]
    assert selection.numbers(found).tolist() == [0, 0, 0, 0, 1, 1, 1]
    matrix = selection.matrix(work, case.store, chosen, every)
    frozen = np.concatenate([features_of(DATA.train)[[0, 2, 4, 6, 7]], features_of(OTHER)[[1, 2]]])
    assert matrix is not None
    assert np.array_equal(matrix, np.concatenate([frozen, frozen + 1000], axis=1))
    # In any order, of some of the rows.
    order = np.array([6, 3, 0, 5])
    again = selection.matrix(work, case.store, chosen, every.at(order))
    assert again is not None and np.array_equal(again, matrix[order])


def test_rows_in_the_order_of_their_sources() -> None:
    index = BOTH.index
    rows = selection.Chosen(
        index=index, source=np.array([1, 0, 1, 0, 0]), position=np.array([3, 5, 2, 4, 7])
    )
    assert selection.in_order(rows).tolist() == [3, 1, 4, 2, 0]


def test_without_shards_there_are_no_features(case: Case) -> None:
    work, chosen = case.reading(reads={"dataset": case.reads.stages()["dataset"]})
    [rows, _] = selection.of(work, case.store, chosen, case.wanted)
    assert selection.matrix(work, case.store, chosen, rows) is None


def damage(case: Case, **changes: Any) -> DamagedStage:
    """What a worker says that looks for rows and features."""
    work, chosen = case.reading(**changes)
    with pytest.raises(DamagedStage) as caught:
        found = selection.of(work, case.store, chosen, case.wanted)
        selection.matrix(work, case.store, chosen, selection.joined(found))
    return caught.value


def exchanged(case: Case, index: SplitIndex) -> dict[str, tuple[Stage, ...]]:
    """What is read, with another index in the place of the first one."""
    stages = case.reads.stages()
    other = Stage(operator="dataset", parameters={"another": 1})
    put_index(case.store, other, index)
    return {**stages, "dataset": (other, stages["dataset"][1])}


def test_an_index_of_other_images_is_refused(case: Case) -> None:
    turned = DATA.train.stored().at(np.arange(len(DATA.train))[::-1])
    reads = exchanged(case, turned)
    error = damage(case, reads=reads)
    assert (error.operator, error.stage_key) == ("dataset", reads["dataset"][0].key)
    assert error.reason == "rows of task 1 are not those that evaluate all was planned for"


def test_an_index_with_another_image_of_the_second_task_alone_is_refused(case: Case) -> None:
    index = DATA.train.stored()
    digests = index.digests.copy()
    digests[7, 0] ^= 1
    error = damage(case, reads=exchanged(case, replace(index, digests=digests)))
    assert error.reason == "rows of task 2 are not those that evaluate all was planned for"


@pytest.mark.parametrize("column", ["labels", "domains"])
def test_an_index_with_other_numbers_is_refused(column: str, case: Case) -> None:
    index = DATA.train.stored()
    values = getattr(index, column).copy()
    values[0] = 0
    error = damage(case, reads=exchanged(case, replace(index, **{column: values})))
    assert error.reason == "rows of task 1 are not those that evaluate all was planned for"


def test_an_index_that_is_too_short_is_refused(case: Case) -> None:
    short = exchanged(case, DATA.train.stored().at(np.arange(7)))
    assert damage(case, reads=short).reason == "it lacks rows that were planned"


def test_an_image_that_no_task_names_may_change(case: Case) -> None:
    """Nothing is compared that is not read."""
    index = DATA.train.stored()
    digests = index.digests.copy()
    digests[5] = 0
    work, chosen = case.reading(reads=exchanged(case, replace(index, digests=digests)))
    [rows, _] = selection.of(work, case.store, chosen, case.wanted)
    assert rows.index.digest == case.tasks[0].digest


def test_indexes_in_another_order_are_refused(case: Case) -> None:
    stages = case.reads.stages()
    turned = {**stages, "dataset": stages["dataset"][::-1]}
    assert damage(case, reads=turned).reason == "it lacks rows that were planned"


def test_other_numbers_by_arrival_are_refused(case: Case) -> None:
    _, chosen = case.reading()
    first, second = chosen.sources
    for other in (
        replace(first, classes=(2, -1, 1, -1, 0, -1)),
        replace(first, domains=(1, 0, -1)),
    ):
        error = damage(case, sources=(other, second))
        assert error.reason == "rows of task 1 are not those that evaluate all was planned for"


def test_a_damaged_index_is_named(case: Case) -> None:
    key = DATA.train.stage().key
    [file] = Path(case.store.url, "dataset", key).glob("index.parquet.*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    error = damage(case)
    assert (error.operator, error.stage_key) == ("dataset", key)


@pytest.mark.parametrize("role", ["features", "adapted"])
def test_shards_of_other_images_are_refused(role: str, case: Case) -> None:
    stages = case.reads.stages()
    first, second, *others = stages[role]
    error = damage(case, reads={**stages, role: (second, first, *others)})
    assert (error.operator, error.stage_key) == ("features", second.key)
    assert error.reason == "not of the images that evaluate all looks for"


def test_a_shard_that_is_missing_among_those_read_is_refused(case: Case) -> None:
    """Rows before the first shard, between two, and of a split without any."""
    stages, (_, chosen) = case.reads.stages(), case.reading()
    for number, said in ((0, 3), (1, 0), (3, 2)):
        left = [n for n in range(4) if n != number]
        reads = {
            role: tuple(stages[role][n] for n in left) if role != "dataset" else stages[role]
            for role in stages
        }
        error = damage(case, reads=reads, shards=tuple(chosen.shards[n] for n in left))
        assert error.stage_key == stages["features"][said].key
        assert error.reason == "lacks images that evaluate all looks for"


def test_shards_of_another_width_are_refused(case: Case) -> None:
    stages = case.reads.stages()
    first, second, *others = stages["features"]
    wide = replace(second, parameters={**second.parameters, "kind": "wide"})
    put_shard(case.store, wide, features_of(DATA.train, 5)[3:6])
    error = damage(case, reads={**stages, "features": (first, wide, *others)})
    assert error.reason == "features of another width than the other shards"


# --- hints that are worked out later ----------------------------------------------------------


def test_hints_are_worked_out_when_somebody_looks() -> None:
    asked: list[str] = []

    def work_out() -> dict[str, Any]:
        asked.append("selection")
        return {"sources": [], "tasks": [], "shards": []}

    hints = Hints(CpuHints(cpus=2.0), selection=work_out)
    stage = Stage(operator="evaluate", parameters={}, hints=hints)
    assert list(hints) == ["cpus", "selection"] and len(hints) == 2
    assert hints["cpus"] == 2.0 and stage.key and asked == []
    assert stage.assignment().hints == {"cpus": 2.0, "selection": work_out()}
    assert asked == ["selection"] * 2
    with pytest.raises(KeyError):
        hints["places"]
