"""SLDA: exact linear discriminant analysis, against scikit-learn and small oracles."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from graftwork.methods import HyperparameterError
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.representations.slda import SLDA

CLASSES = [0, 1, 2]


def make_rows(number: int = 90, width: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(0)
    # Unequal class sizes, so that priors and the pooling weights matter.
    labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(number // 6)
    mix = torch.randn(width, width, generator=generator)
    means = 2 * torch.randn(3, width, generator=generator)
    noise = torch.randn(number, width, generator=generator) @ mix
    return Rows(
        features=means[labels] + noise + 5,
        labels=labels,
        samples=torch.arange(number),
        num_classes=3,
    )


def scores(method: SLDA, rows: Rows) -> torch.Tensor:
    total = method.statistics(rows, 0)
    return method.logits(method.solve(total, total, CLASSES, 0), rows.features, 0)


def test_equals_lda_of_scikit_learn():
    rows = make_rows()
    reference = LinearDiscriminantAnalysis(solver="lsqr")
    reference.fit(rows.features.double().numpy(), rows.labels.numpy())
    expected = reference.predict_log_proba(rows.features.double().numpy())
    ours = scores(SLDA(shrinkage=0.0, prior=True), rows).log_softmax(1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_equals_the_paper_formula_up_to_a_number_per_row():
    rows, shrinkage = make_rows(), 1e-4
    features, labels = rows.features.double(), rows.labels
    means = torch.stack([features[labels == label].mean(0) for label in CLASSES])
    residual = features - means[labels]
    covariance = residual.T @ residual / len(features)
    precision = torch.linalg.pinv((1 - shrinkage) * covariance + shrinkage * torch.eye(8))
    expected = features @ precision @ means.T - 0.5 * (means @ precision * means).sum(1)
    ours = scores(SLDA(), rows).double()
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True),
        expected - expected.mean(1, keepdim=True),
        rtol=1e-4,
        atol=1e-4,
    )


def test_full_shrinkage_is_the_nearest_class_mean():
    rows = make_rows()
    means = torch.stack([rows.features[rows.labels == label].mean(0) for label in CLASSES])
    nearest = torch.cdist(rows.features, means).argmin(1)
    assert torch.equal(scores(SLDA(shrinkage=1.0), rows).argmax(1), nearest)


def test_pooled_covariance_equals_welford_with_the_class_factor():
    rows = make_rows()
    means, counts = torch.zeros(3, 8, dtype=torch.float64), [0] * 3
    scatter = torch.zeros(8, 8, dtype=torch.float64)
    for row, label in zip(rows.features.double(), rows.labels.tolist(), strict=True):
        step = row - means[label]
        scatter += counts[label] / (counts[label] + 1) * torch.outer(step, step)
        means[label] += step / (counts[label] + 1)
        counts[label] += 1
    total = SLDA().statistics(rows, 0)
    exact = total["moment"] - (total["sum"] / total["count"][:, None]).T @ total["sum"]
    torch.testing.assert_close(exact, scatter, rtol=1e-10, atol=1e-8)


def test_prior_adds_the_log_share_of_the_rows():
    rows = make_rows()
    difference = scores(SLDA(prior=True), rows) - scores(SLDA(), rows)
    shares = torch.tensor([1 / 2, 1 / 3, 1 / 6]).log()
    torch.testing.assert_close(difference, shares.expand(90, 3), rtol=1e-3, atol=1e-4)


def test_singular_covariance_without_shrinkage_is_refused():
    rows = make_rows(6)
    with pytest.raises(HyperparameterError, match=r"shrinkage: must be greater than 0 .* got 0.0"):
        scores(SLDA(shrinkage=0.0), rows)
