"""BitFit: what is trained, what stays, and two tasks against a loop in plain PyTorch."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from graftwork.methods.baselines.bitfit import BitFit, BitFitLearner
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Learner
from graftwork.operators.training import batches, forward, loop, settings
from tests import tiny

METHOD = BitFit(epochs=2, batch_size=6, lr=0.01, weight_decay=0.1, augmentation="none")
DEPTH = 2


@pytest.fixture(scope="module")
def states() -> list[State]:
    return tiny.train(METHOD, 2, depth=DEPTH)


def trained(learner: Learner) -> dict[str, int]:
    return {name: p.numel() for name, p in learner.named_parameters() if p.requires_grad}


def test_biases_and_head_are_trained_and_nothing_else() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert isinstance(vit, VisionTransformer)
        found = trained(BitFitLearner(vit, tiny.task(0, 10)))
    assert all(name.endswith(".bias") or name == "head.weight" for name in found)
    # A block: 3 D for qkv, D for the projection, 4 D and D for the MLP, D for each of two norms.
    assert sum(found.values()) == (12 * 11 + 2) * 768 + 10 * (768 + 1)
    assert 134 * 768 / sum(p.numel() for p in vit.parameters()) < 0.0012


def test_a_pooling_that_features_are_not_read_through_is_not_trained() -> None:
    vit = tiny.vit(DEPTH, class_token=False, global_pool="map")
    assert not [name for name in trained(BitFitLearner(vit, tiny.task(0))) if "attn_pool" in name]


def test_start_is_bitwise_the_backbone() -> None:
    images = tiny.images(tiny.task(0)).pixels
    features = tiny.opened(METHOD, tiny.task(0), None).features(images)
    assert torch.equal(features, forward.frozen_features(tiny.vit(), images))


def test_weights_stay_bitwise_and_are_not_stored(states: list[State]) -> None:
    network, task = tiny.vit(DEPTH), tiny.task(0)
    loop.train_task(METHOD, network, task, tiny.images(task), None, settings.Settings(seed=0))
    plain = tiny.vit(DEPTH).state_dict()
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, plain[n])}
    assert moved == {name for name in plain if name.endswith("bias")}
    assert states[0].keys() == {f"vit.{name}" for name in moved} | {"head.weight", "head.bias"}


def test_rows_of_earlier_classes_stay_bitwise_in_spite_of_decay(states: list[State]) -> None:
    for name in ("head.weight", "head.bias"):
        assert torch.equal(states[1][name][:3], states[0][name])
        assert len(states[1][name]) == 6


def test_two_tasks_are_a_plain_loop(states: list[State]) -> None:
    """Old rows of the head are out of reach here: every task has a layer of its own."""
    vit = tiny.vit(DEPTH)
    named = {name: p for name, p in vit.named_parameters() if name.endswith("bias")}
    biases = [parameter.requires_grad_(True) for parameter in named.values()]
    for index, state in enumerate(states):
        task, head = tiny.task(index), torch.nn.Linear(tiny.WIDTH, 3)
        images, start = tiny.images(task), tiny.opened(METHOD, task, None, DEPTH).state_dict()
        for name, parameter in head.named_parameters():
            parameter.data.copy_(start[f"head.{name}"][-3:])
        groups = [{"params": biases, "weight_decay": 0.1}, {"params": head.parameters()}]
        sgd = torch.optim.SGD(groups, momentum=0.9)
        for epoch, lr in enumerate((0.01, 0.005)):
            for group in sgd.param_groups:
                group["lr"] = lr
            for rows in batches.row_batches(12, METHOD.recipe(task), 0, index, epoch):
                scores = head(vit.forward_features(images.pixels[rows])[:, 0])
                sgd.zero_grad()
                F.cross_entropy(scores, images.targets[rows] - 3 * index).backward()
                sgd.step()
        torch.testing.assert_close(state["head.weight"][-3:], head.weight.detach())
        for name, bias in named.items():
            torch.testing.assert_close(state[f"vit.{name}"], bias.detach())


def test_fields_out_of_range_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as caught:
        BitFit(epochs=0, batch_size=0, lr=0, weight_decay=-1, clip=-1)
    assert len(caught.value.problems) == 5
