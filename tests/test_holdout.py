"""The held-out part of the training images: by class and domain, by the images alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.operators.data import dataset, holdout
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.store import Store
from graftwork.pipelines.planning.plan import Plan
from tests import pngs


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def hold(images: np.ndarray, labels: np.ndarray, domains: np.ndarray, share: float) -> np.ndarray:
    return holdout.held_out(
        images, labels, domains, share, lambda row: f"class {labels[row]} of domain {domains[row]}"
    )


groups = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=8).map(
    lambda pairs: sorted(set(pairs))
)


@settings(deadline=None, max_examples=60)
@given(
    groups, st.integers(2, 30), st.floats(0.01, 0.7), st.randoms(use_true_random=False), st.data()
)
def test_each_class_of_each_domain_gives_its_share(
    pairs: list[tuple[int, int]], most: int, share: float, draw: Any, data: st.DataObject
) -> None:
    counts = {pair: data.draw(st.integers(2, max(2, most)), label=str(pair)) for pair in pairs}
    wanted = {pair: max(1, round(share * count)) for pair, count in counts.items()}
    table = [pair for pair, count in counts.items() for _ in range(count)]
    draw.shuffle(table)
    labels, domains = (np.array(column, np.int32) for column in zip(*table, strict=True))
    images = digests(len(table))
    if any(wanted[pair] >= counts[pair] for pair in pairs):
        with pytest.raises(BadDataError):
            hold(images, labels, domains, share)
        return
    held = hold(images, labels, domains, share)
    assert (held.shape, held.dtype) == ((len(table),), np.bool_)
    for label, domain in pairs:
        own = (labels == label) & (domains == domain)
        assert held[own].sum() == wanted[label, domain]
        # The smallest digests, whatever else there is.
        order = sorted(np.flatnonzero(own), key=lambda row: images[row].tobytes())
        assert held[order[: wanted[label, domain]]].all()


def test_the_order_of_rows_does_not_matter() -> None:
    images, labels = digests(60), np.arange(60) % 4
    domains = np.arange(60) % 3
    held = hold(images, labels, domains, 0.4)
    for seed in range(5):
        turned = np.random.default_rng(seed).permutation(60)
        again = hold(images[turned], labels[turned], domains[turned], 0.4)
        assert np.array_equal(again, held[turned])


def test_other_classes_do_not_matter() -> None:
    images, labels, none = digests(60), np.arange(60) % 4, np.zeros(60, np.int32)
    held = hold(images, labels, none, 0.3)
    some = labels != 2
    without = hold(images[some], labels[some], none[some], 0.3)
    assert np.array_equal(without, held[some])


@pytest.mark.parametrize(("count", "share"), [(1, 0.01), (2, 0.9), (5, 0.9)])
def test_a_class_that_would_have_nothing_left_is_named(count: int, share: float) -> None:
    labels = np.array([0] * 40 + [7] * count, np.int32)
    zeros = np.zeros(len(labels), np.int32)
    if count == 5:  # four and a half of five: one is left
        held = hold(digests(len(labels)), labels, zeros, share)
        assert held[labels == 7].sum() == 4
        return
    with pytest.raises(BadDataError) as caught:
        hold(digests(len(labels)), labels, zeros, share)
    assert str(caught.value) == (
        f"dataset.holdout: {share:g} of the {count} training images of class 7 of domain 0 "
        "leaves none to train on"
    )


# --- images in several classes or domains -------------------------------------------------------


def as_before(
    images: np.ndarray, labels: np.ndarray, domains: np.ndarray, share: float
) -> np.ndarray:
    """The choice in every class of every domain alone."""
    held = np.zeros(len(labels), dtype=bool)
    names = [image.tobytes() for image in images]
    for group in set(zip(labels.tolist(), domains.tolist(), strict=True)):
        own = np.flatnonzero((labels == group[0]) & (domains == group[1])).tolist()
        last = sorted(names[row] for row in own)[max(1, round(share * len(own))) - 1]
        held[[row for row in own if names[row] <= last]] = True
    return held


def both_sides(held: np.ndarray, labels: np.ndarray, domains: np.ndarray) -> bool:
    pairs = list(zip(labels.tolist(), domains.tolist(), strict=True))
    sides = {(pair, bool(side)) for pair, side in zip(pairs, held, strict=True)}
    return len(sides) == 2 * len(set(pairs))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=6), min_size=2, max_size=6),
    st.floats(0.05, 0.6),
    st.integers(0, 99),
)
def test_an_image_is_on_one_side_and_every_class_on_both(
    groups: list[list[int]], share: float, seed: int
) -> None:
    table = [(image, n // 2, n % 2) for n, images in enumerate(groups) for image in images]
    number, labels, domains = np.array(table, np.int32).T
    images = digests(8, seed)[number]
    alone = as_before(images, labels, domains, share)
    turned = np.random.default_rng(seed).permutation(len(table))
    if not both_sides(alone, labels, domains):
        with pytest.raises(BadDataError, match="leaves none to train on"):
            hold(images, labels, domains, share)
        return
    try:
        held = hold(images, labels, domains, share)
    except BadDataError as error:
        assert "shares its training images with other classes or domains" in str(error)
        with pytest.raises(BadDataError):
            hold(images[turned], labels[turned], domains[turned], share)
        return
    assert not set(number[held].tolist()) & set(number[~held].tolist())
    assert both_sides(held, labels, domains)
    again = hold(images[turned], labels[turned], domains[turned], share)
    assert np.array_equal(again, held[turned])
    everywhere = np.isin(number, number[alone])
    if both_sides(everywhere, labels, domains):
        assert np.array_equal(held, everywhere)
    if len(np.unique(number)) == len(number):
        assert np.array_equal(held, alone)


def divided(groups: list[str], share: float = 0.5) -> str:
    """The images that are held out of classes, all of them letters in the order of digests."""
    letters = [(letter, label) for label, images in enumerate(groups) for letter in images]
    images = np.zeros((len(letters), 32), np.uint8)
    images[:, 0] = [ord(letter) for letter, _ in letters]
    labels = np.array([label for _, label in letters])
    held = hold(images, labels, np.zeros(len(labels), np.int32), share)
    sides = [{letters[row][0] for row in np.flatnonzero(held == side)} for side in (True, False)]
    assert not sides[0] & sides[1]
    return "".join(sorted(sides[0]))


@pytest.mark.parametrize(
    ("groups", "share", "expected"),
    [
        (["abcd", "bxyz"], 0.25, "ab"),  # the second holds out what the first trained on
        (["abcd", "cdxy"], 0.5, "abcx"),  # d would leave the first nothing
        (["ab", "bc"], 0.5, "ac"),
        (["bc", "ab"], 0.5, "ac"),
        (["ac", "bc", "bd"], 0.5, "ab"),
        (["ax", "xy", "yb"], 0.5, "ay"),  # b is not free: y has to be held out for x to be kept
        (["aab", "bcc"], 0.3, "ac"),
    ],
)
def test_a_shared_image_leaves_both_classes_something(
    groups: list[str], share: float, expected: str
) -> None:
    assert divided(groups, share) == expected


def test_a_choice_that_contradicts_itself_is_taken_back() -> None:
    # z is kept because of a; with b held out the last class would keep c and d, too.
    assert divided(["az", "bc", "bd", "cdz"], 0.3) == "acd"


def test_images_that_cannot_be_divided_name_a_class() -> None:
    with pytest.raises(BadDataError) as caught:
        divided(["ab", "bc", "ac"])
    assert str(caught.value) == (
        "dataset.holdout: class 0 of domain 0 shares its training images with other classes or "
        "domains, so that none is left to train on or none to hold out"
    )


def test_images_are_equal_by_their_whole_digests() -> None:
    images = digests(4)
    images[1:, :8] = images[0, :8]
    images[:, 31] = [3, 1, 2, 0]
    images[:, 8:31] = 0
    none = np.zeros(4, np.int32)
    assert hold(images, none, none, 0.25).tolist() == [False, False, False, True]
    assert hold(images, np.array([0, 0, 1, 1]), none, 0.5).tolist() == [False, True, False, True]


# --- through the spec -------------------------------------------------------------------------

TRAIN, TEST = pngs.rows(8, 0, ("x", "y")), pngs.rows(2, 5000, ("x", "y"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), TRAIN, TEST)


def names(split: dataset.Split) -> set[bytes]:
    return {digest.tobytes() for digest in split.digests}


def keys(made: Plan, operator: str) -> set[str]:
    return {stage.key for stage in pngs.of(made, operator)}


METHODS: dict[str, Any] = {"methods": ["simplecil", {"finetune": {"epochs": 1}}]}


def test_test_images_are_not_touched(store: Store, folder: Path) -> None:
    whole = pngs.plan(store, folder, **METHODS).data.sources[0]
    made = pngs.plan(store, folder, "dataset.domain=domain", "dataset.holdout=0.25", **METHODS)
    train, test = made.data.sources[0].train, made.data.sources[0].test
    assert len(whole.train) == 96
    assert names(train) | names(test) == names(whole.train)
    assert not names(train) & names(test)
    assert not names(test) & names(whole.test)
    # Two of eight of each of six classes in each of two domains.
    pairs = list(zip(test.labels.tolist(), test.domains.tolist(), strict=True))
    assert sorted(pairs) == [(c, d) for c in range(6) for d in range(2) for _ in range(2)]
    for stage in made.stages:
        files = stage.hints.get("places", {}).get("files", [])
        assert all(file.endswith("train.parquet") for file in files), stage.label
    total = sum(made.images(s) for s in pngs.of(made, "features"))
    assert total == 96


def test_every_key_changes_that_stands_for_images(store: Store, folder: Path) -> None:
    plain = pngs.plan(store, folder, **METHODS)
    held = pngs.plan(store, folder, "dataset.holdout=0.25", **METHODS)
    for operator in ("dataset", "train", "predict", "fit", "evaluate"):
        assert not keys(plain, operator) & keys(held, operator), operator
    zero = pngs.plan(store, folder, "dataset.holdout=0", **METHODS)
    assert [s.key for s in zero.stages] == [s.key for s in plain.stages]


def test_the_choice_does_not_depend_on_the_order_of_rows(store: Store, tmp_path: Path) -> None:
    straight = pngs.data(tmp_path / "one", TRAIN, TEST)
    turned = pngs.data(tmp_path / "two", TRAIN[::-1], TEST)
    one, two = (
        pngs.plan(store, place, "dataset.holdout=0.3").data.sources[0]
        for place in (straight, turned)
    )
    assert names(one.train) == names(two.train)
    assert names(one.test) == names(two.test)


def test_workers_index_the_same_parts(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder, "dataset.holdout=0.25")
    stages = pngs.of(made, "dataset")
    pngs.compute(stages, store)
    splits = (made.data.sources[0].train, made.data.sources[0].test)
    for stage, split in zip(stages, splits, strict=True):
        index = dataset.read_index(store.read("dataset", stage.key, "index.parquet"))
        assert np.array_equal(index.digests, split.digests)
        assert np.array_equal(index.labels, split.labels)


def test_images_are_read_from_where_they_are(store: Store, folder: Path) -> None:
    from graftwork.operators.data import sources

    made = pngs.plan(store, folder, "dataset.holdout=0.25")
    by_image = {image: label for image, label, _ in TRAIN}
    for split in (made.data.sources[0].train, made.data.sources[0].test):
        found = list(sources.read(split.places(0, len(split))))
        assert [by_image[image] for image in found] == split.labels.tolist()


def test_an_image_that_stands_twice_is_held_out_twice(store: Store, tmp_path: Path) -> None:
    rows = [row for row in TRAIN if row[1] < 2]
    # All images of class 0 in domain x stand in y, too; some as images of class 1.
    rows += [(image, n % 2, "y") for n, (image, label, style) in enumerate(rows)
             if (label, style) == (0, "x")]  # fmt: skip
    place = pngs.data(tmp_path / "twice", rows, TEST[:4])
    overrides = ("dataset.domain=domain", "scenario.increment=1")
    for share in (0.1, 0.25, 0.5, 0.6):
        made = pngs.plan(store, place, f"dataset.holdout={share}", *overrides).data.sources[0]
        assert not names(made.train) & names(made.test)
        assert len(made.train) + len(made.test) == len(rows) == 40
        for split in (made.train, made.test):
            groups = set(zip(split.labels.tolist(), split.domains.tolist(), strict=True))
            assert len(groups) == 4


def test_too_few_images_are_named_with_their_class_and_domain(store: Store, tmp_path: Path) -> None:
    rows = [row for row in TRAIN if (row[1], row[2]) != (3, "y")]
    [alone, *_] = (row for row in TRAIN if (row[1], row[2]) == (3, "y"))
    place = pngs.data(tmp_path / "scarce", [*rows, alone], TEST)
    listed = "dataset.classes=[ant, bee, cat, dog, elk, fox]"
    with pytest.raises(BadDataError) as caught:
        pngs.plan(store, place, "dataset.domain=domain", "dataset.holdout=0.2", listed)
    [line] = str(caught.value).splitlines()
    assert line.endswith(
        'dataset.holdout: 0.2 of the 1 training images of class 3 ("dog") in domain "y" '
        "leaves none to train on"
    )
    # Without domains there are others.
    assert (
        len(pngs.plan(store, place, "dataset.holdout=0.2", listed).data.sources[0].test)
        == 5 * 3 + 2
    )


def test_too_few_images_and_wrong_shares_are_one_line_each(store: Store, tmp_path: Path) -> None:
    scarce = pngs.data(tmp_path / "scarce", pngs.rows(1, 0), TEST)
    with pytest.raises(BadDataError) as caught:
        pngs.plan(store, scarce, "dataset.holdout=0.5")
    [line] = str(caught.value).splitlines()
    assert "dataset.holdout: 0.5 of the 1 training images of class 0" in line
    for share in ("-0.1", "0.95", "1", "half"):
        with pytest.raises(ConfigError, match=r"dataset\.holdout: must be") as refused:
            pngs.plan(store, scarce, f"dataset.holdout={share}")
        assert len(str(refused.value).splitlines()) == 1
