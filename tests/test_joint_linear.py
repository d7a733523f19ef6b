"""The joint linear probe: ridge against RanPAC without projection, logistic against its optimum."""

import dataclasses

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.representations import joint_linear
from graftwork.methods.representations.joint_linear import JointLinear
from graftwork.methods.representations.ranpac import RanPAC

CLASSES = [0, 1, 2, 3, 4]


def make_rows(number: int = 100, width: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 5
    means = torch.randn(5, width, generator=generator)
    features = means[labels] + torch.randn(number, width, generator=generator)
    return Rows(
        features=features * torch.arange(1, width + 1) + 3,
        labels=labels,
        samples=torch.randint(-(2**62), 2**62, (number,), generator=generator),
        num_classes=5,
    )


def fit(method: JointLinear, parts: list[Rows]) -> State:
    total = method.statistics(parts[0], 0)
    for part in parts[1:]:
        total = method.add(total, method.statistics(part, 0))
    return method.solve(total, method.statistics(parts[-1], 0), CLASSES, 0)


def test_ridge_equals_ranpac_without_projection():
    rows = make_rows()
    reference = RanPAC(projection_dim=0, lambda_mode="cumulative")
    total = reference.statistics(rows, 0)
    expected = reference.solve(total, total, CLASSES, 0)
    state = fit(JointLinear(), [rows])
    assert state["penalty"] == expected["ridge_used"]
    torch.testing.assert_close(state["weight"], expected["weight"], rtol=1e-5, atol=1e-7)
    assert not state["bias"].any()


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_order_of_the_rows_changes_no_bit(solver: str):
    rows, method = make_rows(), JointLinear(solver=solver)  # pyright: ignore[reportArgumentType]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    parts = [
        dataclasses.replace(
            rows,
            features=rows.features[index],
            labels=rows.labels[index],
            samples=rows.samples[index],
        )
        for index in order.split(30)
    ]
    whole, split = fit(method, [rows]), fit(method, parts)
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_logistic_regression_reaches_the_optimum():
    rows = make_rows()
    features = rows.features.double()
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    targets = torch.nn.functional.one_hot(rows.labels, 5).double()
    penalty = 1e-2
    ours = joint_linear._descend(standard, targets, torch.zeros(9, 5).double(), penalty, 200)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        outputs = standard @ parameters[1:] + parameters[0]
        cross_entropy = torch.nn.functional.cross_entropy(outputs, targets)
        return cross_entropy + penalty / 2 * parameters[1:].square().sum()

    ours.requires_grad_()
    loss(ours).backward()
    assert ours.grad is not None
    assert ours.grad.abs().max() <= 1e-5
    reference = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-8, max_iter=1000)
    reference.fit(standard.numpy(), rows.labels.numpy())
    theirs = torch.cat([torch.tensor(reference.intercept_)[None], torch.tensor(reference.coef_).T])
    assert loss(ours).item() <= loss(theirs).item() + 1e-8


def test_logistic_weights_apply_to_features_as_they_are():
    rows, method = make_rows(), JointLinear(solver="logistic")
    scaled = dataclasses.replace(rows, features=rows.features * 50 - 7)
    first, second = (
        method.logits(fit(method, [r]), r.features, 0).log_softmax(1) for r in (rows, scaled)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_constant_feature_is_harmless():
    rows, method = make_rows(), JointLinear(solver="logistic")
    features = rows.features.clone()
    features[:, 2] = 0.1
    state = fit(method, [dataclasses.replace(rows, features=features)])
    assert method.logits(state, features, 0).isfinite().all()
    assert state["weight"][:, 2].abs().max() < 1e-6


def test_it_is_marked_as_an_upper_bound():
    assert JointLinear.card.upper_bound
