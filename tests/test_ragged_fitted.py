"""Closed-form methods on ragged streams: tasks of 3, 1 and 4 classes, single images, a class that
returns with more images, and class ids that never have any.
"""

import dataclasses
from typing import Any

import pytest
import torch

from graftwork import methods
from graftwork.methods.contracts.fitted import Fitted, Rows
from graftwork.methods.representations import ridge
from tests.test_methods import VARIANTS

WIDTH, NUMBER = 12, 13
IDS = (5, 0, 11, 7, 2, 12, 9, 3)
"""Ids of the classes in the order learned; 1, 4, 6, 8 and 10 never have images."""
STREAM: tuple[dict[int, int], ...] = (
    {0: 6, 1: 6, 2: 1},
    {3: 1},
    {4: 6, 5: 1, 6: 6, 7: 6, 1: 9},
)
"""Images of each class, by its place in `IDS`, for every task; class 1 returns with more."""
SEEN = ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7])

each_variant = pytest.mark.parametrize(("name", "values"), VARIANTS)


def made(name: str, values: dict[str, Any]) -> Fitted:
    return methods.build(name, values)


def rows_of(task: dict[int, int], seed: int, gaps: bool = True, repeat: int = 1) -> Rows:
    """Rows around far apart points.

    Args:
        task: images of each class.
        gaps: ids are those of `IDS`, with others between them; otherwise 0 .. 7.
        repeat: test images instead: so many for each training image.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.tensor([c for c, number in task.items() for _ in range(number * repeat)])
    points = 8.0 * torch.eye(WIDTH)
    noise = 0.25 * torch.randn(len(place), WIDTH, generator=generator)
    number = NUMBER if gaps else len(IDS)
    ids = torch.tensor(IDS) if gaps else torch.arange(len(IDS))
    texts = torch.zeros(2, number, WIDTH)
    texts[:, ids] = points[: len(IDS)]
    return Rows(
        features=points[place] + noise,
        labels=ids[place],
        samples=torch.randint(-(2**62), 2**62, (len(place),), generator=generator),
        num_classes=number,
        texts=texts,
    )


def after(method: Fitted, number: int, gaps: bool = True) -> tuple[dict[str, torch.Tensor], Any]:
    """What predicts after a task, and the statistics of all tasks so far."""
    parts = [
        method.statistics(rows_of(task, seed, gaps), 0)
        for seed, task in enumerate(STREAM[: number + 1])
    ]
    total = parts[0]
    for part in parts[1:]:
        total = method.add(total, part)
    classes = [IDS[c] if gaps else c for c in SEEN[number]]
    return method.solve(total, parts[-1], classes, 0), total


@each_variant
@pytest.mark.parametrize("number", range(3))
def test_every_class_that_had_images_is_found(
    name: str, values: dict[str, Any], number: int
) -> None:
    method = made(name, values)
    state, total = after(method, number)
    counts = torch.zeros(NUMBER, dtype=torch.int64)
    for task in STREAM[: number + 1]:
        for place, images in task.items():
            counts[IDS[place]] += images
    assert torch.equal(total["count"], counts)
    assert all(t.isfinite().all() for t in state.values())
    test = rows_of({place: 5 for place in SEEN[number]}, seed=9)
    scores = method.logits(state, test.features, 0)
    assert scores.shape == (len(test.labels), len(SEEN[number]))
    assert bool(scores.isfinite().all())
    found = torch.tensor(IDS)[torch.tensor(SEEN[number])][scores.argmax(dim=1)]
    assert torch.equal(found, test.labels)


def test_a_class_that_is_not_fitted_does_not_choose_a_strength() -> None:
    """Two classes of one image each, one of them held out: its error is least where nothing is."""
    large = rows_of(dict.fromkeys(range(6), 40), seed=0)
    both = rows_of({6: 1, 7: 1}, seed=1)
    ids = torch.arange(1000)
    held = ridge.held_out(ids, 0)
    for one, other in ((held, ~held), (~held, held), (held, held), (~held, ~held)):
        samples = torch.stack([ids[one][0], ids[other][1]])
        tiny = dataclasses.replace(both, samples=samples)
        method = made("ranpac", {"projection_dim": 256})
        newest = method.statistics(tiny, 0)
        state = method.solve(method.add(method.statistics(large, 0), newest), newest, IDS, 0)
        assert method.report(state)["ridge"] == 1.0
        test = rows_of({6: 20, 7: 20}, seed=9)
        found = method.logits(state, test.features, 0).argmax(dim=1)
        assert found.tolist() == [6] * 20 + [7] * 20


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_a_single_image_that_is_held_out_does_not_choose_a_penalty(solver: str) -> None:
    ids = torch.arange(1000)
    held = ridge.held_out(ids, 0)
    rows = rows_of({0: 10, 1: 10, 2: 1}, seed=0)
    # Every fifth image of the others, and the only one of the third class.
    samples = torch.cat([ids[held][:4], ids[~held][:16], ids[held][9:10]])
    order = torch.tensor([0, 4, 5, 1, 6, 7, 8, 9, 10, 11, 2, 12, 13, 3, 14, 15, 16, 17, 18, 19, 20])
    rows = dataclasses.replace(rows, samples=samples[order])
    method = made("joint_linear", {"solver": solver})
    total = method.statistics(rows, 0)
    state = method.solve(total, total, IDS[:3], 0)
    kept = dataclasses.replace(
        rows, features=rows.features[:20], labels=rows.labels[:20], samples=rows.samples[:20]
    )
    without = method.statistics(kept, 0)
    # What the other two classes choose; with all rows the fit knows the third one, too.
    assert state["penalty"] == method.solve(without, without, IDS[:2], 0)["penalty"]
    test = rows_of({0: 9, 1: 9, 2: 9}, seed=9)
    found = method.logits(state, test.features, 0).argmax(dim=1)
    right = (found == torch.arange(3).repeat_interleave(9)).sum()
    assert right == 27 if solver == "ridge" else right >= 25


@each_variant
def test_ids_without_images_change_nothing(name: str, values: dict[str, Any]) -> None:
    method, test = made(name, values), rows_of({place: 3 for place in range(8)}, seed=9)
    for number in range(3):
        scores, compact = (
            method.logits(after(method, number, gaps)[0], test.features, 0)
            for gaps in (True, False)
        )
        torch.testing.assert_close(scores, compact, rtol=1e-5, atol=1e-5)


@each_variant
def test_an_id_without_images_is_the_callers_mistake(name: str, values: dict[str, Any]) -> None:
    method = made(name, values)
    _, total = after(method, 2)
    for stranger in (1, 10):
        with pytest.raises(ValueError, match=rf"at least one row each, got none of \[{stranger}\]"):
            method.solve(total, total, [*IDS, stranger], 0)


@each_variant
def test_a_class_that_returns_is_the_sum_of_its_images(name: str, values: dict[str, Any]) -> None:
    method = made(name, values)
    _, total = after(method, 2)
    parts = [rows_of(task, seed) for seed, task in enumerate(STREAM)]
    once = dataclasses.replace(
        parts[0],
        features=torch.cat([part.features for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        samples=torch.cat([part.samples for part in parts]),
    )
    at_once, features = method.statistics(once, 0), rows_of({0: 9, 1: 9}, seed=9).features
    # The newest task, which may choose a strength, is the same for both.
    newest = method.statistics(parts[-1], 0)
    together, added = (
        method.logits(method.solve(given, newest, list(IDS), 0), features, 0)
        for given in (at_once, total)
    )
    torch.testing.assert_close(added, together, rtol=1e-4, atol=1e-4)


@each_variant
def test_a_first_task_of_one_class_with_one_image(name: str, values: dict[str, Any]) -> None:
    method = made(name, values)
    alone = method.statistics(rows_of({4: 1}, seed=0), 0)
    state = method.solve(alone, alone, [IDS[4]], 0)
    scores = method.logits(state, rows_of({4: 3}, seed=9).features, 0)
    assert scores.shape == (3, 1) and bool(scores.isfinite().all())
    later = method.statistics(rows_of({6: 1}, seed=1), 0)
    state = method.solve(method.add(alone, later), later, [IDS[4], IDS[6]], 0)
    scores = method.logits(state, rows_of({4: 3, 6: 3}, seed=9).features, 0)
    # Two rows say nothing of the spread of a feature, by which this one divides.
    if (name, values.get("solver")) != ("joint_linear", "logistic"):
        assert scores.argmax(dim=1).tolist() == [0, 0, 0, 1, 1, 1]
