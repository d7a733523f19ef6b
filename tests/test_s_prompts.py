"""S-Prompts: one prompt, classifier and set of centres per task, and the choice among them."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks.vit import forward_tokens
from graftwork.methods.parts.clusters import k_means
from graftwork.methods.prompts.s_prompts import SPrompts, SPromptsLearner
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Settings
from tests import tiny

METHOD = SPrompts(epochs=2, batch_size=6, lr=0.1, prompt_length=3, centres=2)
State = dict[str, Tensor]


def _domain(index: int) -> Task:
    """A task of a domain-incremental stream with 3 classes."""
    return Task(index=index, count=3, current=(0, 1, 2), before=3 * (index > 0), seen=3)


def _images(task: Task) -> tiny.TensorImages:
    """Images of a task; each domain has a brightness of its own."""
    data = tiny.images(task, seed=task.index)
    data.pixels += 3 * task.index * torch.ones(3, 1, 1)
    return data


def _train(tasks: list[Task], method: SPrompts = METHOD, **settings: Any) -> list[State]:
    states: list[State] = []
    for task in tasks:
        state, _ = loop.train_task(
            method,
            tiny.vit(2),
            task,
            _images(task),
            states[-1] if states else None,
            Settings(seed=0, **settings),
        )
        states.append(state)
    return states


def _opened(task: Task, state: State) -> SPromptsLearner:
    learner = tiny.opened(METHOD, task, state, depth=2)
    assert isinstance(learner, SPromptsLearner)
    return learner


@pytest.fixture(scope="module")
def domains() -> list[State]:
    return _train([_domain(index) for index in range(3)])


@pytest.fixture(scope="module")
def classes() -> list[State]:
    return _train([tiny.task(index) for index in range(2)])


def test_what_a_task_learned_is_frozen_afterwards_in_spite_of_weight_decay(domains, classes):
    for states in (domains, classes):
        for before, after in pairwise(states):
            assert before.keys() == after.keys()
            for name, tensor in before.items():
                assert torch.equal(after[name][: len(tensor)], tensor), name
                assert len(after[name]) > len(tensor), name


def test_weight_decay_reaches_the_own_rows():
    tasks = [_domain(0), _domain(1)]
    strong = SPrompts(epochs=2, batch_size=6, lr=0.1, prompt_length=3, later_weight_decay=1.0)
    weak = SPrompts(epochs=2, batch_size=6, lr=0.1, prompt_length=3, later_weight_decay=0.0)
    a, b = (_train(tasks, method)[1] for method in (strong, weak))
    assert torch.equal(a["prompts"][0], b["prompts"][0])
    assert a["prompts"][1].norm() < 0.9 * b["prompts"][1].norm()


def test_sizes_of_state(domains, classes):
    width = tiny.WIDTH
    assert {name: tuple(tensor.shape) for name, tensor in domains[2].items()} == {
        "prompts": (3, 3, width),
        "weight": (9, width),
        "bias": (9,),
        "centres": (3, 2, width),
        "rows": (9, 2),
    }
    assert classes[1]["weight"].shape == (6, width)
    assert domains[2]["rows"].tolist() == [[t, c] for t in range(3) for c in range(3)]
    assert classes[1]["rows"].tolist() == [[c // 3, c] for c in range(6)]


def test_centres_are_those_of_prompt_free_features(domains):
    task = _domain(1)
    query = F.normalize(forward.frozen_features(tiny.vit(2), _images(task).pixels), dim=1)
    centres = domains[2]["centres"][1]
    nearest = torch.cdist(query, centres).argmin(dim=1)
    means = torch.stack([query[nearest == k].mean(dim=0) for k in range(2)])
    torch.testing.assert_close(centres, means, atol=1e-5, rtol=0)
    longer = SPrompts(epochs=1, batch_size=6, lr=0.1, prompt_length=7, centres=2)
    other = _train([_domain(0), task], longer)[1]["centres"]
    torch.testing.assert_close(other, domains[1]["centres"], atol=1e-5, rtol=0)


def test_the_task_is_that_of_the_nearest_centre_in_the_l1_distance(domains):
    learner = _opened(_domain(2), domains[2])
    query = F.normalize(torch.randn(20, tiny.WIDTH), dim=1)
    # The authors' expression: the root of each squared difference, then the sum.
    roots = ((query[:, None, None] - learner.centres) ** 2) ** 0.5
    assert torch.equal(learner.chosen(query), roots.sum(dim=3).amin(dim=2).argmin(dim=1))
    # Not the same as the Euclidean distance.
    with torch.no_grad():
        learner.centres.zero_()
        learner.centres[1, :, :4] = 0.5
        learner.centres[2, :, 4] = 1.2
    assert learner.chosen(torch.zeros(1, tiny.WIDTH)).tolist() == [0]
    learner.centres[0] += 5
    assert learner.chosen(torch.zeros(1, tiny.WIDTH)).tolist() == [2]


def test_every_image_chooses_alone_and_gets_its_task_s_prompt_and_classifier(domains):
    learner = _opened(_domain(2), domains[2])
    parts = [_images(_domain(index)).pixels for index in range(3)]
    images = torch.cat(parts)
    query = forward.frozen_features(learner.network, images)
    task = learner.chosen(F.normalize(query, dim=1))
    assert (task == torch.arange(3).repeat_interleave(12)).float().mean() > 0.9
    scores = learner.logits(images, query)
    for row in range(0, 36, 5):
        own = int(task[row])
        prompt = learner.prompts[own : own + 1]
        token = forward_tokens(learner.network, images[row : row + 1], prompt=prompt)[:, 0]
        rows = slice(3 * own, 3 * own + 3)
        expected = F.linear(token, learner.weight[rows], learner.bias[rows])
        torch.testing.assert_close(scores[row : row + 1], expected, atol=1e-5, rtol=0)


def test_class_incremental_rules_out_the_classes_of_other_tasks(classes):
    learner = _opened(tiny.task(1), classes[1])
    images = torch.cat([_images(tiny.task(index)).pixels for index in range(2)])
    query = forward.frozen_features(learner.network, images)
    task, scores = learner.chosen(F.normalize(query, dim=1)), learner.logits(images, query)
    assert scores.isfinite().all()
    assert task.unique().tolist() == [0, 1]
    assert torch.equal(scores.argmax(dim=1) // 3, task)
    assert torch.equal((scores < -1e8).sum(dim=1), torch.full((24,), 3))


def test_the_loss_is_that_of_the_task_s_own_classifier(classes):
    task = tiny.task(1)
    learner, data = _opened(task, classes[1]), _images(task)
    token = forward_tokens(learner.network, data.pixels, prompt=learner.prompts[1:])[:, 0]
    scores = F.linear(token, learner.weight[3:], learner.bias[3:])
    loss = learner(data.pixels, data.targets, None)["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(scores, data.targets - 3))


def test_the_query_is_asked_for_only_where_a_task_is_chosen(domains):
    learner = _opened(_domain(0), domains[0])
    assert learner.needs_query
    assert not learner.train().needs_query


def test_k_means_finds_separate_clusters_and_repeats_itself():
    torch.manual_seed(0)
    means = 10 * torch.eye(4)[:3]
    rows = means.repeat_interleave(50, dim=0) + 0.1 * torch.randn(150, 4)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(k_means(rows, 3))
    assert torch.equal(*results)
    order = results[0].argmax(dim=1).argsort()
    torch.testing.assert_close(
        results[0][order], rows.view(3, 50, 4).mean(dim=1), atol=1e-5, rtol=0
    )


def test_k_means_with_fewer_rows_than_centres():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    centres = k_means(rows, 5)
    assert centres.shape == (5, 2)
    assert torch.equal(centres.unique(dim=0), rows.flip(0))


def test_k_means_is_as_good_as_scikit_learn_s():
    rows = F.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.manual_seed(0)
    ours = torch.cdist(rows, k_means(rows, 5)).amin(dim=1).square().sum()
    # Inertia of KMeans(n_clusters=5, random_state=0, n_init=10), scikit-learn 1.9.1.
    assert abs(float(ours) / 285.3517 - 1) < 0.01


@pytest.mark.parametrize(
    "changes", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
)
def test_other_prefix_tokens(domains, changes):
    task = _domain(0)
    network = tiny.vit(2, **changes)
    images = _images(task).pixels
    learner = METHOD.learner(network, task).eval()
    query = forward.frozen_features(network, images)
    scores = learner.logits(images, query)
    torch.testing.assert_close(scores[5:6], learner.logits(images[5:6], query[5:6]))


def test_a_domain_may_lack_a_class() -> None:
    present = ((0, 2), (0, 1, 2), (1,))
    tasks = [replace(_domain(index), current=own) for index, own in enumerate(present)]
    states = _train(tasks)
    rows = states[-1]["rows"].tolist()
    used = [(task, column) for task, column in rows if task >= 0]
    assert used == [(t, c) for t, own in enumerate(present) for c in own]
    for number in (0, 1):
        at = [place for place, (task, _) in enumerate(rows) if task == number]
        for later in states[number + 1 :]:
            assert torch.equal(later["weight"][at], states[number]["weight"][at])
    learner = _opened(tasks[-1], states[-1])
    for task in tasks:
        pixels = _images(task).pixels
        query = forward.frozen_features(learner.network, pixels)
        with torch.no_grad():
            scores, chosen = learner.logits(pixels, query), learner.chosen(_unit(query))
        for row, own in zip(scores, chosen.tolist(), strict=True):
            assert [c for c in range(3) if row[c] > -1e8] == list(present[own])


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)
