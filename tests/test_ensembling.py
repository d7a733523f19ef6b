"""Rules of ensembles: closed forms and laws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.operators import ensembling
from graftwork.operators.ensembling import RULES, scores
from graftwork.operators.ensembling.scores import NEVER, align, scaled, wrong


def stack(models: int = 3, rows: int = 20, classes: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(models, rows, classes, generator=generator, dtype=torch.float64)


def combined(name: str, given: Tensor, **values: Any) -> Tensor:
    return ensembling.build(name, values).combine(given)


# --- laws of all rules ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "standardise", "l2"])
@pytest.mark.parametrize("name", RULES)
def test_one_model_and_its_copies_decide_as_it_does(name: str, scale: str) -> None:
    one = stack(1)
    for copies in (1, 2, 3):
        found = combined(name, one.expand(copies, -1, -1), scale=scale)
        assert found.shape == (20, 5)
        assert torch.equal(found.argmax(1), one[0].argmax(1))


@pytest.mark.parametrize("name", RULES)
def test_each_row_is_decided_by_itself(name: str) -> None:
    given = stack()
    whole = combined(name, given, scale="standardise")
    for row in range(3):
        alone = combined(name, given[:, row : row + 1], scale="standardise")
        assert torch.equal(alone[0], whole[row])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(combined(name, given[:, order], scale="standardise"), whole[order])


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    given = stack()
    torch.testing.assert_close(combined(name, given), combined(name, given[[2, 0, 1]]))


@pytest.mark.parametrize("name", RULES)
def test_a_class_that_a_model_lacks_never_wins_by_it(name: str) -> None:
    """Not even where all its scores are far below zero."""
    given, known = align(
        [stack(1)[0] - 100, stack(1, seed=1)[0, :, :3] - 100], [range(5), [1, 3, 7]]
    )
    assert known == [0, 1, 2, 3, 4, 7] and given.shape == (2, 20, 6)
    found = combined(name, given)
    assert found.shape == (20, 6) and not bool(found.isnan().any())
    nobody = torch.cat([given, torch.full((2, 20, 1), NEVER, dtype=torch.float64)], dim=2)
    again = combined(name, nobody)
    assert torch.equal(again[:, 6], torch.full((20,), NEVER, dtype=torch.float64))
    assert torch.equal(again.argmax(1), found.argmax(1))


# --- rules ------------------------------------------------------------------------------------


def test_means_of_logits_are_geometric_means_of_probabilities() -> None:
    given = stack()
    geometric = given.softmax(2).log().mean(0).exp()
    torch.testing.assert_close(
        scores.mean_logit(given).softmax(1), geometric / geometric.sum(1, keepdim=True)
    )
    torch.testing.assert_close(scores.mean_prob(given), given.softmax(2).mean(0))
    torch.testing.assert_close(scores.mean_prob(given).sum(1), torch.ones(20).double())


def test_a_mean_counts_the_models_that_have_the_class() -> None:
    given, _ = align([torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0]])], [[0, 1], [1]])
    assert scores.mean_logit(given).tolist() == [[1.0, 4.0]]
    share = 1 / (1 + math.exp(2))
    torch.testing.assert_close(
        scores.mean_prob(given), torch.tensor([[share, (1 - share + 1) / 2]]).double()
    )


def test_a_shift_of_one_model_moves_the_largest_logit_but_no_probability() -> None:
    given = stack()
    shifted = given.clone()
    shifted[1] += 50
    torch.testing.assert_close(scores.max_prob(shifted), scores.max_prob(given))
    torch.testing.assert_close(scores.mean_prob(shifted), scores.mean_prob(given))
    assert torch.equal(scores.max_logit(shifted).argmax(1), given[1].argmax(1))
    assert not torch.equal(scores.max_logit(given).argmax(1), given[1].argmax(1))
    assert torch.equal(scores.max_prob(given), given.softmax(2).amax(0))


def test_a_vote_is_the_mode_and_ties_go_to_the_larger_mean() -> None:
    given = torch.tensor([[[0.0, 5.0, 1.0]], [[0.0, 4.0, 2.0]], [[9.0, 0.0, 8.0]]]).double()
    assert int(scores.vote(given).argmax(1)) == 1  # two votes, though class 2 has the larger sum
    tied = torch.tensor([[[3.0, 0.0, 1.0]], [[0.0, 1.0, 9.0]]]).double()
    assert int(scores.vote(tied).argmax(1)) == 2
    assert (
        int(torch.mode(tied.argmax(2), dim=0).values) == 0
    )  # the smallest id, whatever the scores
    votes = scores.vote(given)
    assert votes.floor().tolist() == [[1.0, 2.0, 0.0]]


def test_energy_routes_to_one_model() -> None:
    given = stack()
    for temperature in (0.5, 1.0, 3.0):
        energy = temperature * np.log(np.exp(given.numpy() / temperature).sum(2))
        chosen = energy.argmax(0)
        expected = given.numpy()[chosen, np.arange(20)]
        found = combined("energy_route", given, temperature=temperature)
        np.testing.assert_array_equal(found.numpy(), expected)
    cold = combined("energy_route", given, temperature=1e-3)
    assert torch.equal(cold.amax(1), given.amax((0, 2)))
    hot = given[given.mean(2).argmax(0), torch.arange(20)]
    assert torch.equal(combined("energy_route", given, temperature=1e5), hot)


def test_energy_by_size_takes_the_advantage_of_many_classes() -> None:
    given, _ = align([torch.full((1, 2), 1.0), torch.full((1, 50), 0.5)], [range(2), range(2, 52)])
    many = combined("energy_route", given)
    few = combined("energy_route", given, by_size=True)
    assert int(many.argmax(1)) >= 2 and int(few.argmax(1)) < 2


# --- scales -----------------------------------------------------------------------------------


def test_scales_look_at_one_row_of_one_model() -> None:
    given, _ = align([stack(1)[0], stack(1, classes=3)[0]], [range(5), range(3)])
    standard, unit = scaled(given, "standardise"), scaled(given, "l2")
    own = given[1, :, :3].numpy()
    np.testing.assert_allclose(
        standard[1, :, :3], (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    )
    np.testing.assert_allclose(unit[1, :, :3], own / np.linalg.norm(own, axis=1, keepdims=True))
    assert bool((standard[1, :, 3:] == NEVER).all() and (unit[1, :, 3:] == NEVER).all())
    torch.testing.assert_close(scaled(given, "none", 4.0)[0], given[0] / 4)
    flat = torch.ones(1, 2, 3).double()
    assert scaled(flat, "standardise").abs().max() == 0
    assert scaled(flat * 0, "l2").abs().max() == 0


def test_standardised_models_weigh_the_same() -> None:
    given = stack(2)
    louder = torch.stack([given[0], 1000 * given[1] + 7])
    for name in RULES:
        torch.testing.assert_close(
            combined(name, louder, scale="standardise"), combined(name, given, scale="standardise")
        )


# --- alignment, names -------------------------------------------------------------------------


def test_columns_are_aligned_by_class() -> None:
    given, known = align([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])], [[9, 4], [4, 9]])
    assert known == [4, 9]
    assert given.tolist() == [[[2.0, 1.0]], [[3.0, 4.0]]]
    with pytest.raises(ValueError, match="differ in rows"):
        align([torch.zeros(2, 1), torch.zeros(3, 1)], [[0], [0]])
    with pytest.raises(ValueError, match="2 columns for classes"):
        align([torch.zeros(2, 2)], [[0]])
    with pytest.raises(ValueError, match="2 columns for classes"):
        align([torch.zeros(2, 2)], [[0, 0]])


@pytest.mark.parametrize("scale", ["none", "standardise", "l2"])
@pytest.mark.parametrize("what", ["one NaN", "all NaN", "infinity", "no class at all"])
@pytest.mark.parametrize("name", RULES)
def test_a_model_without_a_result_leaves_its_row_without_one(
    name: str, what: str, scale: str
) -> None:
    """Passing the model over would answer with another ensemble than the one asked for."""
    given = stack()
    given[:, :, 1] = given[:, :, 1].where(torch.arange(3)[:, None] != 0, NEVER)  # a class it lacks
    whole = combined(name, given, scale=scale)
    spoilt = given.clone()
    if what == "one NaN":
        spoilt[1, 4, 2] = torch.nan
    elif what == "infinity":
        spoilt[1, 4, 2] = torch.inf
    else:
        spoilt[1, 4] = torch.nan if what == "all NaN" else NEVER
    found = combined(name, spoilt, scale=scale)
    assert bool(found[4].isnan().all())
    rest = torch.arange(20) != 4
    assert torch.equal(found[rest], whole[rest]) and not bool(whole.isnan().any())
    assert wrong(spoilt).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_explains_itself(name: str) -> None:
    kind = ensembling.load(name)
    assert kind.card.summary.endswith(".") and kind.card.title
    assert all(field.doc and field.default is not None for field in ensembling.fields(name))
    with pytest.raises(HyperparameterError, match=r"temperature: must be above 0, got 0"):
        ensembling.build(name, {"temperature": 0})


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean mean_prob"):
        ensembling.build("mean_probs", {})
