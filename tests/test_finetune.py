"""Sequential fine-tuning, the lower bound."""

import dataclasses

import torch
import torch.nn.functional as F

from graftwork.methods.baselines.finetune import Finetune
from graftwork.methods.networks.vit import unfreeze
from graftwork.operators.training import batches
from tests import tiny

SMALL = Finetune(epochs=2, batch_size=6, lr=0.01, augmentation="none")


def test_two_tasks_are_plain_sgd() -> None:
    """The same in ten lines: LAMDA-PILOT's optimiser, loss and growing head."""
    states = tiny.train(SMALL, 2, depth=2)
    vit = tiny.vit(depth=2).requires_grad_(True)
    head = torch.nn.Linear(tiny.WIDTH, 3)
    for index, decay in ((0, 5e-4), (1, 2e-4)):
        task = tiny.task(index)
        images, start = tiny.images(task), tiny.opened(SMALL, task, None, depth=2)
        grown = torch.nn.Linear(tiny.WIDTH, task.seen)
        grown.load_state_dict(start.get_submodule("head").state_dict())
        with torch.no_grad():
            grown.weight[: task.before] = head.weight[: task.before]
            grown.bias[: task.before] = head.bias[: task.before]
        head = grown
        parameters = [*vit.parameters(), *head.parameters()]
        sgd = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=decay)
        for epoch in range(2):
            for rows in batches.row_batches(12, SMALL.recipe(task), 0, index, epoch):
                scores = head(vit.forward_features(images.pixels[rows])[:, 0])
                own = images.targets[rows] - task.before
                sgd.zero_grad()
                F.cross_entropy(scores[:, task.before :], own).backward()
                sgd.step()
        stored = states[index]
        assert torch.allclose(stored["head.weight"], head.weight, atol=1e-6)
        for name, tensor in vit.state_dict().items():
            assert torch.allclose(stored[f"vit.{name}"], tensor, atol=1e-6), name


def test_loss_over_current_columns_gives_earlier_classes_no_gradient() -> None:
    task = tiny.task(1)
    for columns, silent in (("current", True), ("seen", False)):
        method = dataclasses.replace(SMALL, loss=columns)
        learner = tiny.opened(method, task, None, depth=2)
        images = tiny.images(task)
        learner(images.pixels, images.targets, None)["loss"].backward()
        gradient = learner.get_parameter("head.weight").grad
        assert gradient is not None
        assert bool((gradient[:3] == 0).all()) == silent
        assert bool((gradient[3:] != 0).any())


def test_decay_of_the_first_task_and_of_later_ones() -> None:
    method = Finetune()
    groups = [{"params": [torch.nn.Parameter(torch.ones(()))]}]
    found = [method.recipe(tiny.task(i)).optimizer(groups).defaults for i in range(3)]
    assert [f["weight_decay"] for f in found] == [5e-4, 2e-4, 2e-4]
    assert {(f["lr"], f["momentum"]) for f in found} == {(1e-3, 0.9)}


def test_new_rows_of_the_head_start_uniform_and_unbiased() -> None:
    learner = tiny.opened(Finetune(), tiny.task(0, 40), None, depth=1)
    weight, bound = learner.get_parameter("head.weight"), (3 / tiny.WIDTH) ** 0.5
    assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
    assert not learner.get_parameter("head.bias").any()


def test_a_pooling_that_features_are_not_read_through_is_not_trained() -> None:
    vit = tiny.vit(depth=1, class_token=False, global_pool="map")
    unfreeze(vit)
    frozen = {name.split(".")[0] for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"attn_pool"}
