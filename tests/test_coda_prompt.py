"""CODA-Prompt: weights without a softmax, orthogonal new components, old ones frozen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.stream import StreamNeeds, stream_needs
from graftwork.methods.contracts.trained import Task
from graftwork.methods.prompts.coda_prompt import (
    CodaPrompt,
    CodaPromptLearner,
    attention_weights,
    orthogonal_rows,
    overlap,
)
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Settings
from tests import tiny

METHOD = CodaPrompt(epochs=2, batch_size=6, lr=0.01, pool_size=6, prompt_length=4)
NAMES = ("components", "keys", "masks")


def _learner(index: int, state: Mapping[str, Tensor] | None, **changes: Any) -> CodaPromptLearner:
    method = CodaPrompt(**{"pool_size": 6, "prompt_length": 4, **changes})
    learner = tiny.opened(method, tiny.task(index), dict(state) if state else None)
    assert isinstance(learner, CodaPromptLearner)
    return learner


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    return tiny.train(METHOD)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    data = tiny.images(tiny.task(1))
    return data.pixels, data.targets, forward.frozen_features(tiny.vit(), data.pixels)


def test_c1_old_components_get_no_gradient_and_keep_their_bits(states, batch):
    learner = _learner(1, states[0])
    learner.begin()
    images, targets, query = batch
    learner(images, targets, query)["loss"].backward()
    for name in NAMES:
        gradient = getattr(learner, name).grad
        assert torch.equal(gradient[:3], torch.zeros_like(gradient[:3])), name
        assert (gradient[3:].flatten(2).abs().amax(dim=2) > 0).all(), name
        assert torch.equal(states[1][name][:3], states[0][name]), name
        assert (states[1][name][3:] != 0).all(), name
    assert all(p.grad is None for p in learner.network.parameters())


@pytest.mark.parametrize("gs", ["least_squares", "sequential"])
def test_c2_new_rows_have_length_1_and_are_orthogonal_to_all_others(states, gs):
    learner = _learner(1, states[0], gs=gs)
    learner.begin()
    worst = 0.0
    for name in NAMES:
        for layer in range(5):
            rows = getattr(learner, name).detach()[:, layer].flatten(1).double()
            torch.testing.assert_close(rows[3:].norm(dim=1), torch.ones(3).double())
            cosines = (F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T - torch.eye(6)).abs()
            worst = max(worst, float(cosines[3:].max()))
    # Trained rows are not orthogonal to each other, which only least squares takes care of.
    assert worst < 1e-6 if gs == "least_squares" else 1e-4 < worst < 0.2


def test_c2_more_rows_than_the_width_stay_random_directions():
    draws = torch.randn(7, 4)
    rows = orthogonal_rows(torch.randn(2, 4), draws, "least_squares")
    torch.testing.assert_close(rows[2:], F.normalize(draws[2:], dim=1))


def test_c2_rows_that_are_orthogonal_already_make_both_ways_equal():
    old = torch.linalg.qr(torch.randn(8, 3).double()).Q.T * torch.tensor([[0.5], [2.0], [3.0]])
    draws = torch.randn(4, 8).double()
    a, b = (orthogonal_rows(old, draws, gs) for gs in ("least_squares", "sequential"))
    torch.testing.assert_close(a, b)


def test_c3_weights_equal_the_explicit_cosine_and_ignore_the_query_s_length(states, batch):
    learner = _learner(1, states[1])
    images, _, query = batch
    keys, masks = learner.keys[:, 2], learner.masks[:, 2]
    weights = attention_weights(query, keys, masks)
    masked = query[:, None] * masks
    torch.testing.assert_close(
        weights, F.cosine_similarity(masked, keys[None], dim=2), atol=1e-6, rtol=0
    )
    assert weights.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(
        learner.logits(images, 3 * query), learner.logits(images, query), atol=1e-5, rtol=0
    )


def test_c4_rows_that_were_not_drawn_yet_change_nothing(states, batch):
    images, _, query = batch
    now, later = _learner(0, states[0]), _learner(1, states[0])
    assert torch.equal(later.keys[3:], torch.zeros(3, 5, tiny.WIDTH))
    torch.testing.assert_close(
        later.logits(images, query)[:, :3], now.logits(images, query), atol=1e-6, rtol=0
    )


def test_c5_head_rows_of_old_tasks_keep_their_bits(states):
    for name in ("head.weight", "head.bias"):
        assert torch.equal(states[1][name][:3], states[0][name])


def test_c6_a_vanishing_penalty_gives_the_same_step(states, batch):
    images, targets, query = batch
    gradients = []
    for mu in (0.0, 1e-12, 0.1):
        learner = _learner(1, states[1], mu=mu)
        learner(images, targets, query)["loss"].backward()
        assert learner.components.grad is not None
        gradients.append(learner.components.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=0)
    assert not torch.allclose(gradients[0], gradients[2], atol=1e-6)
    # Rows of earlier tasks are constants in the penalty.
    assert torch.equal(gradients[2][:3], torch.zeros_like(gradients[2][:3]))


def test_the_penalty_is_the_sum_over_blocks_of_three_means(states, batch):
    images, targets, query = batch
    learner = _learner(1, states[1], mu=0.5)
    terms = learner(images, targets, query)
    by_hand = sum(
        ((r @ r.T - torch.eye(6)) ** 2).mean()
        for name in NAMES
        for r in getattr(learner, name).flatten(2).unbind(1)
    )
    torch.testing.assert_close(terms["penalty"], by_hand)
    torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + 0.5 * terms["penalty"])
    assert overlap(torch.eye(6)) == 0
    assert float(overlap(2 * torch.eye(4))) == 9 / 4


def test_sizes_are_those_of_the_paper():
    learner = tiny.opened(CodaPrompt(), tiny.task(9, 10, 10), None)
    numbers = {name: getattr(learner, name).numel() for name in NAMES}
    # 3,840,000 + 2 * 384,000 at a width of 768.
    assert numbers == {"components": 5 * 100 * 8 * 48, "keys": 5 * 100 * 48, "masks": 5 * 100 * 48}


def test_components_beyond_an_equal_share_are_not_made():
    assert _learner(1, None, pool_size=7).keys.shape[0] == 6


def test_fewer_components_than_tasks_are_refused():
    with pytest.raises(ValueError, match="pool_size: must be at least the number of tasks, 12"):
        tiny.opened(CodaPrompt(pool_size=10), tiny.task(0, 1, 12), None)
    with pytest.raises(ValueError, match="layers: must be at most the ViT's 6 blocks, got 7"):
        _learner(0, None, layers=7)
    with pytest.raises(HyperparameterError, match="prompt_length: must be even"):
        CodaPrompt(prompt_length=5)


def test_domain_incremental_tasks_add_components_and_keep_the_classes():
    task = Task(index=1, count=2, current=(0, 1, 2), before=3, seen=3)
    learner = tiny.opened(METHOD, task, None)
    assert isinstance(learner, CodaPromptLearner)
    learner.begin()
    data = tiny.images(task)
    query = forward.frozen_features(learner.network, data.pixels)
    scores = learner.logits(data.pixels, query)
    assert scores.shape == (12, 3)
    torch.testing.assert_close(
        learner(data.pixels, data.targets, query)["loss"], F.cross_entropy(scores, data.targets)
    )


GROWING = dataclasses.replace(METHOD, pool_size=1, components_per_task=3)
"""As `METHOD` on two tasks; a pool of one component would be refused if it were read."""
UNKNOWN = [dataclasses.replace(tiny.task(index), count=None) for index in range(4)]
"""Tasks of a stream that may grow."""


def grown(tasks: list[Task], seed: int = 0) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for task in tasks:
        before = found[-1] if found else None
        settings = Settings(seed=seed)
        state, _ = loop.train_task(GROWING, tiny.vit(), task, tiny.images(task), before, settings)
        found.append(state)
    return found


@pytest.fixture(scope="module")
def growing() -> list[dict[str, Tensor]]:
    return grown(UNKNOWN[:3])


def test_a_pool_that_grows_equals_an_equal_share_of_a_fixed_one_bit_for_bit(states, growing):
    # Both take random numbers from (seed, task) and orthogonalise against the same earlier rows.
    for fixed, own in zip(states, growing, strict=False):
        assert fixed.keys() == own.keys()
        assert all(torch.equal(fixed[name], own[name]) for name in fixed)


def test_a_third_task_adds_components_orthogonal_to_all_and_leaves_the_others(states, growing):
    for name in NAMES:
        assert growing[2][name].shape == (9, *states[1][name].shape[1:])
        assert torch.equal(growing[2][name][:6], growing[1][name])
    learner = tiny.opened(GROWING, UNKNOWN[2], growing[1])
    assert isinstance(learner, CodaPromptLearner)
    assert not learner.keys[6:].any()
    learner.begin()
    for name in NAMES:
        for layer in range(5):
            rows = F.normalize(getattr(learner, name).detach()[:, layer].flatten(1).double(), dim=1)
            assert (rows[6:] @ rows.T - torch.eye(9)[6:]).abs().max() < 1e-6


def test_the_start_of_new_components_depends_on_seed_and_task_alone(growing):
    def start(index: int, state: dict[str, Tensor] | None, seed: int = 0) -> Tensor:
        learner = tiny.opened(GROWING, UNKNOWN[index], state, seed=seed)
        learner.begin()
        assert isinstance(learner, CodaPromptLearner)
        return learner.keys.detach()[-3:]

    assert torch.equal(start(0, None), start(0, None))
    assert not torch.equal(start(0, None), start(0, None, seed=1))
    again, other = start(1, growing[0]), start(2, growing[1])
    assert torch.equal(again, start(1, growing[0]))
    # Nearly orthogonal, since different draws lost different spans: not the same again.
    assert not torch.allclose(again, other, atol=0.1)


def test_a_pool_that_grows_has_any_number_of_tasks_and_stores_what_it_has():
    assert stream_needs(GROWING) == StreamNeeds()
    for index, task in enumerate(UNKNOWN):
        learner = tiny.opened(GROWING, task, None)
        assert isinstance(learner, CodaPromptLearner)
        assert learner.components.shape == (3 * (index + 1), 5, 4, tiny.WIDTH)
    with pytest.raises(ValueError, match="count: must be the number of tasks of the stream"):
        tiny.opened(METHOD, UNKNOWN[0], None)
    with pytest.raises(HyperparameterError, match="components_per_task: must be at least 1, got 0"):
        CodaPrompt(components_per_task=0)
