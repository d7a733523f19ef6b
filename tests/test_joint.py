"""Joint fine-tuning, the upper bound."""

import pytest
import torch
import torch.nn.functional as F

from graftwork.methods.baselines.joint import Joint
from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.heads import CosineHead
from graftwork.operators.training import loop, settings
from tests import tiny

ALL = Task(index=0, count=1, current=tuple(range(6)), before=0, seen=6)


def test_it_is_marked_as_what_it_is() -> None:
    assert Joint.card.upper_bound
    assert Joint.card.contract == "trained"


def test_defaults_are_those_of_ranpacs_joint_full() -> None:
    learner = tiny.opened(Joint(), ALL, None, depth=2)
    recipe = Joint().recipe(ALL)
    body, head = recipe.optimizer(learner.groups()).param_groups
    assert (body["lr"], head["lr"], body["weight_decay"]) == (1e-4, 0.01, 5e-4)
    assert (recipe.epochs, recipe.batch_size) == (30, 128)
    assert {recipe.schedule(epoch, 30) for epoch in range(30)} == {1.0}
    assert isinstance(learner.head, CosineHead)


@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_the_loss_is_the_cross_entropy_over_all_columns(head: str) -> None:
    learner = tiny.opened(Joint(head=head), ALL, None, depth=2)  # type: ignore[arg-type]
    images = tiny.images(ALL)
    scores = learner.logits(images.pixels, None)
    assert scores.shape == (24, 6)
    loss = learner(images.pixels, images.targets, None)["loss"]
    assert torch.equal(loss, F.cross_entropy(scores, images.targets))
    loss.backward()
    assert all(p.grad is not None for p in learner.parameters())


def test_it_learns_all_classes_at_once_so_that_columns_may_be_left_out() -> None:
    method = Joint(epochs=10, batch_size=8, lr=0.2, backbone_lr=0.05, augmentation="none")
    images = tiny.images(ALL)
    state, log = loop.train_task(method, tiny.vit(), ALL, images, None, settings.Settings(seed=0))
    assert log.epochs[-1]["loss"] < log.epochs[0]["loss"]
    learner = tiny.opened(method, ALL, state)
    with torch.no_grad():
        scores = learner.logits(images.pixels, None)
    assert (scores.argmax(dim=1) == images.targets).float().mean() > 0.8
    early = images.targets < 3
    assert (scores[early][:, :3].argmax(dim=1) == images.targets[early]).float().mean() > 0.8
