"""Metrics: numbers by hand, and laws that hold for any predictions."""

import json
import time

import numpy as np
import pytest

from graftwork.operators.errors import BadDataError
from graftwork.operators.evaluation.definitions import DEFINITIONS
from graftwork.operators.evaluation.metrics import (
    Summary,
    forgetting,
    forgetting_chaudhry,
    summarise,
)


def table(rows: list[tuple[int, int, int, int, int, int]]) -> dict[str, np.ndarray]:
    names = ("task_trained", "sample", "label", "predicted", "predicted_in_task", "true_task")
    return dict(zip(names, np.array(rows).T, strict=True))


def random_columns(
    tasks: int, per_task: list[int], classes_per_task: int, seed: int, skill: float = 0.5
) -> dict[str, np.ndarray]:
    """Predictions from random scores: argmax over seen classes, and over the task's own."""
    rng = np.random.default_rng(seed)
    k = classes_per_task
    true_task = np.repeat(np.arange(tasks), per_task)
    label = true_task * k + np.arange(len(true_task)) % k
    parts: list[np.ndarray] = []
    for i in range(tasks):
        seen = np.flatnonzero(true_task <= i)
        scores = rng.random((len(seen), (i + 1) * k))
        scores[np.arange(len(seen)), label[seen]] += skill
        own = np.arange((i + 1) * k) // k == true_task[seen][:, None]
        in_task = np.where(own, scores, -1.0).argmax(1)
        columns = [np.full(len(seen), i), seen, label[seen], scores.argmax(1), in_task]
        parts.append(np.stack([*columns, true_task[seen]]))
    names = ("task_trained", "sample", "label", "predicted", "predicted_in_task", "true_task")
    return dict(zip(names, np.concatenate(parts, axis=1), strict=True))


@pytest.fixture
def by_hand() -> Summary:
    """Two tasks, classes {0, 1} and {2}; 4 + 1 test images.

    After task 0: 3 of 4 right. After task 1: 2 of 4 right on task 0, 1 of 1 on task 1.
    """
    return summarise(
        table(
            [
                (0, 0, 0, 0, 0, 0),
                (0, 1, 0, 0, 0, 0),
                (0, 2, 0, 1, 1, 0),
                (0, 3, 1, 1, 1, 0),
                (1, 0, 0, 0, 0, 0),
                (1, 1, 0, 2, 0, 0),
                (1, 2, 0, 2, 1, 0),
                (1, 3, 1, 1, 1, 0),
                (1, 4, 2, 2, 2, 1),
            ]
        ),
        num_tasks=2,
        num_classes=4,
    )


def test_numbers_by_hand(by_hand: Summary) -> None:
    s = by_hand
    assert s.matrix == [[75.0], [50.0, 100.0]]
    assert s.curve == [75.0, 60.0]
    assert (s.a_avg, s.a_last) == (67.5, 60.0)
    assert s.curve_macro_task == [75.0, 75.0]
    # After task 0: class 0 has 2 of 3, class 1 has 1 of 1. After task 1: 1 of 3, 1 of 1, 1 of 1.
    third = 100.0 / 3
    assert s.curve_macro_class == pytest.approx([(2 * third + 100) / 2, (third + 200) / 3])
    assert (s.forgetting, s.forgetting_chaudhry, s.forgetting_avalanche, s.bwt) == (25, 25, 25, -25)
    assert s.task_matrix == [[75.0], [75.0, 100.0]]
    assert s.task_curve == [75.0, 80.0]
    assert s.per_class == [pytest.approx(third), 100.0, 100.0, None]
    assert s.confusion.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_json_is_plain_and_complete(by_hand: Summary) -> None:
    value = json.loads(json.dumps(by_hand.to_json(), allow_nan=False))
    assert value["confusion"] == [[0, 0, 1], [0, 2, 2], [1, 1, 1], [2, 2, 1]]
    assert value["matrix"] == by_hand.matrix
    # What only some streams are measured by is absent elsewhere.
    assert set(value) == set(vars(by_hand)) - {"groups", "a_auc", "ahead"}
    assert by_hand.finals()["task_a_avg"] == 77.5
    assert by_hand.curves()["accuracy"] == [75.0, 60.0]


def test_variants_of_forgetting_differ_where_their_definitions_do() -> None:
    # Task 0 goes 50 -> 80 -> 90: the last task helped.
    matrix = [[50.0], [80.0, 60.0], [90.0, 40.0, 70.0]]
    assert forgetting(matrix) == (0 + 20) / 2
    assert forgetting_chaudhry(matrix) == (-10 + 20) / 2


def test_one_task_has_nothing_to_forget() -> None:
    s = summarise(table([(0, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0)]), 1, 2)
    assert (s.matrix, s.a_avg, s.a_last) == ([[50.0]], 50.0, 50.0)
    finals = (s.forgetting, s.forgetting_chaudhry, s.forgetting_avalanche, s.bwt)
    assert [str(v) for v in finals] == ["0.0"] * 4  # no -0.0 either


@pytest.mark.parametrize("seed", range(5))
def test_laws(seed: int) -> None:
    balanced = summarise(random_columns(6, [20] * 6, 4, seed), 6, 24)
    assert balanced.curve == pytest.approx(balanced.curve_macro_task)
    assert balanced.curve == pytest.approx(balanced.curve_macro_class)
    skewed = summarise(random_columns(4, [8, 40, 12, 20], 4, seed), 4, 16)
    assert skewed.curve != pytest.approx(skewed.curve_macro_task)
    for s in (balanced, skewed):
        assert s.forgetting >= max(0.0, s.forgetting_chaudhry, s.forgetting_avalanche)
        assert s.bwt == -s.forgetting_avalanche
        for row, free in zip(s.task_matrix, s.matrix, strict=True):
            assert all((a or 0) >= (b or 0) for a, b in zip(row, free, strict=True))
        assert s.task_a_avg >= s.a_avg
        assert 100.0 * np.trace(s.confusion) / s.confusion.sum() == s.a_last


def test_order_of_rows_does_not_matter() -> None:
    columns = random_columns(5, [10] * 5, 2, 0)
    shuffle = np.random.default_rng(1).permutation(len(columns["label"]))
    shuffled = {name: column[shuffle] for name, column in columns.items()}
    assert summarise(columns, 5, 10).to_json() == summarise(shuffled, 5, 10).to_json()


def test_shared_classes_of_a_domain_incremental_run() -> None:
    rows = [(0, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0)]
    rows += [(1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 0), (1, 2, 0, 1, 1, 1), (1, 3, 1, 1, 1, 1)]
    s = summarise(table(rows), 2, 2)
    assert s.matrix == [[50.0], [100.0, 50.0]]
    assert (s.curve, s.bwt, s.forgetting) == ([50.0, 75.0], 50.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 0, 0, 0, 0)], "no rows of task 0 after task 1"),
        ([(0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0)], "no rows of task 1 after task 1"),
        (
            [(0, 0, 0, 0, 0, 1), (1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1)],
            "0 rows of task 0 after task 0; expected 1",
        ),
        ([(0, 0, 0, 9, 0, 0)], "predicted must be in 0..3, found 9..9"),
    ],
)
def test_an_incomplete_table_is_refused(
    rows: list[tuple[int, int, int, int, int, int]], message: str
) -> None:
    with pytest.raises(BadDataError, match=message):
        summarise(table(rows), num_tasks=2, num_classes=4)


def test_large_tables_take_less_than_a_second() -> None:
    sizes = np.arange(1, 51) * 200
    trained = np.repeat(np.arange(50), sizes)
    sample = np.concatenate([np.arange(n) for n in sizes])
    label, predicted = sample // 100, (sample * 7) % (sizes[trained] // 100)
    columns = {
        "task_trained": trained,
        "sample": sample,
        "label": label,
        "true_task": sample // 200,
    }
    columns |= {"predicted": predicted, "predicted_in_task": label}
    start = time.perf_counter()
    summarise(columns, num_tasks=50, num_classes=100)
    assert time.perf_counter() - start < 1.0


def test_every_definition_names_formula_and_source() -> None:
    assert all(all(parts) for parts in DEFINITIONS.values())
