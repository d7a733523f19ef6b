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
            holdout.held_out(images, labels, domains, share)
        return
    held = holdout.held_out(images, labels, domains, share)
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
    held = holdout.held_out(images, labels, domains, 0.4)
    for seed in range(5):
        turned = np.random.default_rng(seed).permutation(60)
        again = holdout.held_out(images[turned], labels[turned], domains[turned], 0.4)
        assert np.array_equal(again, held[turned])


def test_other_classes_do_not_matter() -> None:
    images, labels, none = digests(60), np.arange(60) % 4, np.zeros(60, np.int32)
    held = holdout.held_out(images, labels, none, 0.3)
    some = labels != 2
    without = holdout.held_out(images[some], labels[some], none[some], 0.3)
    assert np.array_equal(without, held[some])


@pytest.mark.parametrize(("count", "share"), [(1, 0.01), (2, 0.9), (5, 0.9)])
def test_a_class_that_would_have_nothing_left_is_named(count: int, share: float) -> None:
    labels = np.array([0] * 40 + [7] * count, np.int32)
    zeros = np.zeros(len(labels), np.int32)
    if count == 5:  # four and a half of five: one is left
        held = holdout.held_out(digests(len(labels)), labels, zeros, share)
        assert held[labels == 7].sum() == 4
        return
    with pytest.raises(BadDataError) as caught:
        holdout.held_out(digests(len(labels)), labels, zeros, share)
    assert str(caught.value) == (
        f"dataset.holdout: {share:g} of the {count} training images of class 7 "
        "leaves none to train on"
    )


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
    whole = pngs.plan(store, folder, **METHODS).dataset
    made = pngs.plan(store, folder, "dataset.domain=domain", "dataset.holdout=0.25", **METHODS)
    train, test = made.dataset.train, made.dataset.test
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
        pngs.plan(store, place, "dataset.holdout=0.3").dataset for place in (straight, turned)
    )
    assert names(one.train) == names(two.train)
    assert names(one.test) == names(two.test)


def test_workers_index_the_same_parts(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder, "dataset.holdout=0.25")
    stages = pngs.of(made, "dataset")
    pngs.compute(stages, store)
    splits = (made.dataset.train, made.dataset.test)
    for stage, split in zip(stages, splits, strict=True):
        index = dataset.read_index(store.read("dataset", stage.key, "index.parquet"))
        assert np.array_equal(index.digests, split.digests)
        assert np.array_equal(index.labels, split.labels)


def test_images_are_read_from_where_they_are(store: Store, folder: Path) -> None:
    from graftwork.operators.data import sources

    made = pngs.plan(store, folder, "dataset.holdout=0.25")
    by_image = {image: label for image, label, _ in TRAIN}
    for split in (made.dataset.train, made.dataset.test):
        found = list(sources.read(split.places(0, len(split))))
        assert [by_image[image] for image in found] == split.labels.tolist()


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
