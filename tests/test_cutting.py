"""Ways to cut a data set: blurry, few-shot, long-tailed, online, and as a manifest says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pcsv
import pytest
import torch

from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.data.sources import Places
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.streams import blurry, manifest, online, thinning
from graftwork.operators.streams.blurry import Blurry, deal
from graftwork.operators.streams.draws import Draws
from graftwork.operators.streams.scenario import StreamTask
from graftwork.operators.streams.stream import Piece, Stream, arrange, cut
from graftwork.operators.streams.thinning import FewShot, LongTailed

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")


def split(name: str, labels: Sequence[int], domains: Sequence[int] | None = None) -> Split:
    count = len(labels)
    return Split(
        name=name,
        digests=np.random.default_rng(len(name)).integers(0, 256, (count, 32), dtype=np.uint8),
        labels=np.array(labels, dtype=np.int32),
        domains=np.array(domains or [0] * count, dtype=np.int32),
        where=Places(
            kind="files",
            image="",
            files=tuple(f"/data/{name}/{NAMES[c]}/{n}.png" for n, c in enumerate(labels)),
            file=np.arange(count, dtype=np.int32),
            row=np.zeros(count, dtype=np.int64),
        ),
        classes=NAMES,
        domain_names=("",),
        description={},
    )


def dataset(train: Sequence[int], test: Sequence[int] = tuple(range(6))) -> Dataset:
    return Dataset(
        classes=NAMES,
        domains=("",),
        train=split("train", train),
        test=split("test", test),
        bad_images=(),
    )


def tasks(data: Dataset, *groups: Sequence[int]) -> list[Piece]:
    return cut(data, [StreamTask(name=f"t{n}", classes=tuple(g)) for n, g in enumerate(groups)])


def counts(pieces: Sequence[Piece]) -> list[dict[int, int]]:
    """Training images of each class, task by task."""
    found = [np.unique(p.train.labels[p.rows], return_counts=True) for p in pieces]
    return [dict(zip(ids.tolist(), n.tolist(), strict=True)) for ids, n in found]


# Draws.


@pytest.mark.parametrize("seed", [0, 1993, 2**32 - 1])
def test_draws_are_those_of_torch(seed: int) -> None:
    own, torchs = Draws(seed), torch.Generator().manual_seed(seed)
    for count in (0, 1, 2, 7, 100, 10_007):
        shuffled = torch.randperm(count, generator=torchs)
        assert own.permutation(count).tolist() == shuffled.tolist()
        if count:
            drawn = torch.randint(0, count, (5,), generator=torchs)
            assert own.integers(count, 5).tolist() == drawn.tolist()


# Si-Blurry.


def published(
    labels: np.ndarray, classes: int, shares: Blurry, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The sampler's recipe once more, image by image with torch: classes and rows of each task."""
    generator, count = torch.Generator().manual_seed(seed), shares.tasks
    first = classes * shares.disjoint // 100 // count * count
    order = torch.randperm(classes, generator=generator)

    def shared_out(ids: torch.Tensor) -> list[list[int]]:
        if shares.cuts == "even" or not len(ids):
            return ids.reshape(count, -1).tolist()
        ends = torch.randint(0, len(ids), (count - 1,), generator=generator).sort().values.tolist()
        return [ids[a:b].tolist() for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]

    alone, mixed = shared_out(order[:first]), shared_out(order[first:])
    own = [[n for n, label in enumerate(labels) if label in ids] for ids in alone]
    others = [[n for n, label in enumerate(labels) if label in ids] for ids in mixed]
    if shares.cuts == "even":
        give = [len(rows) * shares.mixed // 100 for rows in others]
        take = [sum(give) // count] * count
    else:
        whole = sum(map(len, others)) * shares.mixed // 100
        ends = torch.randint(0, whole, (count - 1,), generator=generator).sort().values.tolist()
        take = give = [b - a for a, b in zip([0, *ends], [*ends, whole], strict=True)]
    pool: list[int] = []
    for number, rows in enumerate(others):
        pool += rows[: give[number]]
        others[number] = rows[give[number] :]
    pool = [pool[n] for n in torch.randperm(len(pool), generator=generator)]
    found = []
    for number in range(count):
        dealt, pool = pool[: take[number]], pool[take[number] :]
        task = own[number] + others[number] + dealt
        found.append([task[n] for n in torch.randperm(len(task), generator=generator)])
    return alone, found


@pytest.mark.parametrize("cuts", ["even", "drawn"])
@pytest.mark.parametrize(("disjoint", "mixed"), [(50, 10), (0, 30), (60, 90)])
@pytest.mark.parametrize("seed", [0, 1, 77])
def test_a_blurry_stream_is_the_published_one(
    cuts: Any, disjoint: int, mixed: int, seed: int
) -> None:
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(20), 13))
    shares = Blurry(tasks=5, disjoint=disjoint, mixed=mixed, cuts=cuts)
    alone, wanted = published(labels, 20, shares, seed)
    found = deal(labels, 20, shares, seed)
    assert [rows.tolist() for rows in found] == wanted
    # A disjoint class is in its own task alone; no row is in two.
    for number, ids in enumerate(alone):
        for other, rows in enumerate(found):
            assert other == number or not np.isin(labels[rows], ids).any()
    every = np.concatenate(found)
    assert len(np.unique(every)) == len(every)


def test_a_blurry_class_is_tested_once_an_image_of_it_was_shown() -> None:
    data = dataset([n % 6 for n in range(120)], [n % 6 for n in range(30)])
    shares = Blurry(tasks=3, disjoint=50, mixed=30, cuts="even")
    pieces = blurry.pieces(data, shares, 4)
    shown: set[int] = set()
    for piece in pieces:
        new = set(data.train.labels[piece.rows].tolist()) - shown
        assert data.test.labels[piece.tested].tolist() == [c for c in data.test.labels if c in new]
        shown |= new
    # One image in three of a mixed class is dealt: all of them are seen at the start.
    assert len(set(data.train.labels[pieces[0].rows].tolist())) == 4
    assert sum(len(p.tested) for p in pieces) == 30


def test_classes_that_tasks_cannot_share_evenly_are_refused() -> None:
    shares = Blurry(tasks=4, disjoint=50, mixed=10, cuts="even")
    with pytest.raises(ConfigError, match="6 of 10 classes are mixed, which 4 tasks cannot share"):
        deal(np.arange(10), 10, shares, 0)


# Few images.


def test_few_shots_leave_the_first_task_whole() -> None:
    data = dataset([n % 6 for n in range(60)])
    pieces = tasks(data, (0, 1, 2), (3, 4), (5,))
    first = thinning.few_shot(pieces, FewShot(shots=4, seed=None))
    assert counts(first) == [{0: 10, 1: 10, 2: 10}, {3: 4, 4: 4}, {5: 4}]
    assert first[2].rows.tolist() == [5, 11, 17, 23]
    drawn = thinning.few_shot(pieces, FewShot(shots=4, seed=1))
    assert counts(drawn) == counts(first)
    assert drawn[2].rows.tolist() != first[2].rows.tolist()
    again = thinning.few_shot(pieces, FewShot(shots=4, seed=1))
    assert [p.rows.tolist() for p in again] == [p.rows.tolist() for p in drawn]
    with pytest.raises(ConfigError, match='class "dog" has 10 training images, fewer than 11'):
        thinning.few_shot(pieces, FewShot(shots=11, seed=None))


def tail(**changes: Any) -> LongTailed:
    given = {"imbalance": 100, "order": "ordered", "seed": 0, "many": 100, "few": 20}
    return LongTailed(**{**given, **changes})


def test_a_long_tail_falls_by_one_factor_in_learning_order() -> None:
    data = dataset([n % 6 for n in range(1200)])
    pieces = thinning.long_tailed(tasks(data, (5, 4), (3, 2), (1, 0)), tail())
    # 200 * 100 ** (-i / 5), rounded down.
    assert counts(pieces) == [{5: 200, 4: 79}, {3: 31, 2: 12}, {1: 5, 0: 2}]
    # The first images in file order.
    assert pieces[2].rows.tolist() == [0, 1, 6, 7, 13, 19, 25]
    shuffled = thinning.long_tailed(tasks(data, (5, 4), (3, 2), (1, 0)), tail(order="shuffled"))
    found = {c: n for task in counts(shuffled) for c, n in task.items()}
    assert sorted(found.values()) == [2, 5, 12, 31, 79, 200]
    assert [found[c] for c in (5, 4, 3, 2, 1, 0)] != [200, 79, 31, 12, 5, 2]


def test_the_numbers_of_cifar_100_are_the_published_ones() -> None:
    """500 images, a hundred classes, imbalance 100: 10,847 images in the paper's code."""
    data = Dataset(
        classes=tuple(map(str, range(100))),
        domains=("",),
        train=split("train", [0]),
        test=split("test", [0]),
        bad_images=(),
    )
    labels = np.repeat(np.arange(100), 500).astype(np.int32)
    piece = Piece(
        name="all",
        train=Split(**{**vars(data.train), "labels": labels}),
        rows=np.arange(50_000),
        test=data.test,
        tested=np.zeros(0, dtype=np.int64),
        classes=data.classes,
        order=range(100),
        domains=("",),
    )
    [thin] = thinning.long_tailed([piece], tail())
    wanted = [int(500 * 0.01 ** (i / 99)) for i in range(100)]
    assert np.bincount(labels[thin.rows]).tolist() == wanted
    assert (sum(wanted), wanted[0], wanted[-1]) == (10_847, 500, 5)


def test_groups_by_number_of_images() -> None:
    found = thinning.groups({0: 101, 1: 100, 2: 20, 3: 19, 4: 0}, tail())
    assert found == {"many": (0,), "medium": (1, 2), "few": (3, 4)}


# Online.


def test_sections_take_every_image_once_in_the_drawn_order() -> None:
    data = dataset([0] * 7 + [1] * 5 + [2] * 4 + [3] * 6)
    pieces = online.arriving(tasks(data, (0, 1), (3, 2)), seed=3)
    assert sorted(np.asarray(pieces[0].arrival).tolist()) == list(range(12))
    assert np.asarray(pieces[0].arrival).tolist() != list(range(12))
    sections = online.sections(pieces, 5)
    assert [p.name for p in sections] == [f"{n} images" for n in (5, 10, 15, 20, 22)]
    sequence = np.concatenate([np.asarray(p.arrival) for p in pieces])
    assert [sorted(sequence[n : n + 5].tolist()) for n in range(0, 22, 5)] == [
        p.rows.tolist() for p in sections
    ]
    # Tested from the section on that shows the class, not from the task on that has it.
    stream = arrange(sections, data.classes)
    shown: set[int] = set()
    for section, task in zip(sections, stream.tasks, strict=True):
        new = set(data.train.labels[section.rows].tolist()) - shown
        assert {stream.ids[c] for c in task.test.classes} == new
        shown |= new
    # Numbered in the order of their first image.
    labels = data.train.labels[sequence].tolist()
    assert list(stream.ids) == list(dict.fromkeys(labels))


def test_a_drawn_order_is_kept() -> None:
    data = dataset([n % 6 for n in range(60)])
    pieces = blurry.pieces(data, Blurry(tasks=3, disjoint=50, mixed=30, cuts="even"), 8)
    assert [p.arrival for p in online.arriving(pieces, 1)] == [p.arrival for p in pieces]


# Manifests.


def same(one: Stream, other: Stream) -> bool:
    pairs = zip(one.tasks, other.tasks, strict=True)
    return one.classes == other.classes and all(
        (a.name, a.learned, a.tested) == (b.name, b.learned, b.tested) for a, b in pairs
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_manifest_gives_the_same_stream(tmp_path: Path, ending: str) -> None:
    data = dataset([n % 6 for n in range(120)], [n % 6 for n in range(30)])
    pieces = blurry.pieces(data, Blurry(tasks=3, disjoint=50, mixed=30, cuts="even"), 8)
    path = tmp_path / f"split.{ending}"
    path.write_bytes(manifest.write(pieces, "8", parquet=ending == "parquet"))
    found = manifest.pieces(str(path), data)
    assert same(arrange(found, NAMES), arrange(pieces, NAMES))
    assert [np.asarray(p.arrival).tolist() for p in found] == [
        np.asarray(p.arrival).tolist() for p in pieces
    ]


def shuffled(data: Split, seed: int) -> Split:
    """The same images on another machine: in other folders, and in another order."""
    rows = np.random.default_rng(seed).permutation(len(data))
    where = data.where.at(rows)
    files = tuple(name.replace("/data/", "/mnt/elsewhere/") for name in where.files)
    return Split(
        **{
            **vars(data),
            "digests": data.digests[rows],
            "labels": data.labels[rows],
            "domains": data.domains[rows],
            "where": Places(**{**vars(where), "files": files}),
        }
    )


@pytest.mark.parametrize("identity", ["image", "place"])
def test_a_manifest_finds_images_wherever_they_are(tmp_path: Path, identity: str) -> None:
    data = dataset([n % 6 for n in range(60)], [n % 6 for n in range(12)])
    pieces = tasks(data, (4, 0), (2, 1, 3), (5,))
    whole = pcsv.read_csv(_file(tmp_path, manifest.write(pieces, "x", parquet=False)))
    kept = whole.select(["task", "split", identity])
    pcsv.write_csv(kept, tmp_path / "less.csv")
    moved = Dataset(
        **{**vars(data), "train": shuffled(data.train, 1), "test": shuffled(data.test, 2)}
    )
    found = manifest.pieces(str(tmp_path / "less.csv"), moved)
    for piece, wanted in zip(found, pieces, strict=True):
        for own, rows, other, those in (
            (piece.train, piece.rows, wanted.train, wanted.rows),
            (piece.test, piece.tested, wanted.test, wanted.tested),
        ):
            assert sorted(own.digests[rows].tolist()) == sorted(other.digests[those].tolist())


def _file(folder: Path, data: bytes, name: str = "split.csv") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_equal_images_are_each_found(tmp_path: Path) -> None:
    """The same bytes in two classes, and twice in one."""
    data = dataset([0, 1, 1, 2])
    data.train.digests[:] = data.train.digests[0]
    pieces = tasks(data, (0,), (1, 2))
    path = _file(tmp_path, manifest.write(pieces, "x", parquet=False))
    assert [p.rows.tolist() for p in manifest.pieces(path, data)] == [[0], [1, 2, 3]]


def test_what_a_manifest_cannot_say_is_refused(tmp_path: Path) -> None:
    data = dataset([0, 1, 1, 2])
    text = manifest.write(tasks(data, (0,), (1, 2)), "x", parquet=False).decode()

    def refused(content: str, match: str) -> None:
        with pytest.raises(BadDataError, match=match):
            manifest.pieces(_file(tmp_path, content.encode()), data)

    digest = data.train.digests[1].tobytes().hex()
    other = "0" * 64
    refused(
        text.replace(digest, other),
        f'lacks 1 of 4 train images; the first one is of task "t1": image "{other}", class "bee"',
    )
    refused(text.replace('"cat"', '"cow"'), 'lacks 1 of 4 train images.*class "cow"')
    refused(text.replace('"train"', '"valid"'), 'must be train or test, got "valid"')
    refused(text.replace('"split"', '"part"'), "needs the columns task, split and image or place")
    refused("\x00\x01\n1,2\n", "needs the columns|neither Parquet nor comma-separated values")
    again = text.splitlines()
    test = next(line for line in again if '"test"' in line and '"t0"' in line)
    refused("\n".join([*again, test.replace('"t0"', '"t1"')]), "lists a test image in two tasks")
    with pytest.raises(BadDataError, match=r"gone\.csv: not found"):
        manifest.pieces(str(tmp_path / "gone.csv"), data)
