"""Sequential LoRA: identity at the start, low rank, old classes untouched by the loss."""

from typing import Any, get_args, get_type_hints

import pytest
import torch

from graftwork.methods.baselines.lora import LAYERS, LoRA, LoRALearner
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks.vit import LowRank
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Settings
from tests import tiny

METHOD = LoRA(epochs=2, batch_size=6, lr=0.01, rank=4)
TASKS = [tiny.task(0), tiny.task(1)]


def learner(method: LoRA = METHOD, index: int = 0, state: Any = None) -> LoRALearner:
    opened = tiny.opened(method, TASKS[index], state)
    assert isinstance(opened, LoRALearner)
    return opened


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    return tiny.train(METHOD)


@pytest.mark.parametrize("targets", LAYERS)
def test_start_is_bitwise_the_backbone(targets: Any):
    images = tiny.images(TASKS[0]).pixels
    features = learner(LoRA(targets=targets)).features(images)
    assert torch.equal(features, forward.frozen_features(tiny.vit(), images))


@pytest.mark.parametrize(("targets", "widths"), [("qkv", 4), ("attention", 6), ("all", 16)])
def test_only_updates_and_classifier_are_trained(targets: Any, widths: int):
    opened = learner(LoRA(rank=4, targets=targets))
    trained = {name: p for name, p in opened.named_parameters() if p.requires_grad}
    head = {name for name in trained if name.startswith("head.")}
    assert head == {"head.weight", "head.bias"}
    updates = {name: p for name, p in trained.items() if name not in head}
    assert all(name.endswith((".down.weight", ".up.weight")) for name in updates)
    # A layer from width a to b has R (a + b) numbers: D + 3D for qkv, 2D for the projection.
    assert sum(p.numel() for p in updates.values()) == 6 * widths * 4 * tiny.WIDTH


def test_backbone_is_unchanged_and_not_stored(states: list[dict[str, torch.Tensor]]):
    network = tiny.vit()
    loop.train_task(METHOD, network, TASKS[0], tiny.images(TASKS[0]), None, Settings(seed=0))
    after = {name.replace(".base.", "."): t for name, t in network.state_dict().items()}
    for name, tensor in tiny.vit().state_dict().items():
        assert torch.equal(after[name], tensor)
    assert all(".base." not in name for name in states[0])
    assert len(states[0]) == 2 * 6 + 2


def test_features_are_those_of_merged_weights(states: list[dict[str, torch.Tensor]]):
    scaled = LoRA(rank=4, scale=2.0)
    opened, merged = learner(scaled, 0, states[0]), tiny.vit()
    for index in range(6):
        name = f"blocks.{index}.attn.qkv"
        update = opened.network.get_submodule(name)
        assert isinstance(update, LowRank)
        change = 2.0 * update.up.weight @ update.down.weight
        assert torch.linalg.matrix_rank(change) == 4
        with torch.no_grad():
            merged.get_parameter(f"{name}.weight").add_(change)
    images = tiny.images(TASKS[0]).pixels
    features = opened.features(images)
    torch.testing.assert_close(features, forward.frozen_features(merged, images), rtol=0, atol=1e-4)
    assert (features - forward.frozen_features(tiny.vit(), images)).abs().max() > 0.1


def test_second_task_continues_the_updates_of_the_first(states: list[dict[str, torch.Tensor]]):
    opened = learner(index=1, state=states[0])
    own = opened.state_dict()
    for name, stored in states[0].items():
        assert torch.equal(own[name][: len(stored)], stored)
    name = "vit.blocks.0.attn.qkv.up.weight"
    assert states[0][name].shape == states[1][name].shape
    assert not torch.equal(states[0][name], states[1][name])


def test_classifier_rows_of_old_classes_are_bitwise_kept(states: list[dict[str, torch.Tensor]]):
    for name in ("head.weight", "head.bias"):
        assert torch.equal(states[1][name][:3], states[0][name])
        assert len(states[1][name]) == 6
    assert states[1]["head.bias"][3:].any()


def test_loss_is_over_the_columns_of_the_task(states: list[dict[str, torch.Tensor]]):
    opened, images = learner(index=1, state=states[0]), tiny.images(TASKS[1])
    loss = opened(images.pixels, images.targets, None)["loss"]
    own = opened.logits(images.pixels, None)[:, 3:]
    expected = -own.log_softmax(1)[torch.arange(12), images.targets - 3].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    grad = opened.head.weight.grad
    assert grad is not None
    assert not grad[:3].any()
    assert grad[3:].any()


def test_domains_share_all_columns():
    states = []
    for index in (0, 1):
        domain = Task(index=index, count=2, current=(0, 1, 2), before=3 * index, seen=3)
        images, before = tiny.images(domain, seed=index), states[-1] if states else None
        settings = Settings(seed=0)
        states.append(loop.train_task(METHOD, tiny.vit(), domain, images, before, settings)[0])
    weights = [state["head.weight"] for state in states]
    assert weights[0].shape == weights[1].shape == (3, tiny.WIDTH)
    assert not torch.equal(*weights)


def test_fields():
    assert set(get_args(get_type_hints(LoRA)["targets"])) == LAYERS.keys()
    with pytest.raises(HyperparameterError) as caught:
        LoRA(epochs=0, batch_size=0, lr=0, weight_decay=-1, rank=0, scale=0)
    assert len(caught.value.problems) == 6
