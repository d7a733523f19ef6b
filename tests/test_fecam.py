"""FeCAM: against a plain numpy computation per class, and its invariants."""

import dataclasses

import numpy as np
import pytest
import torch

from graftwork.methods import HyperparameterError
from graftwork.methods.contracts.fitted import Rows, separable
from graftwork.methods.representations.fecam import FeCAM

CLASSES = [0, 1, 2, 3, 4]


def make_rows(number: int = 60, width: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 5
    means = torch.randn(5, width, generator=generator)
    mix = torch.randn(5, width, width, generator=generator) / 2
    noise = torch.randn(number, 1, width, generator=generator) @ mix[labels]
    return Rows(
        features=means[labels] + noise[:, 0],
        labels=labels,
        samples=torch.arange(number),
        num_classes=5,
    )


def solve(method: FeCAM, rows: Rows) -> dict[str, torch.Tensor]:
    total = method.statistics(rows, 0)
    return method.solve(total, total, CLASSES, 0)


def correlations(method: FeCAM, rows: Rows) -> torch.Tensor:
    """The class correlation matrices [C, D, D] that the stored factors stand for."""
    whiten = solve(method, rows)["whiten"].double()
    return torch.linalg.inv(whiten.mT @ whiten)


@pytest.mark.parametrize(("alpha1", "alpha2"), [(1.0, 0.0), (10.0, 10.0), (1.0, 0.5)])
def test_equals_the_plain_computation(alpha1: float, alpha2: float):
    rows = make_rows()
    unit = rows.features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.empty((60, 5))
    for label in CLASSES:
        members = unit[rows.labels.numpy() == label]
        covariance = np.cov(members.T)
        diagonal = np.diag(covariance).mean()
        off = covariance[~np.eye(8, dtype=bool)].mean()
        covariance = covariance + alpha1 * diagonal * np.eye(8) + alpha2 * off * (1 - np.eye(8))
        deviation = np.sqrt(np.diag(covariance))
        inverse = np.linalg.inv(covariance / np.outer(deviation, deviation))
        step = unit - members.mean(0)
        expected[:, label] = -np.einsum("nd,de,ne->n", step, inverse, step)
    method = FeCAM(alpha1=alpha1, alpha2=alpha2)
    scores = method.logits(solve(method, rows), rows.features, 0)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-6)


def pooled_distances(rows: Rows, alpha1: float, alpha2: float) -> np.ndarray:
    """Negative squared distances [N, C] under the pooled covariance, in the closed form."""
    unit = rows.features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    labels = rows.labels.numpy()
    classes = np.unique(labels)
    means = np.stack([unit[labels == label].mean(0) for label in classes])
    within = unit - means[np.searchsorted(classes, labels)]
    covariance = within.T @ within / (len(unit) - len(classes))
    width = len(covariance)
    off = covariance[~np.eye(width, dtype=bool)].mean()
    covariance += alpha1 * np.diag(covariance).mean() * np.eye(width)
    covariance += alpha2 * off * (1 - np.eye(width))
    deviation = np.sqrt(np.diag(covariance))
    inverse = np.linalg.inv(covariance / np.outer(deviation, deviation))
    step = unit[:, None] - means
    return -np.einsum("ncd,de,nce->nc", step, inverse, step)


@pytest.mark.parametrize(("alpha1", "alpha2"), [(0.0, 0.0), (1.0, 0.0), (10.0, 10.0)])
def test_a_common_covariance_is_the_pooled_one_in_its_closed_form(alpha1: float, alpha2: float):
    rows, method = make_rows(), FeCAM(alpha1=alpha1, alpha2=alpha2, covariance="common")
    scores = method.logits(solve(method, rows), rows.features, 0)
    expected = pooled_distances(rows, alpha1, alpha2)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=2e-5)
    # It is no other name for what each class has of its own.
    own = FeCAM(alpha1=alpha1 + 0.1, alpha2=alpha2)
    others = own.logits(solve(own, rows), rows.features, 0)
    assert not torch.allclose(others, scores, atol=0.01)


def test_a_class_of_one_image_is_measured_with_the_common_covariance():
    rows, method = make_rows(), FeCAM(covariance="common")
    index = ((rows.labels != 2) | (torch.arange(60) == 2)).nonzero()[:, 0]
    few = dataclasses.replace(
        rows, features=rows.features[index], labels=rows.labels[index], samples=index
    )
    scores = method.logits(solve(method, few), few.features, 0)
    np.testing.assert_allclose(
        scores.numpy(), pooled_distances(few, 1.0, 0.0), rtol=1e-5, atol=1e-5
    )
    # It adds no spread: without it the covariance is the same.
    rest = few.labels != 2
    without = dataclasses.replace(
        few, features=few.features[rest], labels=few.labels[rest], samples=few.samples[rest]
    )
    total = method.statistics(without, 0)
    alone = method.solve(total, total, [0, 1, 3, 4], 0)
    torch.testing.assert_close(alone["whiten"], solve(method, few)["whiten"])
    # And where every class has a single image, nothing is known of any spread.
    ones = dataclasses.replace(
        rows, features=rows.features[:5], labels=rows.labels[:5], samples=torch.arange(5)
    )
    assert torch.equal(solve(method, ones)["whiten"], torch.eye(8))


def test_a_common_covariance_is_no_matter_of_a_class_alone():
    assert separable(FeCAM()) and not separable(FeCAM(covariance="common"))
    assert FeCAM.card.separable
    with pytest.raises(
        HyperparameterError, match=r"alpha1: .* covariance of 5 classes with 10 rows"
    ):
        solve(FeCAM(alpha1=0.0, covariance="common"), make_rows(10))


def test_diagonal_of_the_correlation_is_one():
    diagonal = correlations(FeCAM(), make_rows()).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=1e-6, atol=1e-6)


def test_identity_correlation_is_the_nearest_class_mean():
    rows = make_rows()
    state = solve(FeCAM(), rows)
    state["whiten"] = torch.eye(8).expand(5, 8, 8)
    unit = torch.nn.functional.normalize(rows.features, dim=1)
    expected = -torch.cdist(unit, state["mean"]).square()
    torch.testing.assert_close(
        FeCAM().logits(state, rows.features, 0), expected, rtol=1e-4, atol=1e-5
    )


def test_class_order_only_permutes():
    rows, method = make_rows(), FeCAM()
    total = method.statistics(rows, 0)
    state = method.solve(total, total, CLASSES, 0)
    other = method.solve(total, total, [3, 0, 4], 0)
    assert all(torch.equal(other[name], state[name][[3, 0, 4]]) for name in state)


def test_scaling_a_channel_leaves_the_correlation_unchanged():
    method, rows = FeCAM(alpha1=0.0), make_rows(100)
    total = method.statistics(rows, 0)
    scale = torch.ones(8, dtype=torch.float64)
    scale[3] = 10.0
    scaled = {
        **total,
        "sum": total["sum"] * scale,
        "moment": total["moment"] * torch.outer(scale, scale),
    }
    torch.testing.assert_close(
        method.solve(scaled, scaled, CLASSES, 0)["whiten"],
        method.solve(total, total, CLASSES, 0)["whiten"],
        rtol=1e-5,
        atol=1e-5,
    )


def test_large_shrinkage_is_never_indefinite():
    # alpha2 <= alpha1 keeps the shrunk covariance positive for any sign of the mean covariance.
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        rows = dataclasses.replace(make_rows(15), features=torch.randn(15, 8, generator=generator))
        assert solve(FeCAM(alpha1=10.0, alpha2=10.0), rows)["whiten"].isfinite().all()


@pytest.mark.parametrize("copies", [1, 2, 7])
def test_class_without_spread_is_compared_by_euclidean_distance(copies: int):
    rows = make_rows(60)
    keep = (rows.labels != 2) | (torch.arange(60) == 2)
    index = torch.cat([keep.nonzero()[:, 0], torch.tensor([2] * (copies - 1), dtype=torch.int64)])
    rows = dataclasses.replace(
        rows,
        features=rows.features[index],
        labels=rows.labels[index],
        samples=torch.arange(len(index)),
    )
    assert torch.equal(solve(FeCAM(), rows)["whiten"][2], torch.eye(8))


def test_constant_channel_is_harmless():
    rows = make_rows()
    features = rows.features.clone()
    features[:, 4] = 0.0
    state = solve(FeCAM(), dataclasses.replace(rows, features=features))
    assert FeCAM().logits(state, features, 0).isfinite().all()


def test_singular_covariance_without_shrinkage_is_refused():
    with pytest.raises(
        HyperparameterError, match=r"alpha1: must be larger: .* class 0 with 3 rows"
    ):
        solve(FeCAM(alpha1=0.0), make_rows(15))


def test_tukey_refuses_negative_features():
    rows = make_rows()
    positive = dataclasses.replace(rows, features=rows.features.abs())
    root = dataclasses.replace(rows, features=rows.features.abs().double().sqrt())
    torch.testing.assert_close(
        solve(FeCAM(tukey=0.5), positive)["whiten"], solve(FeCAM(), root)["whiten"]
    )
    with pytest.raises(HyperparameterError, match=r"tukey: must be 1 .* got 0.5"):
        solve(FeCAM(tukey=0.5), rows)


def test_sums_hold_the_classes_that_were_seen_and_add_up():
    rows, method = make_rows(), FeCAM()
    whole = method.statistics(rows, 0)
    parts = []
    shared = torch.isin(rows.labels, torch.tensor([1, 3]))
    for labels, parity in (([4], 0), ([1, 3], 1), ([0, 1, 2, 3], 0)):
        # Classes 1 and 3 are in two parts, half of their rows in each.
        member = torch.isin(rows.labels, torch.tensor(labels))
        half = torch.arange(60) % 2 == parity
        index = member & (~shared | half)
        parts.append(
            method.statistics(
                dataclasses.replace(
                    rows,
                    features=rows.features[index],
                    labels=rows.labels[index],
                    samples=rows.samples[index],
                ),
                0,
            )
        )
    assert [part["moment"].shape[0] for part in parts] == [1, 2, 4]
    total = method.add(method.add(parts[0], parts[1]), parts[2])
    assert total["classes"].tolist() == CLASSES
    assert torch.equal(total["count"], whole["count"])
    for name in ("sum", "moment"):
        torch.testing.assert_close(total[name], whole[name], rtol=1e-12, atol=1e-12)
