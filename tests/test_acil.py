"""ACIL: the recursion of the paper as an oracle for the closed form."""

import dataclasses

import pytest
import torch

from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.representations import projection
from graftwork.methods.representations.acil import ACIL


def make_rows(number: int = 60, width: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(0)
    return Rows(
        features=torch.randn(number, width, generator=generator) + 1,
        labels=torch.arange(number) // (number // 5) % 5,
        samples=torch.arange(number),
        num_classes=5,
    )


def take(rows: Rows, index: torch.Tensor) -> Rows:
    return dataclasses.replace(
        rows,
        features=rows.features[index],
        labels=rows.labels[index],
        samples=rows.samples[index],
    )


def recursion(hidden: torch.Tensor, targets: torch.Tensor, gamma: float, batch: int):
    """Weights [M, C] by recursive least squares: the inverse is updated batch after batch."""
    inverse = torch.eye(hidden.shape[1], dtype=torch.float64) / gamma
    weights = torch.zeros(hidden.shape[1], targets.shape[1], dtype=torch.float64)
    for rows, right in zip(hidden.split(batch), targets.split(batch), strict=True):
        gain = torch.linalg.inv(torch.eye(len(rows)) + rows @ inverse @ rows.T)
        inverse = inverse - inverse @ rows.T @ gain @ rows @ inverse
        weights = weights + inverse @ rows.T @ (right - rows @ weights)
    return weights


@pytest.mark.parametrize("buffer", [0, 16, 100])
def test_equals_the_recursion_after_every_task(buffer: int):
    rows, method, total = make_rows(), ACIL(gamma=0.1, buffer=buffer), None
    hidden = rows.features.double()
    if buffer:
        hidden = projection.relu_layer(hidden, projection.uniform(0, 8, buffer))
    for seen in (2, 4, 5):
        task = (rows.labels >= seen - 2) & (rows.labels < seen)
        if seen == 5:
            task = rows.labels == 4
        part = method.statistics(take(rows, task.nonzero()[:, 0]), 0)
        total = part if total is None else method.add(total, part)
        targets = torch.nn.functional.one_hot(rows.labels, 5).double()
        known = rows.labels < seen
        expected = recursion(hidden[known], targets[known][:, :seen], 0.1, batch=7)
        weight = method.solve(total, part, [*range(seen)], 0)["weight"]
        torch.testing.assert_close(weight.T.double(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_exact_sums():
    rows, method = make_rows(), ACIL(buffer=16)
    whole = method.statistics(rows, 0)
    parts = [method.statistics(take(rows, index), 0) for index in torch.arange(60).split(13)]
    total = parts[0]
    for part in parts[1:]:
        total = method.add(part, total)
    for name in ("gram", "cross"):
        torch.testing.assert_close(total[name], whole[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(total["count"], whole["count"])
    assert torch.equal(whole["gram"], whole["gram"].T)


def test_buffer_is_drawn_like_the_weights_of_a_linear_layer():
    weight = projection.uniform(0, 16, 4000)
    assert weight.abs().max() <= 1 / 4
    assert weight.mean().abs() < 2e-3
    torch.testing.assert_close(weight.std().item(), (1 / 4) / 3**0.5, rtol=1e-2, atol=0.0)
    assert torch.equal(weight, projection.uniform(0, 16, 4000))


def test_seeds_do_not_mix():
    rows, method = make_rows(), ACIL(buffer=16)
    first, second = method.statistics(rows, 0), method.statistics(rows, 1)
    with pytest.raises(ValueError, match=r"seed and feature width: must be \[0, 8\], got \[1, 8\]"):
        method.add(first, second)
    state = method.solve(first, first, [*range(5)], 0)
    with pytest.raises(ValueError, match="random projection: must be the one of the fit"):
        method.logits(state, rows.features, 1)


def test_report_says_the_strength_and_the_buffer():
    rows, method = make_rows(), ACIL(buffer=16, gamma=0.5)
    total = method.statistics(rows, 0)
    report = method.report(method.solve(total, total, [*range(5)], 0))
    assert report["ridge_used"] == 0.5
    assert len(report["projection_sha256"]) == 64
