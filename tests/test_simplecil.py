"""SimpleCIL: means of features and cosines, against numpy."""

import dataclasses

import numpy as np
import torch

from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.representations.simplecil import SimpleCIL

METHOD = SimpleCIL()


def make_rows(number: int = 60, width: int = 8, classes: int = 5) -> Rows:
    generator = torch.Generator().manual_seed(0)
    return Rows(
        features=torch.randn(number, width, generator=generator) + 0.5,
        labels=torch.arange(number) % classes,
        samples=torch.arange(number),
        num_classes=classes,
    )


def solve(rows: Rows, classes: list[int]) -> torch.Tensor:
    total = METHOD.statistics(rows, 0)
    return METHOD.solve(total, total, classes, 0)["prototypes"]


def test_logits_are_cosines_to_class_means():
    rows = make_rows()
    features, labels = rows.features.double().numpy(), rows.labels.numpy()
    means = np.stack([features[labels == label].mean(0) for label in range(5)])
    expected = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ (
        means / np.linalg.norm(means, axis=1, keepdims=True)
    ).T
    scores = METHOD.logits({"prototypes": solve(rows, [*range(5)])}, rows.features, 0)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_means_are_of_features_that_are_not_normalised():
    rows = Rows(
        features=torch.tensor([[1.0, 0.0], [0.0, 3.0]]),
        labels=torch.tensor([0, 0]),
        samples=torch.arange(2),
        num_classes=1,
    )
    assert solve(rows, [0]).tolist() == [[0.5, 1.5]]


def test_permuting_the_class_order_permutes_the_prototypes():
    rows = make_rows()
    assert torch.equal(solve(rows, [3, 1, 4]), solve(rows, [*range(5)])[[3, 1, 4]])


def test_final_prototypes_are_the_same_for_any_increment():
    rows = make_rows()
    joint = METHOD.statistics(rows, 0)
    total = None
    for label in range(5):
        member = rows.labels == label
        part = METHOD.statistics(
            dataclasses.replace(
                rows,
                features=rows.features[member],
                labels=rows.labels[member],
                samples=rows.samples[member],
            ),
            0,
        )
        total = part if total is None else METHOD.add(total, part)
    assert total is not None
    torch.testing.assert_close(total["sum"], joint["sum"], rtol=1e-12, atol=1e-12)
    assert torch.equal(
        METHOD.solve(total, total, [*range(5)], 0)["prototypes"], solve(rows, [*range(5)])
    )


def test_scaling_the_features_leaves_predictions_unchanged():
    rows = make_rows()
    scaled = dataclasses.replace(rows, features=rows.features * 7.5)
    first, second = (
        METHOD.logits({"prototypes": solve(r, [*range(5)])}, r.features, 0) for r in (rows, scaled)
    )
    torch.testing.assert_close(first, second)
    assert torch.equal(first.argmax(1), second.argmax(1))


def test_duplicating_the_rows_leaves_the_prototypes_unchanged():
    rows = make_rows()
    total = METHOD.statistics(rows, 0)
    twice = METHOD.add(total, total)
    assert torch.equal(
        METHOD.solve(twice, total, [*range(5)], 0)["prototypes"], solve(rows, [*range(5)])
    )
