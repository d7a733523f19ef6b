"""EASE: adapters, subspaces and prototypes."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.heads import cosine
from graftwork.methods.representations.ease import EASE, EASELearner, compose, weights
from graftwork.operators.training import forward, loop, settings
from tests import tiny

SMALL = EASE(epochs=2, batch_size=6, bottleneck=4, lr=0.2)
UNEQUAL = [
    Task(index=0, count=3, current=(0, 1, 2), before=0, seen=3),
    Task(index=1, count=3, current=(3, 4), before=3, seen=5),
    Task(index=2, count=3, current=(5,), before=5, seen=6),
]
"""The last task is shorter than the others."""


@torch.enable_grad()
def train(
    method: EASE, tasks: list[Task], seeds: tuple[int, ...] = (0, 0, 0)
) -> list[tuple[State, tiny.TensorImages]]:
    done: list[tuple[State, tiny.TensorImages]] = []
    for task, seed in zip(tasks, seeds, strict=False):
        images = tiny.images(task, seed=seed)
        state, _ = loop.train_task(
            method,
            tiny.vit(depth=2),
            task,
            images,
            done[-1][0] if done else None,
            settings.Settings(seed=0),
        )
        done.append((state, images))
    return done


def learner_of(method: EASE, task: Task, state: State | None) -> EASELearner:
    learner = tiny.opened(method, task, state, depth=2)
    assert isinstance(learner, EASELearner)
    return learner


def means(features: Tensor, targets: Tensor, columns: tuple[int, ...]) -> Tensor:
    return torch.stack([features[targets == c].double().mean(dim=0) for c in columns]).float()


@torch.no_grad()
def test_the_first_task_is_nearest_class_mean_with_the_adapter() -> None:
    ((state, images),) = train(SMALL, UNEQUAL[:1])
    learner = learner_of(SMALL, UNEQUAL[0], state)
    features = learner.subspaces(images.pixels)[:, 0]
    wanted = cosine(features, means(features, images.targets, (0, 1, 2)))
    assert torch.allclose(learner.logits(images.pixels, None), wanted, atol=1e-6)


def test_similarities_are_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    own, similar = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    assert torch.allclose(compose(own, similar, torch.ones(5, 2)), torch.ones(3, 2))
    share = torch.tensor([[1.0, -1.0]]).softmax(dim=1)
    found = compose(torch.tensor([[2.0, 0]]), torch.tensor([[3.0, 0], [-1, 0]]), torch.eye(2))
    assert torch.allclose(found, share)


def test_a_single_candidate_is_copied() -> None:
    generator = torch.Generator().manual_seed(0)
    own, one = torch.randn(3, 8, generator=generator), torch.randn(1, 8, generator=generator)
    there = torch.randn(1, 8, generator=generator)
    assert torch.equal(compose(own, one, there), there.expand(3, 8))


@torch.no_grad()
def test_with_alpha_0_only_the_own_subspace_counts() -> None:
    method = dataclasses.replace(SMALL, alpha=0.0)
    state, images = train(method, UNEQUAL)[-1]
    learner = learner_of(method, UNEQUAL[-1], state)
    features = learner.subspaces(images.pixels)
    own = torch.cat(
        [
            cosine(features[:, i], state[f"spaces.{i}.prototypes"][list(task.current)])
            for i, task in enumerate(UNEQUAL)
        ],
        dim=1,
    )
    assert torch.allclose(learner.logits(images.pixels, None), own, atol=1e-6)


def test_weights_by_task() -> None:
    # Classes of tasks 0, 0, 1 and 2.
    counts = torch.tensor([[4, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4]])
    wanted = torch.tensor(
        [[1.0, 1.0, 0.05, 0.05], [0.05, 0.05, 1.0, 0.05], [0.05, 0.05, 0.05, 1.0]]
    )
    assert torch.allclose(weights(counts, 0.1), wanted)
    assert weights(counts[:1, :2], 0.1).tolist() == [[1.0, 1.0]]


def test_weights_of_a_class_that_occurs_in_every_task() -> None:
    counts = torch.tensor([[12], [8], [4]])
    assert torch.allclose(weights(counts, 0.1), torch.full((3, 1), 1 / 3))


@torch.no_grad()
def test_prototypes_are_measured_where_there_are_images_and_composed_elsewhere() -> None:
    trained = train(SMALL, UNEQUAL)
    state = trained[-1][0]
    learner = learner_of(SMALL, UNEQUAL[-1], state)
    places = [state[f"spaces.{d}.prototypes"] for d in range(3)]
    for number, (task, (_, images)) in enumerate(zip(UNEQUAL, trained, strict=True)):
        features = learner.subspaces(images.pixels)
        for d in range(number + 1):
            own = means(features[:, d], images.targets, task.current)
            assert torch.allclose(places[d][list(task.current)], own, atol=1e-6)
    for number, later in ((0, 1), (0, 2), (1, 2)):
        own = list(UNEQUAL[number].current)
        candidates = [c for task in UNEQUAL[later:] for c in task.current]
        similar = F.cosine_similarity(
            places[number][own][:, None], places[number][candidates][None], dim=2
        )
        wanted = similar.softmax(dim=1) @ places[later][candidates]
        assert torch.allclose(places[later][own], wanted, atol=1e-6)
    counts = [state[f"spaces.{d}.count"].tolist() for d in range(3)]
    assert counts == [[4] * 6, [0, 0, 0, 4, 4, 4], [0, 0, 0, 0, 0, 4]]


def test_earlier_adapters_and_measured_prototypes_never_change() -> None:
    (first, _), (second, _), (third, _) = train(SMALL, UNEQUAL)
    for before, after in ((first, second), (second, third)):
        assert before.keys() < after.keys()
        for name, tensor in before.items():
            known = after[name][: len(tensor)]
            if name.endswith("prototypes"):
                measured = before[name.replace("prototypes", "count")] > 0
                tensor, known = tensor[measured], known[measured]
            assert torch.equal(tensor, known)


def test_the_classifier_of_the_training_is_not_stored() -> None:
    ((state, _),) = train(SMALL, UNEQUAL[:1])
    assert {name.split(".")[0] for name in state} == {"spaces"}


def test_a_fresh_adapter_is_the_untouched_backbone() -> None:
    learner = learner_of(SMALL, UNEQUAL[0], None)
    pixels = tiny.images(UNEQUAL[0]).pixels
    with torch.no_grad():
        found = learner.subspaces(pixels)[:, 0]
    assert torch.equal(found, forward.frozen_features(tiny.vit(depth=2), pixels))


@torch.no_grad()
def test_beta_adds_the_untouched_backbone() -> None:
    method = dataclasses.replace(SMALL, beta=0.5)
    trained = train(method, UNEQUAL[:2])
    (state, images), task = trained[-1], UNEQUAL[1]
    without = {name: tensor for name, tensor in state.items() if name != "plain"}
    plain = learner_of(SMALL, task, without).logits(images.pixels, None)
    features = forward.frozen_features(tiny.vit(depth=2), images.pixels)
    prototypes = torch.cat(
        [
            means(forward.frozen_features(tiny.vit(depth=2), i.pixels), i.targets, t.current)
            for t, (_, i) in zip(UNEQUAL[:2], trained, strict=True)
        ]
    )
    found = learner_of(method, task, state).logits(images.pixels, None)
    assert torch.allclose(found, plain + 0.5 * cosine(features, prototypes), atol=1e-6)


@torch.no_grad()
def test_a_class_that_occurs_again_is_the_mean_over_all_its_images() -> None:
    tasks = [
        Task(index=i, count=2, current=(0, 1, 2), before=3 * min(i, 1), seen=3) for i in range(2)
    ]
    (_, first), (state, second) = train(SMALL, tasks, seeds=(0, 1))
    learner = learner_of(SMALL, tasks[1], state)
    pixels = torch.cat([first.pixels, second.pixels])
    targets = torch.cat([first.targets, second.targets])
    features = learner.subspaces(pixels)
    both = means(features[:, 0], targets, (0, 1, 2))
    newest = means(features[12:, 1], second.targets, (0, 1, 2))
    assert torch.allclose(state["spaces.0.prototypes"], both, atol=1e-6)
    assert torch.allclose(state["spaces.1.prototypes"], newest, atol=1e-6)
    wanted = (cosine(features[:, 0], both) + cosine(features[:, 1], newest)) / 2
    assert torch.allclose(learner.logits(pixels, None), wanted, atol=1e-6)


def test_in_bf16_scores_keep_the_precision_of_float32() -> None:
    state, images = train(SMALL, UNEQUAL[:2])[-1]
    learner = learner_of(SMALL, UNEQUAL[1], state)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found: Any = learner.logits(images.pixels, None)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_wrong_values_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as error:
        EASE(bottleneck=0, dropout=1.0, alpha=-1.0)
    assert [name for name, _ in error.value.problems] == ["bottleneck", "dropout", "alpha"]
