"""RanPAC with its first session, and the ridge regression, moments and projection inside it."""

import dataclasses
import json
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork import methods
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.parts.first_session import FirstSession, Peft
from graftwork.methods.representations import moments, projection, ridge
from graftwork.methods.representations.ranpac import RanPAC
from graftwork.operators import catalogue
from tests import tiny

CLASSES = [0, 1, 2, 3, 4]


def make_rows(number: int = 60, width: int = 8, shared: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 5
    means = 2 * torch.randn(5, width, generator=generator)
    return Rows(
        features=means[labels] + torch.randn(number, width, generator=generator) + shared,
        labels=labels,
        samples=torch.randint(-(2**62), 2**62, (number,), generator=generator),
        num_classes=5,
    )


def take(rows: Rows, index: torch.Tensor) -> Rows:
    return dataclasses.replace(
        rows,
        features=rows.features[index],
        labels=rows.labels[index],
        samples=rows.samples[index],
    )


def hidden(rows: Rows, dim: int) -> torch.Tensor:
    return projection.relu_layer(rows.features.double(), projection.gaussian(0, 8, dim))


def sums(method: RanPAC, rows: Rows, shards: list[torch.Tensor]) -> State:
    total = method.statistics(take(rows, shards[0]), 0)
    for shard in shards[1:]:
        total = method.add(total, method.statistics(take(rows, shard), 0))
    return total


@pytest.mark.parametrize("dim", [16, 100])
def test_fixed_strength_equals_one_shot_ridge_on_all_rows(dim: int):
    rows, method = make_rows(), RanPAC(projection_dim=dim, lambda_mode="fixed", ridge=0.5)
    total = sums(method, rows, [*torch.arange(60).split(20)])
    h, y = hidden(rows, dim), torch.nn.functional.one_hot(rows.labels, 5).double()
    expected = torch.linalg.solve(h.T @ h + 0.5 * torch.eye(dim), h.T @ y)
    weights, used = moments.solve(
        total, lambda f: hidden(dataclasses.replace(rows, features=f), dim), torch.arange(5), 0.5
    )
    assert used == 0.5
    assert ((weights - expected).norm() / expected.norm()).item() < 1e-8
    weight = method.solve(total, total, CLASSES, 0)["weight"]
    torch.testing.assert_close(weight.T.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [16, 100])
def test_class_order_permutes_the_columns(dim: int):
    rows, method = make_rows(), RanPAC(projection_dim=dim)
    total = sums(method, rows, [*torch.arange(60).split(30)])
    weight = method.solve(total, total, CLASSES, 0)["weight"]
    other = method.solve(total, total, [2, 4, 0], 0)["weight"]
    torch.testing.assert_close(other, weight[[2, 4, 0]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["last_task", "cumulative", "fixed"])
@pytest.mark.parametrize("dim", [16, 40, 200])
def test_split_does_not_matter_across_the_collapse(mode: str, dim: int):
    # 60 rows: 16 collapses in the shards, 40 in a sum of shards, 200 never.
    rows, method = make_rows(), RanPAC(projection_dim=dim, lambda_mode=mode)  # pyright: ignore
    whole = method.statistics(rows, 0)
    assert ("gram" in whole) == (dim < 60)

    @settings(max_examples=10, deadline=None, database=None)
    @given(order=st.permutations(range(60)), size=st.integers(1, 60))
    def check(order: list[int], size: int):
        total = sums(method, rows, [*torch.tensor(order).split(size)])
        assert total.keys() == whole.keys()
        if "gram" in total:
            for name in total:
                torch.testing.assert_close(total[name], whole[name], rtol=1e-12, atol=1e-11)
        else:
            # The same set of rows, in another order.
            assert sorted(total["samples"].tolist()) == sorted(rows.samples.tolist())

    check()


def test_primal_equals_dual():
    rows = make_rows(30)
    h, y = hidden(rows, 64), ridge.targets(rows.labels, torch.arange(5))
    for strength in (1e-3, 1.0, 1e3):
        dual, _ = ridge.solve_rows(h, y, strength)
        primal, _ = ridge.solve(h.T @ h, h.T @ y, strength)
        assert ((dual - primal).norm() / primal.norm()).item() < 1e-8


@pytest.mark.parametrize(("number", "dim"), [(30, 64), (200, 16)])
def test_strength_from_sums_equals_strength_from_rows(number: int, dim: int):
    rows = make_rows(number)
    h, y = hidden(rows, dim), ridge.targets(rows.labels, torch.arange(5))
    held = ridge.held_out(rows.samples, 0)
    a, b, v, w = h[~held], y[~held], h[held], y[held]
    assert ridge.choose(a.T @ a, a.T @ b, v.T @ v, v.T @ w, len(v)) == ridge.choose_rows(a, b, v, w)


def test_validation_error_from_sums_equals_that_from_rows():
    rows, generator = make_rows(), torch.Generator().manual_seed(1)
    h, y = hidden(rows, 16), ridge.targets(rows.labels, torch.arange(5))
    weights = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    expected = (h @ weights - y).square().sum().item()
    assert ridge.squared_error(weights, h.T @ h, h.T @ y, 60) == pytest.approx(expected, rel=1e-12)


def test_chosen_strength_has_the_smallest_error_of_the_newest_task():
    rows, method = make_rows(120), RanPAC(projection_dim=16)
    old, new = (method.statistics(take(rows, i), 0) for i in torch.arange(120).split(60))
    newest = take(rows, torch.arange(60, 120))
    held = ridge.held_out(newest.samples, 0)
    h, y = hidden(newest, 16), torch.nn.functional.one_hot(newest.labels, 5).double()
    errors = []
    for strength in ridge.GRID:
        gram = h[~held].T @ h[~held] + strength * torch.eye(16)
        weights = torch.linalg.solve(gram, h[~held].T @ y[~held])
        errors.append((h[held] @ weights - y[held]).square().mean().item())
    state = method.solve(method.add(old, new), new, CLASSES, 0)
    assert method.report(state)["ridge"] == ridge.GRID[errors.index(min(errors))]


def test_cumulative_strength_does_not_depend_on_the_newest_task():
    rows, method = make_rows(120), RanPAC(projection_dim=16, lambda_mode="cumulative")
    total = method.statistics(rows, 0)
    states = [
        method.solve(total, method.statistics(take(rows, index), 0), CLASSES, 0)
        for index in torch.arange(120).split(40)
    ]
    assert all(torch.equal(state["weight"], states[0]["weight"]) for state in states)


def test_task_without_held_out_rows_uses_the_given_strength():
    method = RanPAC(projection_dim=16, ridge=3.0)
    rows = make_rows(100)
    fitted = (~ridge.held_out(rows.samples, 0)).nonzero()[:20, 0]
    total = method.statistics(take(rows, fitted), 0)
    assert method.report(method.solve(total, total, CLASSES, 0))["ridge"] == 3.0


def test_jitter_raises_the_strength_until_the_factorisation_succeeds():
    h = torch.full((20, 16), 1e4, dtype=torch.float64)
    weights, used = ridge.solve(h.T @ h, h.T @ torch.ones(20, 1, dtype=torch.float64), 1e-8)
    assert weights.isfinite().all()
    floor = 1e-14 * (h * h).sum().item()
    assert used == pytest.approx(floor * 10 ** round(torch.tensor(used / floor).log10().item()))
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert ridge.solve(zero, zero, 1e-8)[1] == 1e-8
    with pytest.raises(ValueError, match="features: must be finite"):
        ridge.solve(zero / 0, zero, 1.0)


def test_gram_in_tiles_equals_the_plain_product():
    rows = torch.randn(40, 1300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = ridge.gram(rows)
    torch.testing.assert_close(product, rows.T @ rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(product, product.T)


def test_same_seed_draws_the_same_projection():
    digest = projection.text(projection.digest(projection.gaussian(7, 8, 16)))
    projection.gaussian.cache_clear()
    torch.manual_seed(123)
    assert projection.text(projection.digest(projection.gaussian(7, 8, 16))) == digest
    assert projection.text(projection.digest(projection.gaussian(8, 8, 16))) != digest
    # Known numbers: a change of the generator would change every result of this method.
    assert digest == "c0af1d7cd0c80910f0564ee7752976db0be6d543ace36772ab1a8478a675ca33"


def test_projection_is_standard_normal():
    weight = projection.gaussian(0, 64, 4000)
    assert weight.dtype == torch.float32
    assert weight.mean().abs() < 0.01
    assert (weight.std() - 1).abs() < 0.01


def test_fit_and_prediction_use_the_same_projection():
    rows, method = make_rows(), RanPAC(projection_dim=16)
    total = method.statistics(rows, 0)
    state = method.solve(total, total, CLASSES, 0)
    expected = hidden(rows, 16) @ state["weight"].double().T
    scores = method.logits(state, rows.features, 0)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="random projection: must be the one of the fit"):
        method.logits(state, rows.features, 1)
    with pytest.raises(ValueError, match=r"must be \[0, 8\], got \[1, 8\]"):
        method.add(total, method.statistics(rows, 1))


def test_cosine_score_normalises_rows_and_weights():
    rows = make_rows()
    linear, cosine = RanPAC(projection_dim=16), RanPAC(projection_dim=16, score="cosine")
    total = linear.statistics(rows, 0)
    state = linear.solve(total, total, CLASSES, 0)
    expected = linear.logits(state, rows.features, 0)
    expected = expected / hidden(rows, 16).norm(dim=1, keepdim=True) / state["weight"].norm(dim=1)
    torch.testing.assert_close(
        cosine.logits(state, rows.features, 0).double(), expected, rtol=1e-4, atol=1e-6
    )


@given(seed=st.integers(0, 2**31), start=st.integers(-(2**60), 2**60))
@settings(max_examples=20, deadline=None, database=None)
def test_hash_split_holds_out_a_fifth_and_knows_no_order(seed: int, start: int):
    samples = torch.arange(start, start + 5000)
    held = ridge.held_out(samples, seed)
    assert 0.16 < held.double().mean() < 0.24
    assert torch.equal(ridge.held_out(samples.flip(0), seed), held.flip(0))
    assert not torch.equal(ridge.held_out(samples, seed + 1), held)


def test_hash_is_that_of_splitmix64():
    def mix(number: int) -> int:
        mask = 2**64 - 1
        number = (number + 0x9E3779B97F4A7C15) & mask
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
        return number ^ (number >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF
    numbers = [0, 1, -1, 2**62, -(2**63), 123456789]
    expected = [(mix(mix(n % 2**64)) >> 11) < int(0.2 * 2**53) for n in numbers]
    assert ridge.held_out(torch.tensor(numbers), 0).tolist() == expected


def test_few_rows_need_no_square_matrix_of_the_projection():
    method, rows = RanPAC(), make_rows(50)
    assert method.projection_dim == 10_000
    total = method.statistics(rows, 0)
    assert sum(tensor.nbytes for tensor in total.values()) < 10_000


def test_without_a_first_session_nothing_is_adapted():
    parts = RanPAC().parts()
    assert (parts.first_session, parts.classifier, parts.keeps_frozen) == (None, None, False)
    facts, _ = catalogue.method("ranpac", {})
    assert facts["parts"]["first_session"] is None
    assert facts["parts"]["classifier"]["hyperparameters"] == facts["hyperparameters"]


@pytest.mark.parametrize("kind", get_args(Peft))
def test_first_session_has_the_defaults_of_the_paper(kind: Peft):
    parts = RanPAC(first_session=kind).parts()
    assert parts.first_session == FirstSession(peft=kind)
    assert (parts.classifier, parts.keeps_frozen) == (None, False)
    session = dataclasses.asdict(FirstSession(peft=kind))
    names = ("epochs", "lr", "batch_size", "weight_decay", "prompt_length", "bottleneck")
    assert [session[name] for name in names] == [20, 0.01, 48, 5e-4, 5, 64]
    assert (session["optimizer"], session["schedule"]) == ("sgd", "cosine")


def test_first_session_of_aper_is_that_of_ranpac():
    ours = RanPAC(first_session="adapter").parts().first_session
    assert ours == methods.build("aper_adapter", {}).parts().first_session


def test_planning_sees_the_session_and_the_method_itself():
    given = {
        "first_session": "vpt_deep",
        "vpt_init": "zeros",
        "prompt_length": 30,
        "score": "cosine",
    }
    facts, problems = catalogue.method("ranpac", given)
    assert problems == []
    assert json.loads(json.dumps(facts)) == facts
    parts = facts["parts"]
    session = methods.build("first_session", parts["first_session"]["hyperparameters"])
    assert session == FirstSession(peft="vpt_deep", prompt_length=30, vpt_init="zeros")
    assert parts["keeps_frozen"] is False
    classifier = parts["classifier"]
    assert (classifier["name"], classifier["separable"], classifier["uses_seed"]) == (
        "ranpac",
        False,
        True,
    )
    again = methods.build(classifier["name"], classifier["hyperparameters"])
    assert again == RanPAC(
        first_session="vpt_deep", vpt_init="zeros", prompt_length=30, score="cosine"
    )


def test_problems_of_both_parts_are_told_together():
    facts, problems = catalogue.method("ranpac", {"lr": 0, "bottleneck": 0, "ridge": 0})
    assert facts == {}
    assert {path for path, _ in problems} == {".ranpac.lr", ".ranpac.bottleneck", ".ranpac.ridge"}


def test_the_classifier_knows_no_session_but_its_features():
    plain = RanPAC(projection_dim=64)
    with_session = RanPAC(projection_dim=64, first_session="adapter", epochs=3)
    rows = make_rows()
    a, b = (m.solve(s := m.statistics(rows, 0), s, CLASSES, 0) for m in (plain, with_session))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ridge_on_adapted_features_alone():
    task = tiny.task(0)
    session = FirstSession(peft="adapter", epochs=3, batch_size=6, lr=0.1, bottleneck=8)
    images = tiny.images(task)
    learner = tiny.opened(session, task, tiny.train(session, 1)[0])
    with torch.no_grad():
        features = learner.features(images.pixels)
    rows = Rows(features=features, labels=images.targets, samples=torch.arange(12), num_classes=3)
    method = RanPAC(projection_dim=32, first_session="adapter", lambda_mode="fixed", ridge=1e-3)
    total = method.statistics(rows, 0)
    scores = method.logits(method.solve(total, total, [0, 1, 2], 0), features, 0)
    h = projection.relu_layer(features.double(), projection.gaussian(0, tiny.WIDTH, 32))
    y = torch.nn.functional.one_hot(images.targets, 3).double()
    expected = h @ torch.linalg.solve(h.T @ h + 1e-3 * torch.eye(32), h.T @ y)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(scores.argmax(1), images.targets)
