"""Ragged streams: tasks of different sizes, domains that lack a class, classes that return.

Every trained method has to get through them; what belongs to a class of a task has to stay its own.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.parts import entries
from graftwork.methods.prompts.dap import DAP, DAPLearner
from graftwork.methods.prompts.hide_prompt import HiDePrompt, HiDePromptLearner
from graftwork.methods.prompts.s_prompts import FAR, SPrompts, SPromptsLearner
from graftwork.operators.training import loop
from graftwork.operators.training.settings import Settings
from tests import test_conformance as conformance
from tests import tiny

Currents = tuple[tuple[int, ...], ...]

SIZES: dict[str, Currents] = {
    "3, 1, 4": ((0, 1, 2), (3,), (4, 5, 6, 7)),
    "3, 2, 1": ((0, 1, 2), (3, 4), (5,)),
    "2, 3": ((0, 1), (2, 3, 4)),
}
DOMAINS: dict[str, Currents] = {
    "fewer each time": ((0, 1, 2), (0, 1), (2,)),
    "a class is missing": ((0, 1, 2), (0, 2), (0, 1, 2)),
    "a class comes later": ((0, 2), (0, 1, 2, 3), (1,)),
    "old and new": ((0, 1, 2), (1,), (0, 2, 3, 4)),
}
STREAMS = SIZES | DOMAINS


def stream(currents: Currents, columns: int | None = None) -> list[Task]:
    """Tasks with these columns.

    Args:
        columns: that exist from the start; None for those of the classes so far.
    """
    found: list[Task] = []
    for index, current in enumerate(currents):
        before = found[-1].seen if found else 0
        seen = columns or max(before, max(current) + 1)
        names, texts = tiny.NAMES[:seen], ("a photo of a {}.",)
        found.append(
            Task(
                index=index, current=current, before=before, seen=seen, names=names, templates=texts
            )
        )
    return found


def pairs(tasks: list[Task]) -> list[list[int]]:
    return [[task.index, column] for task in tasks for column in task.current]


each = pytest.mark.parametrize(
    "tasks",
    [
        *(pytest.param(stream(currents), id=name) for name, currents in STREAMS.items()),
        # All columns exist from the start, as where planning knows every class beforehand.
        pytest.param(stream(DOMAINS["a class is missing"], 3), id="three columns throughout"),
    ],
)


# HiDe-Prompt: entries, and the task that an image is taken for.

HIDE = HiDePrompt(
    epochs=20,
    batch_size=8,
    tii_lr=0.01,
    schedule="constant",
    prompt_length=2,
    last_block=0,
    centroids=2,
    alignment_epochs=30,
    samples_per_class=8,
    tii_samples_per_class=24,
    tii_alignment_lr=0.01,
    augmentation="none",
)


def apart(task: Task) -> tiny.TensorImages:
    """Images whose frozen features are a direction of their own in every task, for every class."""
    images = tiny.images(task)
    generator = torch.Generator().manual_seed(10 + task.index)
    directions = torch.linalg.qr(
        torch.randn(tiny.WIDTH, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    ).Q
    noise = 0.1 * torch.randn(len(images.targets), tiny.WIDTH, generator=generator)
    images.query = 8 * directions[10 * task.index + images.targets] + noise
    return images


def chain(method: Any, tasks: list[Task], images: Any, depth: int = 2) -> list[State]:
    states: list[State] = []
    for task in tasks:
        before = states[-1] if states else None
        state, _ = loop.train_task(
            method, tiny.vit(depth), task, images(task), before, Settings(seed=0)
        )
        states.append(state)
    return states


@each
def test_hide_prompt_keeps_an_entry_for_each_class_of_each_task(tasks: list[Task]) -> None:
    states = chain(HIDE, tasks, apart)
    for number, (task, state) in enumerate(zip(tasks, states, strict=True), 1):
        assert state["entries"].tolist() == pairs(tasks[:number])
        assert state["tii.head.weight"].shape == (len(state["entries"]), tiny.WIDTH)
        for part in ("plain", "prompted"):
            # Four images of each class, in every task that had it.
            assert state[f"{part}.count"].sum(dim=1).tolist() == [4] * len(state["entries"])
        learner = tiny.opened(HIDE, task, state, depth=2)
        assert isinstance(learner, HiDePromptLearner)
        for earlier in tasks[:number]:
            query = apart(earlier).query
            assert query is not None
            assert learner.inferred(query).tolist() == [earlier.index] * len(query)
    for before, after in pairwise(states):
        for name in ("plain.mean", "prompted.mean", "plain.spread"):
            assert torch.equal(after[name][: len(before[name])], before[name]), name
    # What is remembered of an entry are the features of its own class in its own task.
    for entry, (index, column) in enumerate(pairs(tasks)):
        images = apart(tasks[index])
        assert images.query is not None
        weighted = states[-1]["plain.count"][entry].float() @ states[-1]["plain.mean"][entry] / 4
        wanted = images.query[images.targets == column].mean(dim=0)
        torch.testing.assert_close(weighted, wanted, rtol=0, atol=1e-5)


def test_an_entry_of_a_class_that_returns_decides_for_its_task() -> None:
    tasks = stream(DOMAINS["old and new"])
    learner = tiny.opened(HIDE, tasks[-1], chain(HIDE, tasks, apart)[-1], depth=2)
    assert isinstance(learner, HiDePromptLearner)
    for entry, (index, _) in enumerate(pairs(tasks)):
        with torch.no_grad():
            learner.tii.head.bias.zero_()
            learner.tii.head.bias[entry] = 1000.0
        assert learner.inferred(torch.zeros(2, tiny.WIDTH)).tolist() == [index] * 2


# S-Prompts: a row of a classifier for each class of each task.


def domain(task: Task) -> tiny.TensorImages:
    """Images of a task; those of no two tasks are alike."""
    return tiny.images(task, seed=task.index)


S_PROMPTS = SPrompts(epochs=2, batch_size=6, lr=0.1, prompt_length=2, centres=2)


@each
def test_s_prompts_scores_the_classes_of_the_chosen_task_with_its_rows(tasks: list[Task]) -> None:
    states = chain(S_PROMPTS, tasks, domain)
    for number, state in enumerate(states, 1):
        assert state["rows"].tolist() == pairs(tasks[:number])
    for before, after in pairwise(states):
        for name, tensor in before.items():
            assert torch.equal(after[name][: len(tensor)], tensor), name
    learner = tiny.opened(S_PROMPTS, tasks[-1], states[-1], depth=2)
    assert isinstance(learner, SPromptsLearner)
    images = tiny.images(tasks[0]).pixels
    for task in tasks:
        # Images whose nearest centre is one of the task's.
        query = learner.centres[task.index, :1].expand(len(images), -1)
        assert learner.chosen(query).tolist() == [task.index] * len(images)
        with torch.no_grad():
            prompt = learner.prompts[[task.index]]
            tokens = forward_tokens(learner.network, images, prompt=prompt)
            features = read_out(learner.network, tokens)
            found = learner.logits(images, query)
        first = sum(len(earlier.current) for earlier in tasks[: task.index])
        own = slice(first, first + len(task.current))
        expected = torch.full((len(images), tasks[-1].seen), FAR)
        expected[:, list(task.current)] = F.linear(
            features, learner.weight[own], learner.bias[own]
        ).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# DAP: classes that an inferred task leaves possible.


@each
def test_dap_rules_out_what_the_inferred_task_did_not_have(tasks: list[Task]) -> None:
    method = DAP(epochs=1, batch_size=6, prompt_length=2, mask_to_inferred_task=True)
    state = chain(method, tasks, tiny.images)[-1]
    assert state["classes"].tolist() == pairs(tasks)
    learner = tiny.opened(method, tasks[-1], state, depth=2)
    assert isinstance(learner, DAPLearner)
    images = tiny.images(tasks[0]).pixels[: len(tasks)]
    query = learner.keys.detach()[: len(images)]
    for task, scores in zip(tasks, learner.logits(images, query), strict=False):
        assert (scores > -1e10).nonzero().flatten().tolist() == list(task.current)


# Every trained method.

CASES = [case for case in conformance.CASES if case.tasks > 1]
WHOLE = {
    "3, 1, 4": stream(SIZES["3, 1, 4"]),
    "a class is missing": stream(DOMAINS["a class is missing"], 3),
    "old and new": stream(DOMAINS["old and new"]),
}


def few(task: Task) -> tiny.TensorImages:
    """One image of each class in the second task, else four."""
    return tiny.images(task, 1 if task.index == 1 else 4)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_trained_method_gets_through(
    case: conformance.Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, tasks = case.but(epochs=1, components_per_task=2), WHOLE[name]
    monkeypatch.setattr(conformance, "images", few)
    states = conformance.train(case, tasks)
    for task, state in zip(tasks, states, strict=True):
        assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
        learner = conformance.opened(case, task, state)
        pixels = few(tasks[0]).pixels
        found = conformance.scores(learner, pixels)
        assert found.shape == (12, task.seen)
        assert bool(found.isfinite().all())
        # A second learner, opened with the first one's tensors, is the same.
        stored = {n: t.clone() for n, t in learner.state_dict().items() if n in state}
        again = conformance.scores(conformance.opened(case, task, stored), pixels)
        assert torch.equal(again, found)


def test_entries_behind_those_of_earlier_tasks() -> None:
    tasks = stream(DOMAINS["old and new"])
    assert [entries.usual(task) for task in tasks] == [0, 3, 3]
    known: Tensor = torch.tensor(pairs(tasks[:2]))
    # Whether the state is that of the task before, or of the task itself.
    assert entries.earlier(known[:, 0], tasks[2]) == 4
    assert entries.earlier(known[:, 0], tasks[1]) == 3
    assert entries.pairs(tasks[1], 3).tolist() == [[-1, -1]] * 3 + [[1, 1]]
